"""benchmarks/quality/ablation.py on a tiny model: equal FLOPs, hard tokens, rows kept apart."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_models import tiny_text
from transformers import AutoModelForCausalLM

from benchmarks.corpora import domains
from benchmarks.corpora.jsonl import write_jsonl
from benchmarks.quality import ablation
from benchmarks.quality.ablation import ARMS, Ablation, Healing, write_rows
from benchmarks.quality.domain import Sizes
from benchmarks.systems.trained import budget
from vllm_memdec.kernels import sparse_kl
from vllm_memdec.train.data.blocks import unmarked, valid_rows
from vllm_memdec.train.data.documents import documents
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.settings import parse_settings

SETTINGS = {
    "corpus": {"block_tokens": 64},
    "datastore": {"dtype": "float32"},
    "targets": {"neighbours": 8},
    "memory": {"layers": 1, "batch_blocks": 2, "dtype": "float32", "epochs": 2},
}
SIZES = Sizes(train=1_500, validation=300, test=300, general=300)


@pytest.fixture
def make(tiny_model, monkeypatch, tmp_path):
    monkeypatch.setattr(sparse_kl, "INTERPRETED", False)  # Triton's interpreter takes minutes here
    texts = [tiny_text(seed, 60) for seed in range(60)]
    monkeypatch.setattr(domains, "DOMAINS", {"tiny": lambda: texts})
    general = {name: [tiny_text(seed, 60) for seed in range(70, 130)] for name in domains.GENERAL}
    monkeypatch.setattr(domains, "GENERAL", {n: lambda n=n: general[n] for n in general})
    base = tiny_model("llama", layers=3, positions=1024, spread=0.15)

    def made():
        healing = Healing(layers=2, tokens=800, epochs=1.0)
        settings = parse_settings(SETTINGS)
        return Ablation("tiny", base, SIZES, settings, healing, Progress(), tmp_path)

    return made


def test_arms_get_equal_flops_and_are_made_once(make, monkeypatch):
    ours = make()
    rows = {name: ours.row(name, 1.0) for name in ("default", "both", "copy", "seed")}
    rows["half"] = ours.row("default", 0.5)
    limit = budget(ours.domain) / 1e12
    for name, row in rows.items():
        share = 0.5 if name == "half" else 1.0
        assert row["tflop"] == pytest.approx(share * limit, rel=1e-3), name
        assert 1 < row["mixture"] <= 1.1 * row["base"] and 0 <= row["alpha"] <= 1
    assert rows["default"]["epochs"] == pytest.approx(2, rel=1e-3)
    assert rows["copy"]["epochs"] < rows["seed"]["epochs"] < rows["default"]["epochs"]
    assert rows["both"]["epochs"] < rows["default"]["epochs"]  # the head of the base's log p
    assert rows["seed"]["seed_tflop"] > 0 and rows["copy"]["seed_tflop"] == ""
    assert (rows["seed"]["seed_tokens"], rows["copy"]["seed_tokens"]) == (800, "")
    assert len({row["memory"] for row in rows.values()}) == len(rows)

    def again(*args, **kwargs):
        raise AssertionError("what is there is made again")

    monkeypatch.setattr(ablation, "train_memory", again)
    same = make()
    assert {name: same.row(name, 1.0) for name in ("default", "seed")} == {
        name: rows[name] for name in ("default", "seed")
    }


def test_hard_tokens_are_those_to_which_the_base_gives_little(make):
    ours = make()
    row = ours.row("default", 1.0)
    tokens, positions = ours.domain.blocks("train")
    mask = valid_rows(positions)
    folder = ours.trained("default", 1.0)[0].path
    p = {}
    for name, place in (("base", ours.domain.base), ("memory", folder)):
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
        ids = torch.from_numpy(tokens[:, :-1].astype(np.int64))
        where = torch.from_numpy(unmarked(positions.astype(np.int64))[:, :-1])
        with torch.no_grad():
            logp = model(input_ids=ids, position_ids=where, use_cache=False).logits.log_softmax(-1)
        labels = torch.from_numpy(tokens[:, 1:].astype(np.int64))
        p[name] = logp.gather(2, labels[..., None])[..., 0].exp().numpy()[mask]
    hard = p["base"] < 0.1
    mixed = (1 - row["alpha"]) * p["base"] + row["alpha"] * p["memory"]
    assert row["base_hard"] == pytest.approx(p["base"][hard].mean(), rel=1e-4)
    assert row["hard"] == pytest.approx(mixed[hard].mean(), rel=1e-4)  # float32, other batches


def test_what_a_seed_learns_is_not_what_is_scored_as_general_text(make):
    ours = make()
    scored = {t for name in domains.GENERAL for t in ours.domain.documents(name)}
    learnt = set(documents(ours.seeds / "2-800-1/general.jsonl")) if ours.seed else set()
    assert len(learnt) > 4 and scored and not learnt & scored


def test_a_corpus_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write = Path.write_text

    def killed(path, text):
        write(path, text[: len(text) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_text", killed)
        write_jsonl(tmp_path / "general.jsonl", ["one text", "and another"])
    assert not list(tmp_path.iterdir())


def test_a_row_takes_the_place_of_its_like_alone(tmp_path):
    def row(arm, share, memory, tokens=100, dtype="bfloat16", seed=("", "")):
        of = {"domain": "law", "arm": arm, "budget": share, "train_tokens": tokens}
        of |= {"dtype": dtype, "seed_layers": seed[0], "seed_tokens": seed[1]}
        return of | {"memory": memory}

    path = tmp_path / "rows.csv"
    write_rows(path, [row("muon", 1.0, 1)])
    write_rows(path, [row("default", 0.5, 2)])
    write_rows(path, [row("default", 1.0, 3)])
    write_rows(path, [row("muon", 1.0, 4)])
    write_rows(path, [row("muon", 1.0, 5, 200)])
    with path.open(newline="") as file:
        rows = [(r["arm"], r["budget"], r["memory"]) for r in csv.DictReader(file)]
    assert rows == [("default", "1.0", "3"), ("muon", "1.0", "4"), ("default", "0.5", "2"),
                    ("muon", "1.0", "5")]  # fmt: skip
    for memory, other in enumerate(({"dtype": "float32"}, {"seed": (8, 400)}, {"seed": (10, 400)},
                                    {"seed": (10, 800)}, {"seed": (10, 800)}), 6):  # fmt: skip
        write_rows(path, [row("default", 1.0, memory, **other)])
    with path.open(newline="") as file:
        rows = {r["memory"] for r in csv.DictReader(file)}
    assert rows == {"2", "3", "4", "5", "6", "7", "8", "10"}
    assert set(ARMS) >= {"default", "muon", "mixture", "both", "own_share", "average", "copy"}
