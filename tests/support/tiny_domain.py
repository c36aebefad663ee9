"""A domain of the comparison on tiny models and a tiny corpus of facts and texts."""

from dataclasses import replace

from support.tiny_models import tiny_text

from benchmarks.corpora import domains
from benchmarks.corpora.factbook import Fact, pages
from benchmarks.quality import domain as domain_module
from benchmarks.quality.domain import QUICK, Domain
from vllm_memdec.kernels import sparse_kl
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.settings import parse_settings

SETTINGS = {
    "corpus": {"block_tokens": 64},
    "datastore": {"dtype": "float32"},
    "targets": {"neighbours": 8},
    "memory": {"layers": 1, "batch_blocks": 2, "dtype": "float32", "epochs": 4},
}
FACTS = [Fact(f"{tiny_text(n, 1)}{n}", "Labor force", tiny_text(900 + n, 2)) for n in range(200)]


def tiny_domain(pair, monkeypatch, work, **sizes) -> Domain:
    """Return a domain whose files go to a folder."""
    monkeypatch.setattr(sparse_kl, "INTERPRETED", False)  # Triton's interpreter takes minutes here
    monkeypatch.setattr(domain_module, "WORK", work)
    monkeypatch.setattr(domain_module, "ASKED", 4_000)
    documents = pages(FACTS) + [tiny_text(seed, 60) for seed in range(60)]
    monkeypatch.setattr(domains, "DOMAINS", {"tiny": lambda: documents})
    texts = {name: [tiny_text(seed, 60) for seed in range(70, 130)] for name in domains.GENERAL}
    monkeypatch.setattr(domains, "GENERAL", {n: lambda n=n: texts[n] for n in texts})
    monkeypatch.setattr(domains, "FACTS", {"tiny": ()})
    monkeypatch.setattr(domains, "facts", lambda sections: FACTS)
    chosen = {"validation": 300, "test": 300, "general": 200, "epochs": None} | sizes
    return Domain("tiny", pair, replace(QUICK, **chosen), parse_settings(SETTINGS), Progress())
