"""Gates of several memories: they decide together as the definition says, and are trained to."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.gate_oracle import gelu, random_gate
from support.tiny_models import tiny_text

from vllm_memdec.gate import FILE, gate_path, read_gate, write_gate
from vllm_memdec.train.evaluation import gate_together as joint
from vllm_memdec.train.evaluation import gate_training
from vllm_memdec.train.evaluation.gate_texts import SWITCHES, Document, divide, in_turn
from vllm_memdec.train.evaluation.gate_training import (
    Net,
    Rows,
    Scored,
    fit_gate,
    fit_gates,
    mixture,
    weights,
)
from vllm_memdec.train.model.scoring import mix

WIDTHS = 24, 40
ERROR = 1e-4  # of log p: gates are float32, scores of random ones reach 20


@pytest.fixture(autouse=True, scope="module")
def few_steps():
    """Train for a third of the steps: what there is to learn is plain."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate_training, "STEPS", 200)
        yield


def read(rows, right, seed, D, memory=None):
    """Return rows of a memory that is right where it says so, in its first feature."""
    rng = np.random.default_rng(seed)
    x_NF = rng.normal(size=(rows, D + 3))
    x_NF[:, 0] = np.where(right, 2, -2) + rng.normal(size=rows) / 4
    x_NF[:, -3:-1] = rng.uniform((0, 3), (1, 3.1), (rows, 2))
    position_N = rng.integers(0, 1024, rows)
    x_NF[:, -1] = np.log1p(position_N)
    good, bad = np.log(rng.uniform(0.3, 0.9, rows)), np.log(rng.uniform(1e-4, 1e-2, rows))
    base_N = np.log(np.random.default_rng(99).uniform(0.02, 0.1, rows))
    memory_N = np.where(right, good, bad) if memory is None else memory
    return Scored(base_N, memory_N, torch.from_numpy(x_NF).float(), np.zeros(rows, int), position_N)


def defined(gates, parts):
    """Return log p [N] of memories that decide together, one row after the other, in float64."""
    found = []
    for n in range(len(parts[0].base_N)):
        p, rest = math.exp(parts[0].base_N[n]), 1.0
        for gate, part in zip(gates, parts, strict=True):
            x_F = part.features_NF[n].double()
            g = {k: torch.from_numpy(np.asarray(v)).double() for k, v in gate.items()}
            context = min(float(x_F[-1]), math.log1p(float(g["longest"])))
            seen_H = gelu(g["w1"] @ x_F[:-3] + g["context"] * context + g["b1"])
            top_K, entropy_K, bias_K, out_K = g["certainty"]
            sure_K = gelu(x_F[-3] * top_K + x_F[-2] * entropy_K + bias_K)
            z = float(seen_H @ g["w2"] + g["b2"] + sure_K @ out_K)
            b = 0.999 / (1 + math.exp(-(z + math.log(rest))))
            p = (1 - b) * p + b * math.exp(part.memory_N[n])
            rest *= 1 - b
        found.append(math.log(p))
    return np.array(found)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_they_decide_as_defined(count):
    gates = [random_gate(D, seed) for seed, D in enumerate((*WIDTHS, 8)[:count])]
    parts = [read(300, np.arange(300) % 3 == n, n, len(g["w1"][0])) for n, g in enumerate(gates)]
    assert np.abs(joint.together(gates, parts) - defined(gates, parts)).max() < ERROR


def test_one_memory_decides_by_its_gate():
    gate, part = random_gate(24, 0), read(300, np.arange(300) % 2 == 0, 0, 24)
    alone_N = mix(part.base_N, part.memory_N, weights(gate, part))
    assert np.abs(joint.together([gate], [part]) - alone_N).max() < 1e-5  # a float32 sigmoid's
    assert np.array_equal(joint.alone(gate, part), alone_N)


def test_together_they_are_a_softmax_up_to_the_largest_share():
    score_N = [torch.linspace(-3, 3, 50).double(), torch.linspace(2, -4, 50).double()]
    logp_N = [torch.full((50,), math.log(p)).double() for p in (0.1, 0.5, 0.9)]
    zero_N = torch.zeros(50).double()
    share_NK = torch.stack([zero_N, *score_N], -1).softmax(-1)
    wanted_N = (share_NK * torch.tensor([0.1, 0.5, 0.9]).double()).sum(-1).log()
    assert (mixture(logp_N[0], logp_N[1:], score_N) - wanted_N).abs().max() < 2e-3
    # However sure two are, the base keeps a millionth, and nothing is NaN.
    sure = [torch.full((50,), 1e4).double()] * 2
    gone = mixture(zero_N, [torch.full((50,), -torch.inf).double()] * 2, sure)
    assert torch.allclose(gone, torch.full((50,), math.log(1e-6)).double(), atol=1e-9)


def test_what_is_trained_is_what_is_defined():
    """The loss's mixture differs from the definition by what keeps its gradient finite alone."""
    gates = [random_gate(D, seed) for seed, D in enumerate(WIDTHS)]
    parts = [read(300, np.arange(300) % 3 == n, n, D) for n, D in enumerate(WIDTHS)]
    nets, rows = [], [Rows([part.features_NF]) for part in parts]
    for gate, of in zip(gates, rows, strict=True):
        nets.append(Net.of(gate | {"longest": np.array(10**6)}, of.normal()).eval())
    with torch.inference_mode():
        scores = [
            net((of.parts[0] - of.normal()[0]) / of.normal()[1])
            for net, of in zip(nets, rows, strict=True)
        ]
        base_N, *memory = (torch.from_numpy(x).float() for x in (
            parts[0].base_N, *(part.memory_N for part in parts)))  # fmt: skip
        trained_N = mixture(base_N, memory, scores, floor=1e-6).numpy()
    far = [gate | {"longest": np.array(10**6)} for gate in gates]
    wanted_N = defined(far, parts)
    assert (np.abs(trained_N - wanted_N) < ERROR + 3e-6 / np.exp(wanted_N)).all()


def test_a_gate_that_training_starts_from_is_taken_over():
    gate, part = random_gate(24, 0) | {"longest": np.array(10**6)}, read(300, True, 0, 24)
    normal = Rows([part.features_NF]).normal()
    arrays = Net.of(gate, normal).requires_grad_(False).arrays(*normal)
    again = weights(arrays | {"longest": gate["longest"]}, part)
    assert np.abs(again - weights(gate, part)).max() < ERROR


def scene(seed):
    """Return what two memories give to their domains and to general text.

    Each knows its domain. The second says so in the first one's domain too, of which its gate,
    trained alone, has read nothing, and is wrong there.
    """
    kinds = ["law, domain", "medicine, domain", "general"]
    own = [np.full(1000, kind == k) for k in kinds[:2] for kind in kinds]
    claims = [*own[:3], np.full(1000, True), *own[4:]]
    found = []
    for n, D in enumerate(WIDTHS):
        of = {}
        for k, kind in enumerate(kinds):
            part = read(1000, own[3 * n + k], 10 * seed + 3 * n + k, D)
            claimed = read(1000, claims[3 * n + k], 10 * seed + 3 * n + k, D, part.memory_N)
            of[kind] = claimed
        found.append(of)
    return found


def test_training_together_mends_what_gates_trained_alone_cannot_know():
    members = [joint.Member(name, Path(name)) for name in ("law", "medicine")]
    trained, kept = scene(1), scene(2)
    olds = [fit_gate(member.own(of)) for member, of in zip(members, trained, strict=True)]
    gates = joint.fit_together(members, trained, olds)
    told = joint.report_on(members, kept, olds, gates)["texts"]
    assert told["law, domain"]["before"] > 1.1 * told["law, domain"]["oracle"]
    assert told["general"]["oracle"] == told["general"]["base"]
    for row in told.values():
        assert row["gap"] < 0.02
    for name in ("law", "medicine"):  # each gate can still be served alone
        row = told[f"{name}, domain"]
        assert row["new"][name] < 1.05 * row["old"][name]


def test_of_one_memory_the_training_is_that_of_one():
    [of] = scene(1)[:1]
    texts = {"domain": of["law, domain"], "general": of["general"]}
    one = fit_gate(texts)
    [two] = fit_gates([texts], {"domain": 1.0, "general": 6.0})
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_passages_of_three_kinds_follow_each_other_in_every_order():
    kinds = [[np.full(16, n)] * 60 for n in range(3)]
    runs = [[int(i) for i in ids[::16]] for ids in in_turn(*kinds)]
    assert all(len(run) == SWITCHES for run in runs)
    follows = {(a, b) for run in runs for a, b in zip(run, run[1:], strict=False)}
    assert {(a, b) for a in range(3) for b in range(3) if a != b} <= follows


def test_gates_are_written_all_or_none(tmp_path, monkeypatch):
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    write_gate(folders[0], random_gate(8, 0))
    write_gate(folders[2], random_gate(8, 2))
    before = [gate_path(str(f)) and gate_path(str(f)).read_bytes() for f in folders]
    new = [random_gate(8, seed) for seed in (3, 4, 5)]

    def failing(at):
        replace, calls = Path.replace, []

        def fail(path, target):
            calls.append(target)
            if len(calls) == at:
                raise OSError("the disk is full")
            return replace(path, target)

        return fail

    # Each writes its file and gives it its name, and then each takes its place.
    for at in range(1, 7):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
            patch.setattr(Path, "replace", failing(at))
            joint.write_gates(folders, new)
        now = [(f / FILE).read_bytes() if (f / FILE).exists() else None for f in folders]
        assert now == before, at
        assert {p.name for f in folders for p in f.iterdir()} == {FILE}
    joint.write_gates(folders, new)
    for folder, gate in zip(folders, new, strict=True):
        assert np.array_equal(read_gate(folder / FILE)["b2"], gate["b2"])
        assert [p.name for p in folder.iterdir()] == [FILE]


@pytest.fixture(scope="module")
def memories(pipeline, tiny_model, tmp_path_factory, english, jsonl):
    """Return two memories of different widths, only the first with a gate, and their texts."""
    folder = tmp_path_factory.mktemp("memories")
    first = shutil.copytree(pipeline.output / "export", folder / "law/export")
    write_gate(first, random_gate(64, 0))
    other = shutil.copytree(tiny_model("llama", seed=5, hidden=32), folder / "other")
    texts = [jsonl(folder / "law.jsonl", english(60, seed=7)), folder / "other.txt"]
    texts[1].write_text(tiny_text(8, 4000))
    general = folder / "general.txt"
    general.write_text(tiny_text(3, 6000))
    return [first, other], texts, general


def test_the_command(memories, pipeline, tmp_path, memdec_here):
    folders, texts, general = memories
    report = tmp_path / "report.json"
    old = gate_path(str(folders[0])).read_bytes()
    code, out, err = memdec_here(
        "calibrate", *folders, "--base", pipeline.base, "--domain", texts[0], "--domain", texts[1],
        "--corpus", pipeline.corpus, "--corpus", texts[1], "--general", general, "--json", report,
    )  # fmt: skip
    said = " ".join((out + err).split())
    assert code == 0, said
    assert "other has no gate: one is trained for it alone first." in said
    assert "law has no gate" not in said
    told = json.loads(report.read_text())
    kinds = {f"{name}, {of}" for name in ("law", "other") for of in ("domain", "corpus")}
    assert set(told["texts"]) == kinds | {"general", "in turn"}
    for kind, row in told["texts"].items():
        assert set(row["old"]) == {"law", "other"} and row["tokens"] > 30
        assert row["together"] < 1.1 * min(row["base"], row["before"]), kind
    assert told["texts"]["general"]["oracle"] == told["texts"]["general"]["base"]
    own = told["texts"]["law, domain"]
    assert own["oracle"] == own["old"]["law"]
    assert told["texts"]["in turn"]["oracle"] is None
    for folder, name, width in zip(folders, ("law", "other"), (64, 32), strict=True):
        gate = read_gate(gate_path(str(folder)), width)
        assert gate["memory"].shape == ()  # the fingerprint of its weights
        assert (folder / FILE).with_suffix(".png").stat().st_size > 10_000
        alone = told["alone"][name]["texts"]
        assert alone["domain"]["gate"] == told["texts"][f"{name}, domain"]["new"][name]
    assert gate_path(str(folders[0])).read_bytes() != old
    assert "gap" in said and "oracle" in said


def test_bad_input(memories, pipeline, tiny_model, tmp_path, memdec_here):
    (first, other), texts, general = memories
    before = [gate_path(str(f)) and gate_path(str(f)).read_bytes() for f in (first, other)]
    copy = shutil.copytree(first, tmp_path / "copy")
    foreign = tiny_model("llama", seed=5, tokenizer=1)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    one, two = ("--domain", texts[0]), ("--domain", texts[1])
    for words, sentence in (
        ((first, other, *one), "2 memories and 1 --domain: give one for each memory, in their"),
        ((first, other, *one, *two, "--corpus", texts[0]), "2 memories and 1 --corpus: give one"),
        ((first, first, *one, *two), "are one memory: give each once."),
        ((first, f"{first}/", *one, *two), "are one memory: give each once."),
        ((first, copy, *one, *two), "are one memory: give each once."),
        ((first, foreign, *one, *two), "has another tokenizer than the base"),
        ((first, other, *one, "--domain", short), "the other, domain text has 7 tokens: give more"),
        ((first, "nowhere", *one, *two), "nowhere is not a folder"),
    ):
        rest = "--base", pipeline.base, "--general", general
        code, out, err = memdec_here("calibrate", *words, *rest)
        assert code == 1 and sentence in " ".join((out + err).split()), out + err
    now = [gate_path(str(f)) and gate_path(str(f)).read_bytes() for f in (first, other)]
    assert now == before


def test_memories_of_builds_are_told_apart_by_their_builds(tmp_path):
    for name in ("a/law/export", "a/export", "b/law"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)

    def names(*of):
        return [member.name for member in joint.members_of([str(tmp_path / n) for n in of])]

    assert names("a/law/export", "a/export") == ["law", "a"]
    assert names("a/law/export", "b/law") == [f"{tmp_path}/a/law/export", f"{tmp_path}/b/law"]


def test_mixed_documents_are_of_all_domains():
    texts = {
        kind: [Document(hash((kind, n)), np.full(90, k)) for n in range(40)]
        for k, kind in enumerate(("law, domain", "medicine, domain", "general"))
    }
    for side in divide(texts, mixed=list(texts)):
        assert {int(i) for ids in side["in turn"] for i in ids} == {0, 1, 2}
        assert any(len(set(ids.tolist())) == 3 for ids in side["in turn"])
