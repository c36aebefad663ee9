"""`memdec explain` against both models in float64, one token after the other."""

import json

import pytest
import torch
from rich.console import Console
from support.html_page import Reading
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_memdec.checkpoint import read_block
from vllm_memdec.kernels import interpolate
from vllm_memdec.train.evaluation import explain as explaining
from vllm_memdec.train.evaluation.explain import explain

PROMPT = "Licensed under the <b>Apache</b> License — «naïve» 漢字 🙂, unless required by law"


@pytest.fixture(autouse=True)
def users_mixture(monkeypatch):
    monkeypatch.setattr(interpolate, "INTERPRETED", False)


def probabilities(folder, ids, width):
    """Return p of every next id [T, width] in float64, what lies beyond the width cut off."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.inference_mode():
        logits_TW = model(torch.tensor([ids])).logits[0, :, :width]
    p_TW = logits_TW.softmax(-1)
    return torch.nn.functional.pad(p_TW, (0, width - p_TW.shape[1]))


@pytest.mark.parametrize("vocab", [1000, 1100])
def test_equals_both_models_in_float64(tiny_model, vocab, monkeypatch):
    monkeypatch.setattr(explaining, "CHUNK", 7)
    base = tiny_model("llama", spread=0.15)
    memory = tiny_model("gpt2", vocab=vocab, spread=0.15)
    explanation = explain(base, memory, PROMPT, 0.3, write=9)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(PROMPT)["input_ids"]
    known = len(ids)
    assert [token.written for token in explanation.tokens] == [False] * (known - 1) + [True] * 9
    for step, token in enumerate(explanation.tokens):
        if step + 1 == len(ids):  # what the mixture writes is its likeliest token
            p_V = (
                0.7 * probabilities(base, ids, 1000)[-1]
                + 0.3 * probabilities(memory, ids, 1000)[-1]
            )
            ids.append(int(p_V.argmax()))
            assert token.written
    base_TV, memory_TV = (probabilities(folder, ids, 1000) for folder in (base, memory))
    for row, token in enumerate(explanation.tokens):
        p_base, p_memory = (float(p[row, ids[row + 1]]) for p in (base_TV, memory_TV))
        mixture = 0.7 * p_base + 0.3 * p_memory
        assert (token.base, token.memory) == pytest.approx((p_base, p_memory), rel=1e-3, abs=1e-9)
        assert token.mixture == pytest.approx(mixture, rel=1e-3)
        assert token.share == pytest.approx(0.3 * p_memory / mixture, rel=1e-3)
        assert token.decided == ("memory" if 0.3 * p_memory > 0.7 * p_base else "base")
        assert token.base_says == tokenizer.decode([int(base_TV[row].argmax())])
    text = explanation.first + "".join(token.text for token in explanation.tokens)
    assert text.replace("…", "").startswith(PROMPT)


def test_alpha_is_the_memorys_own_and_its_extremes_are_one_model(pipeline):
    base, memory = pipeline.base, str(pipeline.output / "export")
    assert explain(base, memory, "under the License", write=1).alpha == read_block(memory).alpha
    for alpha, decided in ((0, "base"), (1, "memory")):
        tokens = explain(base, memory, "under the License", alpha, write=4).tokens
        assert {token.decided for token in tokens} == {decided}
        assert all(t.mixture == pytest.approx(getattr(t, decided), rel=1e-5) for t in tokens)
    same = [explain(base, base, "under the License", a, write=8) for a in (0, 0.4, 1)]
    assert len({tuple(token.text for token in explanation.tokens) for explanation in same}) == 1


def test_page_holds_the_text_and_nothing_to_fetch(pipeline, tmp_path, memdec_here):
    page, figures = tmp_path / "page.html", tmp_path / "figures.json"
    code, out, err = memdec_here(
        "explain", PROMPT, "--base", pipeline.base, "--memory", pipeline.output / "export",
        "--html", page, "--json", figures,
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(figures.read_text())
    reading = Reading()
    reading.feed(page.read_text(encoding="utf-8"))
    assert reading.text == report["first"] + "".join(token["text"] for token in report["tokens"])
    assert not reading.fetched and not reading.inside
    assert len(reading.cells) >= 6 * len(report["tokens"])
    assert out.count("memory") + out.count("base") > len(report["tokens"])


def test_square_brackets_are_no_markup(pipeline):
    console = Console(record=True, width=200)
    explanation = explain(pipeline.base, str(pipeline.output / "export"), "[bold] [/] x", write=0)
    explaining.show(explanation, console)
    printed = console.export_text()
    assert sum(printed.count(sign) for sign in "[]") >= 4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": ""}, "the text is empty"),
        ({"--alpha": "1.5"}, "--alpha must be a number between 0 and 1, got 1.5."),
        ({"--alpha": "nan"}, "--alpha must be a number between 0 and 1, got nan."),
        ({"--memory": "OTHER"}, "has no memdec block, so no default weight"),
        ({"--memory": "OTHER", "--alpha": "0.5"}, "has another tokenizer than the base"),
        ({"--memory": "nowhere"}, "nowhere is not a model folder"),
        ({"--base": "nowhere"}, "nowhere is not a folder: check the path"),
        ({"--html": "nowhere/page.html"}, "nowhere is no folder: create it, or check --html."),
        ({"--html": "."}, ". is a folder: give --html a file."),
        ({"--tokens": "300"}, "positions: give less text, or a smaller --tokens."),
    ],
)
def test_bad_input(pipeline, tiny_model, memdec_here, changes, says):
    options = {"--base": pipeline.base, "--memory": pipeline.output / "export"} | changes
    prompt = options.pop("prompt", "under the License")
    other = tiny_model("llama", tokenizer=3)
    words = [word for pair in options.items() for word in pair]
    code, _, err = memdec_here("explain", prompt, *(other if w == "OTHER" else w for w in words))
    assert code == 1 and says in err and len(err.strip().splitlines()) == 1, err
