"""The gate of `memdec calibrate`: it learns what there is to learn, and is served as trained."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from support.tiny_models import tiny_text
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_memdec.gate import FILE, Gate, features, gate_path, read_gate
from vllm_memdec.train.data.blocks import tokenise, unmarked
from vllm_memdec.train.data.documents import documents
from vllm_memdec.train.evaluation import gate_training as gates
from vllm_memdec.train.evaluation.explain import explain
from vllm_memdec.train.evaluation.gate_report import CLASSES, token_class
from vllm_memdec.train.evaluation.gate_texts import (
    KEPT,
    SWITCHES,
    Document,
    divide,
    in_turn,
    passages,
    read_texts,
)
from vllm_memdec.train.evaluation.gate_training import Rows, Scored, fit_gate, weights
from vllm_memdec.train.model.huggingface import load_model, load_tokenizer
from vllm_memdec.train.model.scoring import mix, perplexity
from vllm_memdec.train.progress import Progress

WIDTH = 24
PROMPT = "You may reproduce and distribute copies of the Work, bagi duto mela"


def scored(rows, seed, of):
    """Return rows of which one feature says which model is right: by its sign, or how large it is.

    of: "seen", a direction of the hidden state, how "sure" the memory is, by top probability and
    entropy, or the position. They lie far from the origin and are small: whoever forgets to
    normalise misses them.
    """
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(rows, WIDTH + 3)) * np.logspace(-2, 2, WIDTH + 3) + 5
    hidden[:, -3:-1] = rng.uniform((0, 3), (1, 3.1), (rows, 2))
    position = rng.integers(0, 1024, rows)
    hidden[:, -1] = np.log1p(position)
    right = {
        "seen": hidden[:, 0] > 5,
        "sure": abs(hidden[:, -3] - 0.5) < 0.25,
        "context": position < 256,
    }[of]
    good, bad = np.log(rng.uniform(0.3, 0.9, rows)), np.log(rng.uniform(1e-4, 1e-2, rows))
    return Scored(
        np.where(right, bad, good),
        np.where(right, good, bad),
        torch.from_numpy(hidden).float(),
        np.zeros(rows, int),
        position,
    ), right


@pytest.mark.parametrize("of", ["seen", "sure", "context"])
def test_it_learns_who_is_right(of):
    (train, _), (test, right) = scored(8000, 0, of), scored(2000, 1, of)
    arrays = fit_gate({"domain": train})
    alpha_N = weights(arrays, test)
    assert ((alpha_N > 0.5) == right).mean() > 0.95
    best = perplexity(np.maximum(test.base_N, test.memory_N))
    assert perplexity(mix(test.base_N, test.memory_N, alpha_N)) < 1.25 * best
    for one, two in zip(arrays.values(), fit_gate({"domain": train}).values(), strict=True):
        assert np.array_equal(one, two)  # the same text gives the same gate


def test_the_amount_of_text_has_no_weight(monkeypatch):
    """A little text of the domain is not drowned by much other text."""
    monkeypatch.setattr(gates, "WEIGHTS", {"domain": 1.0, "general": 3.0})
    rng = np.random.default_rng(0)

    def text(rows, base, memory):
        hidden = torch.from_numpy(rng.normal(size=(rows, WIDTH + 3))).float()  # that says nothing
        same = [np.full(rows, np.log(p)) for p in (base, memory)]
        return Scored(*same, hidden, np.zeros(rows, int), np.zeros(rows, int))

    texts = {"domain": text(300, 0.1, 0.9), "general": text(30000, 0.9, 0.1)}
    alpha_N = weights(fit_gate(texts), text(1000, 0.5, 0.5))
    # Where 1 part in 4 is the memory's: the maximum of log(.1 + .8 a) + 3 log(.9 - .8 a).
    assert abs(alpha_N.mean() - 0.1875) < 0.1


def test_each_length_of_context_has_the_same_weight():
    """Short ones have few rows of a window, and most requests."""
    position = np.r_[np.zeros(1000, int), np.full(9000, 100), np.full(64, 600)]
    weight = gates.even(position)
    first, second, few = (weight[torch.from_numpy(position == p)].sum() for p in (0, 100, 600))
    assert float(first) == pytest.approx(float(second), rel=1e-3)
    assert float(few) == pytest.approx(float(first) / 4, rel=1e-3)  # 64 rows of the 256
    assert float(weight.sum()) == pytest.approx(1, rel=1e-4)


def test_passages_take_turns():
    first = [list(range(100 * n, 100 * n + 90)) for n in range(4)]
    second = [list(range(1000, 2000))]
    first, second = passages(first, 5, 20), passages(second, 5, 20)
    texts = [ids.tolist() for ids in in_turn(first, second)]
    assert len(texts) > 5 and texts == [ids.tolist() for ids in in_turn(first, second)]
    for ids in map(list, texts):
        runs = [list(run) for _, run in itertools.groupby(ids, key=lambda i: i < 1000)]
        assert len(runs) == SWITCHES and runs[0][0] < 1000
        assert all(run == list(range(run[0], run[0] + len(run))) for run in runs)
        assert all(1 <= len(run) <= 20 for run in runs)
    seen = [i for ids in texts for i in ids]
    assert len(seen) == len(set(seen))


def test_rows_of_several_texts_are_those_of_one():
    parts = [torch.randn(n, 5) + n for n in (3, 1, 40)]
    rows, whole = Rows(parts), torch.cat(parts)
    chosen = torch.tensor([43, 0, 3, 2, 4, 3])
    assert torch.equal(rows[chosen], whole[chosen]) and len(rows) == 44
    std, mean = torch.std_mean(whole, 0, correction=0)
    assert torch.allclose(rows.normal()[0], mean, atol=1e-5)
    assert torch.allclose(rows.normal()[1], std, atol=1e-5)


def test_what_is_kept_is_trained_on_in_no_guise():
    """Not among passages in turn, and not as a document of another kind."""

    def text(first, count):
        return [
            Document(hash(n), np.arange(100 * n, 100 * n + 90)) for n in range(first, first + count)
        ]

    texts = {"domain": text(0, 60), "corpus": text(30, 90), "general": text(500, 100)}
    trained, kept = divide(texts)
    sides = [
        {int(i) for ids in side.values() for part in ids for i in part} for side in (trained, kept)
    ]
    assert not sides[0] & sides[1]
    for side in (trained, kept):
        assert set(side) == {*texts, "in turn"} and all(side.values())
    for kind, of_kind in texts.items():
        assert len(kept[kind]) >= len(of_kind) / KEPT
        assert len(trained[kind]) + len(kept[kind]) == len(of_kind)


def test_bos_is_not_within_a_request():
    """Documents begin with it, passages of them stand in the middle of a request.

    In chats of which answers are predicted alone it is marked.
    """
    bos = 7
    texts = {
        kind: [
            Document(hash(n), np.r_[(bos, ~bos)[n % 2], np.arange(100 * n, 100 * n + 90)])
            for n in numbers
        ]
        for kind, numbers in (("domain", range(1, 60)), ("general", range(500, 600)))
    }
    for side in divide(texts, bos):
        assert side["in turn"] and not any((unmarked(ids) == bos).any() for ids in side["in turn"])
        assert all(unmarked(ids)[0] == bos for ids in side["domain"])


def test_few_documents_are_divided_in_pieces(pipeline, tmp_path):
    text = tmp_path / "book.txt"
    text.write_text(tiny_text(3, 3000))
    tokenizer = load_tokenizer(pipeline.base)
    pieces = read_texts(tokenizer, text)
    whole = np.concatenate(list(tokenise(tokenizer, documents(text))))
    assert np.array_equal(np.concatenate([d.ids for d in pieces]), whole)
    assert len(pieces) >= 4 * KEPT and len({d.digest for d in pieces}) == len(pieces)


def test_classes():
    texts = {" word": 0, "ing": 1, " 1906": 2, "7": 2, ",": 3, " (": 3, "\n": 4, ".\n": 4, "": 3}
    assert {text: token_class(text) for text in texts} == texts


@pytest.fixture(scope="module")
def calibrated(pipeline, tmp_path_factory, english, jsonl, memdec_here):
    """Return (exit code, what was said, report, memory's folder) of the command on tiny models."""
    folder = tmp_path_factory.mktemp("calibrated")
    memory, report = folder / "memory", folder / "report.json"
    shutil.copytree(pipeline.output / "export", memory)
    domain = jsonl(folder / "domain.jsonl", english(60, seed=7))
    general = folder / "general.txt"
    general.write_text(tiny_text(3, 6000))
    code, out, err = memdec_here(
        "calibrate", memory, "--base", pipeline.base, "--domain", domain, "--general", general,
        "--corpus", domain, "--json", report,
    )  # fmt: skip
    return code, out + err, json.loads(report.read_text()) if report.exists() else None, memory


def test_the_command(calibrated, pipeline):
    code, said, report, memory = calibrated
    assert code == 0, said
    domain, general = report["texts"]["domain"], report["texts"]["general"]
    for text in (domain, general):  # never far from the better of base and memory
        assert text["gate"] < 1.02 * min(text["curve"])
    assert domain["fixed"] == min(domain["curve"])
    assert report["texts"]["corpus"]["gate"] < 1.02 * min(report["texts"]["corpus"]["curve"])
    for text in report["texts"].values():
        rows = text["by_context"]
        assert sum(row["tokens"] for row in rows) == text["tokens"]
        assert rows[0]["from"] == 0 and max(row["to"] for row in rows) >= 256
        assert all(row["gate"] < 1.03 * row["base"] for row in rows)
    for text in (domain, general):
        assert set(text["alpha_by_class"]) <= set(CLASSES)
        assert text["curve"][0] == text["base"]
    assert "mean alpha" in said
    assert (memory / FILE).with_suffix(".png").stat().st_size > 10_000
    assert not list(memory.glob("*.tmp"))


def test_served_as_trained(calibrated):
    """What is written gives the weights that the report was made with."""
    arrays = read_gate(gate_path(str(calibrated[-1])))
    h_ND, logits_NV = torch.randn(5, arrays["w1"].shape[1]), torch.randn(5, 70) * 4
    position_N = torch.tensor([0, 3, 60, 200, 10**6])
    logits_NV[0, 3:] = -torch.inf
    w1, b1, w2, b2, certainty = (
        torch.from_numpy(arrays[n]).double() for n in ("w1", "b1", "w2", "b2", "certainty")
    )
    p_NV = logits_NV.double().softmax(-1)
    sure_N2 = torch.stack([p_NV.amax(-1), torch.distributions.Categorical(p_NV).entropy()], -1)
    gelu = torch.nn.functional.gelu
    max_position = int(arrays["longest"])
    assert 32 < max_position < 10**6
    context_N = (1 + position_N.clamp(max=max_position).double()).log()
    x_NH = h_ND.double() @ w1.T + b1 + context_N[:, None] * torch.from_numpy(arrays["context"])
    score_N = gelu(x_NH) @ w2 + b2
    score_N += gelu(sure_N2 @ certainty[:2] + certainty[2]) @ certainty[3]
    wanted_N = (0.999 * score_N.sigmoid()).float()
    assert torch.allclose(Gate(arrays)(features(h_ND, logits_NV, position_N)), wanted_N, atol=1e-5)


def test_of_several_texts_all_are_read(pipeline, tmp_path, english, jsonl, monkeypatch):
    """Where there is more than is read, the first text is not all of it."""
    texts = [jsonl(tmp_path / "a.jsonl", english(60)), tmp_path / "b.txt"]
    texts[1].write_text(tiny_text(3, 3000))
    model, tokenizer = load_model(pipeline.base, "float32"), load_tokenizer(pipeline.base)
    monkeypatch.setattr(gates, "read_windows", lambda *args: args[3].tokens)
    monkeypatch.setattr(gates, "window_logprobs", lambda *args: None)
    ids = [d.ids for path in texts for d in read_texts(tokenizer, path)]
    windows = gates.score((model, model), tokenizer, 32, ids, 960, "general", Progress())
    read = [tokenizer.decode(window) for window in windows]
    assert sum(map(len, windows)) < 1000
    assert any("License" in text or "Work" in text for text in read[: len(read) // 4])
    assert any(word in read[-1] for word in texts[1].read_text().split())


def test_a_short_text_is_enough(pipeline, tmp_path, memdec_here, jsonl):
    """Lines too short to make passages of are not refused for want of passages."""
    memory = tmp_path / "memory"
    shutil.copytree(pipeline.output / "export", memory)
    text = jsonl(tmp_path / "lines.jsonl", [tiny_text(n, 2) for n in range(150)])
    words = ("--base", pipeline.base, "--domain", text, "--general", text)
    code, out, err = memdec_here("calibrate", memory, *words)
    assert code == 0, out + err


def test_bad_input(pipeline, tmp_path, memdec_here):
    text = tmp_path / "text.txt"
    text.write_text("too short")
    memory = pipeline.output / "export"
    for words, sentence in (
        ((memory, "--domain", text, "--general", text), " tokens: give more of it"),
        ((memory, "--domain", "nowhere.txt", "--general", text), "nowhere.txt does not exist"),
        (("nowhere", "--domain", text, "--general", text), "nowhere is not a folder"),
        (("/sys", "--domain", text, "--general", text), "no permission for /sys"),
    ):
        code, out, err = memdec_here("calibrate", *words, "--base", pipeline.base)
        assert code == 1 and sentence in " ".join((out + err).split()), out + err
    assert gate_path(str(memory)) is None


@torch.inference_mode()
def test_explain_shows_the_weights(calibrated, pipeline):
    """Each token's weight is the gate's, and the mixture is made with it."""
    memory = str(calibrated[-1])
    tokenizer = AutoTokenizer.from_pretrained(memory)
    model = AutoModelForCausalLM.from_pretrained(memory, dtype=torch.float32)
    explanations = {
        cap: explain(pipeline.base, memory, PROMPT, cap, write=0) for cap in (None, 0.3)
    }
    ids = tokenizer(PROMPT)["input_ids"]
    read = model(torch.tensor([ids]), output_hidden_states=True)
    position_T = torch.arange(len(ids))
    features_TF = features(read.hidden_states[-1][0], read.logits[0], position_T)
    alpha_T = Gate(read_gate(gate_path(memory)))(features_TF)[:-1].tolist()
    for cap, explanation in explanations.items():
        assert explanation.gated
        wanted = [min(alpha, cap or 1.0) for alpha in alpha_T]
        assert [token.alpha for token in explanation.tokens] == pytest.approx(wanted, abs=1e-5)
        for token in explanation.tokens:
            mixture = token.alpha * token.memory + (1 - token.alpha) * token.base
            assert token.mixture == pytest.approx(mixture, rel=1e-3, abs=1e-9)
    assert max(alpha_T) - min(alpha_T) > 0.01
