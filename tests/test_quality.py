"""benchmarks/quality on tiny models: what it draws, scores and trains is what it says."""

import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.tiny_domain import tiny_domain
from support.tiny_models import VOCAB, tiny_text
from transformers import AutoTokenizer

from benchmarks.corpora import choices, domains
from benchmarks.corpora.download import made
from benchmarks.corpora.factbook import Fact
from benchmarks.quality import domain as domain_module
from benchmarks.quality import gating, quality, update
from benchmarks.quality.domain import Domain
from benchmarks.quality.pair import Pair
from benchmarks.systems import finetune, knn_lm, memory, rag
from benchmarks.systems.finetune import Dapt
from benchmarks.systems.registry import SYSTEMS
from benchmarks.systems.system import System
from benchmarks.systems.trained import Trained, budget
from vllm_memdec.train.data.blocks import pack, tokenise, valid_rows
from vllm_memdec.train.data.documents import documents
from vllm_memdec.train.model.huggingface import load_model
from vllm_memdec.train.model.scoring import label_logprobs
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.settings import parse_settings


@pytest.fixture(scope="module")
def base(tiny_model):
    return tiny_model("llama", positions=1024, spread=0.15)


@pytest.fixture(scope="module")
def tokenizer(base):
    return AutoTokenizer.from_pretrained(base)


def test_what_two_ask_for_at_once_is_made_once(tmp_path):
    makers = []

    def make(work):
        makers.append(work)
        time.sleep(0.2)
        (work / "file").write_text("whole")

    def ask(_):
        return (made(tmp_path / "some/folder", make) / "file").read_text()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == ["whole"] * 4
    assert len(makers) == 1


def test_near_duplicates_of_what_was_drawn_are_left_out(tokenizer):
    rng = random.Random(0)
    families = [tiny_text(seed, 80).split() for seed in range(40)]
    copies = []
    for words in families[:20]:
        other = list(words)
        other[rng.randrange(80)] = "changed"  # 13 of 68 shingles are new
        copies.append(" ".join(other))
    texts = [" ".join(words) for words in families] + copies
    wanted = {"train": 6000, "validation": 1000, "test": 1000}
    parts, left_out = domains.split(texts, tokenizer, wanted)
    assert list(parts) == list(wanted) and left_out > 3
    count = sum(map(len, parts.values()))
    assert count + left_out <= len(texts)
    for name in ("validation", "test"):
        assert sum(len(tokenizer(text)["input_ids"]) for text in parts[name]) >= wanted[name]
        others = {s for n, t in parts.items() if n != name for x in t for s in domains.shingles(x)}
        for text in parts[name]:
            mine = domains.shingles(text)
            assert len(mine & others) <= domains.DUPLICATE * len(mine)


def test_long_documents_are_cut(tokenizer):
    parts, _ = domains.split([tiny_text(1, 3000)], tokenizer, {"train": 1000})
    assert len(tokenizer(parts["train"][0])["input_ids"]) in range(290, 311)


class ByQuery:
    """Finds other passages for other queries."""

    def search(self, queries, k):
        return np.array([[(len(query) + n) % 5 for n in range(k)] for query in queries])


@pytest.fixture(scope="module")
def reader(tokenizer):
    passages = [tiny_text(100 + seed, 20) for seed in range(5)]
    return rag.Rag(ByQuery(), passages, tokenizer, k=2)


@pytest.fixture(scope="module")
def blocks(tokenizer):
    texts = [tiny_text(50 + seed, words) for seed, words in enumerate([9, 40, 1, 70])]
    return pack(tokenise(tokenizer, texts), 64, tokenizer.eos_token_id)


def test_retrieval_scores_each_token_as_if_alone(base, reader, blocks):
    """Against one forward pass a token: passages found with what was known at its chunk's start."""
    model, interval = load_model(base, "float32"), 10
    found = rag.label_logprobs(model, reader, *blocks, interval, Progress())
    wanted, with_passages = [], 0
    for tokens, positions in zip(*blocks, strict=True):
        for t in np.flatnonzero(valid_rows(positions[None])[0]):
            place = positions[t]  # in its document
            document = tokens[t - place : t + 1].tolist()
            known = 1 if place < 7 else 8 + (place - 7) // interval * interval
            context = reader.contexts([document[:known]])[0] if known > 1 else []
            with_passages += bool(context)
            with torch.no_grad():
                logits = model(torch.tensor([[*context, *document]])).logits[0, -1]
            wanted.append(logits.double().log_softmax(-1)[int(tokens[t + 1])].item())
    assert np.abs(found - wanted).max() < 1e-4
    assert with_passages > 60 and len(found) == valid_rows(blocks[1]).sum()


def test_without_passages_retrieval_changes_nothing(base, tokenizer, blocks):
    model = load_model(base, "float32")
    nothing = rag.Rag(ByQuery(), [""] * 5, tokenizer, k=0)
    found = rag.label_logprobs(model, nothing, *blocks, 10, Progress())
    assert np.abs(found - label_logprobs(model, *blocks, 2)).max() < 1e-4


@pytest.fixture
def domain(base, monkeypatch, tmp_path):
    return tiny_domain(Pair("tiny", base), monkeypatch, tmp_path)


def gates_of(domain, dapt):
    """Return what gating.py measures, the other base being the one trained on the domain."""
    other = domain.system(Dapt).train(dapt["learning_rate"])
    return gating.Gating(domain, lambda: str(other.path)).rows(companion=True)


def test_cloze_questions():
    texts = [f"{'filler words here ' * 20}the answer is surely number{'abcdefgh'[n]} and" +
             " more words" * 5 for n in range(8)]  # fmt: skip
    found = choices.cloze(texts, 6)
    assert len(found) == 6
    for passage, words in found:
        assert len(passage.split()) == choices.BEFORE and len(set(words)) == choices.CHOICES
        assert any(f"{passage} {words[0]}" in text for text in texts)


class Uniform(System):
    """A new baseline: no file but its own knows it, once it is registered."""

    name, title = "uniform", "uniform"

    def logprobs(self, text):
        rows = valid_rows(self.domain.blocks(text)[1]).sum()
        return np.full(rows, -np.log(VOCAB))

    def next_token(self, prompt, line):
        return torch.full((len(line) - len(prompt), VOCAB), 1 / VOCAB)


def test_every_system_gets_the_same_flops_and_is_made_once(domain, monkeypatch):
    rows = quality.rows_of(domain)
    assert [row["system"] for row in rows] == [system.title for system in SYSTEMS]
    for row in rows:
        assert 1 < row["perplexity"] < 1e5 and 0 <= row["recall"] <= 1, row
    assert len({row["perplexity"] for row in rows}) == len(rows)
    assert rows[0]["change"] == 0 and rows[0]["facts"] == domain.sizes.facts
    by_system = {system.name: row for system, row in zip(SYSTEMS, rows, strict=True)}
    trained = [system for system in SYSTEMS if issubclass(system, Trained)]
    assert {system.name for system in trained} == {"memory", "ce_only", "dapt", "lora"}
    for kind in trained:
        row, system = by_system[kind.name], domain.system(kind)
        assert row["learning_rate"] in system.rates
        model = system.train(row["learning_rate"])
        before, token = system.cost
        tokens = model.manifest["settings"]["epochs"] * domain.corpus_tokens
        assert before + token * tokens == pytest.approx(budget(domain), rel=1e-3)
    for name in ("dapt", "lora"):  # they learn: 4 epochs of so small a model's FLOPs are few
        assert by_system[name]["perplexity"] < by_system["base"]["perplexity"]

    measured = {row["what"]: row for row in gates_of(domain, by_system["dapt"])}
    own = measured["perplexity, domain"]
    for system, column in (("base", "base"), ("memory", "fixed"), ("gated", "gate")):
        assert own[column] == pytest.approx(by_system[system]["perplexity"], abs=1e-3)
        for text in domains.GENERAL:
            found = measured[f"perplexity, {text}"][column]
            assert found == pytest.approx(by_system[system][text], abs=1e-3)
    assert all(row["own_gate"] != row["gate"] for row in measured.values() if "own_gate" in row)
    assert measured["perplexity, domain, other base"]["base"] != own["base"]
    learnt = measured["perplexity, wiki, general text learnt"]
    plain = measured["perplexity, wiki"]
    assert learnt["count"] == plain["count"] and learnt["base"] == plain["base"]
    assert learnt["fixed"] != plain["fixed"]
    text = domain.folder.with_name("tiny-and-general") / "text"
    train, *scored = (list(documents(text / f"{n}.jsonl")) for n in ("train", *domains.GENERAL))
    general = {text for read in domains.GENERAL.values() for text in read()}
    assert len(general & set(train)) > 1
    assert not set(train) & {text for part in scored for text in part}
    asked = measured["cloze, right answers"]
    assert asked["count"] > 10 and all(0 <= asked[name] <= 1 for name in gating.SYSTEMS)

    monkeypatch.setattr(quality, "SYSTEMS", (*SYSTEMS, Uniform))
    *others, new = quality.rows_of(domain)
    assert others == rows and (new["system"], new["recall"]) == ("uniform", 0)
    assert new["perplexity"] == pytest.approx(VOCAB)
    monkeypatch.setattr(quality, "SYSTEMS", SYSTEMS)
    assert quality.rows_of(domain) == rows

    def again(*args, **kwargs):
        raise AssertionError("what is there is made again")

    for module, name in (
        (memory, "train_memory"),
        (finetune, "train_memory"),
        (finetune, "train_lora"),
        (domain_module, "label_logprobs"),
        (rag, "label_logprobs"),
        (knn_lm, "find_neighbours"),
    ):
        monkeypatch.setattr(module, name, again)
    same = Domain("tiny", domain.pair, domain.sizes, domain.settings, Progress())
    assert quality.rows_of(same) == rows


def test_facts_that_can_be_guessed_are_not_asked_for():
    """Nor long ones: what is forgotten must have been known from one document alone."""
    values = Counter(["Africa", "Africa", "Oslo", "x" * 61])
    facts = [Fact("Norway", "field", value) for value in ("Africa", "Oslo", "x" * 61)]
    assert [update.askable(fact, values) for fact in facts] == [False, True, False]


def test_updates_are_measured_beside_builds_from_scratch(base, tmp_path):
    rng, words = random.Random(2), tiny_text(3).split()
    facts = [
        Fact(country, f"field {n}", " ".join(rng.sample(words, 2)))
        for country in rng.sample(sorted({*words}), 40)
        for n in range(3)
    ]
    settings = parse_settings({"targets": {"neighbours": 8}, "memory": {"batch_blocks": 2}})
    rows = update.measure(base, facts, replace(update.QUICK, layers=1), settings, tmp_path)
    whole, less, added, removed = rows
    assert [row["documents"] for row in rows] == [20, 18, 20, 18]
    assert whole["embedded"] == whole["blocks"] > less["blocks"] == less["embedded"]
    assert 0 < added["embedded"] < 0.3 * added["blocks"] and removed["embedded"] == 0
    for after, afresh in ((added, whole), (removed, less)):
        assert 0 < after["trained"] < afresh["trained"] and after["tflop"] < afresh["tflop"]
        assert after["tenth_facts"] == afresh["tenth_facts"] > 1
    assert len({row["perplexity"] for row in rows}) == 4 and len({row["base"] for row in rows}) == 1
    for row in rows:
        assert {row[f"{kind}_base"] for kind in ("tenth", "rest")} == {0.0}
