"""The mixture's likelihood as objective: the base's log p is kept, read and learnt from."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data.blocks import load_blocks, load_rows, valid_rows
from vllm_memdec.train.data.shards import shards
from vllm_memdec.train.executor.context import Context
from vllm_memdec.train.model import hidden_states
from vllm_memdec.train.model.hidden_states import Keys
from vllm_memdec.train.model.output_head import ALL
from vllm_memdec.train.settings import DatastoreSettings, MemorySettings, parse_settings
from vllm_memdec.train.stages.datastore import build_datastore
from vllm_memdec.train.stages.training import recorded_settings
from vllm_memdec.train.training.batches import Batches
from vllm_memdec.train.training.metrics import read_metrics
from vllm_memdec.train.training.parallel import Spread
from vllm_memdec.train.training.steps import add_gradients, mixture_share

LOGPROB = 1e-4  # absolute, float32: of packed documents against each by itself
GRADIENT = 1e-5  # float32, parameters and rows of the order of one
SETTINGS = {"batch_blocks": 3, "dtype": "float32"}
MIXTURE = {"objective": "mixture", "mixture_alpha": 0.3}


@pytest.fixture(scope="module")
def mixture(tiny_model, tmp_path_factory, english, jsonl, build):
    """Return a finished build whose memory learns the mixture's likelihood."""
    folder = tmp_path_factory.mktemp("mixture")
    base, corpus = tiny_model("llama"), jsonl(folder / "corpus.jsonl", english(40))
    lines = build(base, corpus, folder / "out", {"memory": MIXTURE})
    return SimpleNamespace(base=base, corpus=corpus, output=folder / "out", lines=lines)


@torch.inference_mode()
def label_logprobs_one_by_one(folder, tokens, positions):
    """Return log p(label) of each run of a document within a block, never packed, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval().double()
    parts = []
    for row, position in zip(tokens, positions, strict=True):
        starts = np.flatnonzero(position == 0)
        for start, stop in zip(starts, [*starts[1:], len(row)], strict=True):
            run = torch.from_numpy(row[start:stop].astype(np.int64))
            logp = model(run[None, :-1]).logits[0].log_softmax(-1) if len(run) > 1 else None
            if logp is not None:
                parts.append(logp[torch.arange(len(run) - 1), run[1:]])
    return torch.cat(parts).numpy()


@pytest.mark.parametrize("key", ["last_mlp_input", "final_hidden", "layer"])
@pytest.mark.parametrize("apart", [True, False])  # else documents are read one by one
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_base_s_log_p_comes_out_of_the_pass_of_the_keys(
    pipeline, tiny_model, tmp_path, monkeypatch, kind, apart, key
):
    monkeypatch.setattr(hidden_states, "keeps_apart", lambda model: apart)
    base = tiny_model(kind)
    depth = {"layer_fraction": 0.5} if key == "layer" else {}
    settings = DatastoreSettings(key=key, **depth, **SETTINGS)
    for name, scored in (("plain", False), ("scored", True)):
        (tmp_path / name).mkdir()
        keys = Keys(settings, base, pipeline.output / "corpus", tmp_path / name, scored)
        build_datastore(keys, tmp_path / name, Context())
    for name in ("keys", "labels"):
        plain, scored = (np.concatenate(shards(tmp_path / n, name)) for n in ("plain", "scored"))
        assert np.array_equal(plain, scored)
    stored = np.concatenate(shards(tmp_path / "scored", "base"))
    want = label_logprobs_one_by_one(base, *(a[:] for a in load_blocks(keys.corpus, "train")))
    assert stored.dtype == np.float32 and np.abs(stored - want).max() < LOGPROB
    assert not list((tmp_path / "plain").glob("base-*"))


def test_log_p_is_kept_where_keys_are_not(mixture, build, tmp_path):
    changes = {"memory": MIXTURE, "datastore": {"keep_keys": False}}
    lines = build(mixture.base, mixture.corpus, tmp_path / "out", changes, until="targets")
    assert any("keys which are not kept would not take" in line for line in lines)
    assert not list((tmp_path / "out/datastore").glob("keys-*"))
    for folder in ("datastore", "targets"):
        kept, want = (
            np.concatenate(shards(output / folder, "base"))
            for output in (tmp_path / "out", mixture.output)
        )
        assert np.array_equal(kept, want)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_gradient_equals_plain_autograd(mixture, share):
    settings = MemorySettings(dtype="float32", beta=0.3, **MIXTURE)
    batches = Batches(settings, mixture.output / "corpus", mixture.output / "targets")
    ours, plain = (AutoModelForCausalLM.from_pretrained(mixture.base).eval() for _ in range(2))
    blocks = np.array([1, len(batches.tokens) - 1, 0])
    rows = int(batches.rows[blocks].sum())
    sums = add_gradients(Spread(ours), batches, blocks, 1 / rows, ALL, settings, (), share)
    base = AutoModelForCausalLM.from_pretrained(mixture.base).eval()
    mixed = 0.0
    for b in blocks:
        tokens, position = batches.tokens[b].astype(np.int64), batches.positions[b]
        labels = tokens[1:][valid_rows(position[None])[0]]
        lengths, ids, probs = batches.reader.read(int(b), labels)
        targets = np.zeros((len(labels), plain.config.vocab_size))
        targets[np.repeat(np.arange(len(labels)), lengths), ids] = probs
        done, starts = 0, np.flatnonzero(position == 0)
        for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
            run = torch.from_numpy(tokens[start:stop])
            if len(run) < 2:
                continue
            n = torch.arange(len(run) - 1)
            log_q = plain(run[None, :-1]).logits[0].log_softmax(-1)
            with torch.no_grad():
                base_n = base(run[None, :-1]).logits[0].softmax(-1)[n, run[1:]]
            p = torch.from_numpy(targets[done : done + len(n)])
            done += len(n)
            kl = (torch.xlogy(p, p) - p * log_q).sum()
            ce = -log_q[n, run[1:]].sum()
            mix = -(0.7 * base_n + 0.3 * log_q[n, run[1:]].exp()).log().sum()
            ((0.3 * kl + 0.7 * ((1 - share) * ce + share * mix)) / rows).backward()
            mixed += float(mix.detach())
    assert float(sums[2]) == pytest.approx(mixed, rel=1e-5)
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() < GRADIENT, name
        assert b.grad.abs().max() > 10 * GRADIENT, name


def test_a_build_says_what_it_learns(mixture):
    """Cross-entropy at first; and the metrics hold the mixture's likelihood."""
    rows = read_metrics(mixture.output / "memory/logs/metrics.jsonl")
    assert all(0 < row["mixture"] < row["ce"] - np.log(0.3) for row in rows)
    assert rows[-1]["mixture"] < rows[0]["mixture"]
    manifest = json.loads((mixture.output / "memory/manifest.json").read_text())
    assert manifest["settings"]["mixture_alpha"] == 0.3
    datastore = json.loads((mixture.output / "datastore/manifest.json").read_text())
    assert datastore["settings"]["base_logprobs"] is True


def test_the_likelihood_takes_the_place_of_cross_entropy_over_a_share_of_the_steps():
    assert [mixture_share(s, 8, 0.5) for s in range(8)] == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert [mixture_share(s, 8, 0) for s in range(8)] == [1] * 8


def test_settings_of_before_have_the_hash_of_before(pipeline):
    """What came later is in a manifest only where it is used."""
    corpus = pipeline.output / "corpus"
    later = {"objective", "mixture_alpha", "mixture_ramp", "optimizer", "muon_learning_rate"}
    later.add("average_fraction")
    assert not later & recorded_settings(MemorySettings(), corpus).keys()
    used = MemorySettings(objective="mixture", optimizer="muon", average_fraction=0.1)
    assert later <= recorded_settings(used, corpus).keys()
    assert (
        "base_logprobs"
        not in json.loads((pipeline.output / "datastore/manifest.json").read_text())["settings"]
    )
    assert len(load_rows(corpus, "train")) > 10


@pytest.mark.parametrize(
    ("memory", "sentence"),
    [
        ({"mixture_alpha": 0.5}, "memory.mixture_alpha is for memory.objective mixture: set that"),
        ({"muon_learning_rate": 0.1}, "memory.muon_learning_rate is for memory.optimizer muon"),
        (
            {"objective": "mixture", "beta": 1},
            "memory.objective mixture weighs 1 - memory.beta",
        ),
        ({"optimizer": "muon", "parallel": "shard"}, "memory.optimizer muon needs whole matrices"),
        (
            {"average_fraction": 0.1, "early_stop": 1, "evaluate_steps": 1},
            "memory.average_fraction exports the mean of the last weights",
        ),
        ({"optimizer": "sgd"}, "memory.optimizer must be one of adamw, muon, got 'sgd'."),
    ],
)
def test_settings_that_do_not_go_together(memory, sentence):
    with pytest.raises(MemdecError) as error:
        parse_settings({"memory": memory})
    assert str(error.value).startswith(sentence)


def test_a_plan_counts_what_is_kept(mixture, memdec_here, quick, tmp_path):
    """And trains on it for some steps, as the build will."""
    config, report = tmp_path / "settings.yaml", tmp_path / "plan.json"
    config.write_text(json.dumps(quick({"memory": MIXTURE})))
    words = ("--base", mixture.base, "--corpus", mixture.corpus, "--config", config)
    code, _, said = memdec_here("plan", *words, "--ray-address", "none", "--json", report)
    assert code == 0, said
    stages = {stage["name"]: stage for stage in json.loads(report.read_text())["stages"]}
    for name, within in (("datastore", 0.1), ("targets", 0.4)):  # headers are not planned
        files = json.loads((mixture.output / name / "manifest.json").read_text())["files"]
        kept = sum(entry["bytes"] for entry in files.values())
        assert stages[name]["disk"] == pytest.approx(kept, rel=within), name
