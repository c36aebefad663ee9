"""`memdec explain --sources` against a search of all keys in float64, a document at a time."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.html_page import Reading

from vllm_memdec.train.data.artifacts import json_sha256
from vllm_memdec.train.data.places import Places
from vllm_memdec.train.data.shards import shards
from vllm_memdec.train.evaluation import sources as finding
from vllm_memdec.train.evaluation.sources import Sources
from vllm_memdec.train.executor.context import Context
from vllm_memdec.train.model.hidden_states import hidden_states
from vllm_memdec.train.model.huggingface import load_model
from vllm_memdec.train.pipeline import build as run
from vllm_memdec.train.settings import parse_settings

CLOSE = 1e-3  # of a weight: keys are of fp16, and a text is read alone, not in a block
UNSAFE = "Warranty <script>alert('1 & 2')</script> of [bold] any <b>kind</b>, either express"


def document_rows(places, least):
    """Return the rows of a document of some length, from its first on, that are in one block."""
    document_N = places.documents(np.arange(places.first_rows[-1]))
    block_N, column_N = places.labels(np.arange(len(document_N)))
    for document in range(1, document_N.max()):
        rows = np.flatnonzero(document_N == document)
        rows = rows[block_N[rows] == block_N[rows[0]]]
        before = column_N[rows[0]] - 1  # its first token, which is no label
        starts = before > 0 and places.positions[int(block_N[rows[0]])][before] == 0
        if starts and len(rows) >= least:
            return rows
    raise AssertionError("no document fits")


def by_hand(build, row):
    """Return {document: (says the label, weight)} of a row's nearest keys, in float64."""
    keys = np.concatenate([*shards(build / "datastore", "keys")]).astype(np.float64)
    labels = np.concatenate([*shards(build / "datastore", "labels")])
    kernel = json.loads((build / "targets/targets.json").read_text())
    distances = ((keys - keys[row]) ** 2).sum(axis=1)
    nearest = np.argsort(distances, kind="stable")[: kernel["neighbours"]]
    weights = np.exp(-distances[nearest] / kernel["temperature"])
    weights /= weights.sum()
    documents = Places(build / "corpus").documents(nearest)
    found = {}
    for document in set(documents.tolist()):
        mine = documents == document
        same = mine & (labels[nearest] == labels[row])
        found[document] = bool(same.any()), weights[same if same.any() else mine].sum()
    return found


def test_equals_a_search_of_all_keys(pipeline):
    sources = Sources(pipeline.output, pipeline.base)
    rows = document_rows(sources.places, 12)
    passage = sources.places.passage(int(rows[0]), 1, len(rows) - 1)
    ids, decided = passage.ids, list(range(1, len(rows) + 1))
    several = 0
    for row, found in zip(rows.tolist(), sources.of(ids, decided), strict=True):
        expected = by_hand(pipeline.output, row)
        ranked = sorted(expected.values(), reverse=True)[:3]
        assert [(s.agrees, s.weight) for s in found] == [
            (agrees, pytest.approx(weight, abs=CLOSE)) for agrees, weight in ranked
        ]
        for source in found:
            agrees, weight = expected[source.document - 1]
            assert (source.agrees, source.weight) == (agrees, pytest.approx(weight, abs=CLOSE))
        several += len(found) > 1
        text = sources.tokenizer.decode(ids, skip_special_tokens=True)
        own = [s for s in found if s.document - 1 == sources.places.documents(rows)[0]]
        assert own and own[0].agrees  # a corpus's own text comes from where it stands
        [said] = [span for span in own[0].passage if span.said]
        assert said.shared and said.text in text
        whole = "".join(span.text for span in own[0].passage)
        line = int(re.fullmatch(r"corpus\.jsonl, line (\d+)", own[0].name)[1])
        assert whole in json.loads(pipeline.corpus.read_text().splitlines()[line - 1])["text"]
    assert several


def compared(build, base, ids, **options):
    """Return sources as comparable numbers."""
    found = Sources(build, base, **options).of(ids, list(range(1, len(ids))))
    return [[(s.document, s.agrees, round(s.weight, 3), s.passage) for s in each] for each in found]


@pytest.fixture(scope="module")
def text_ids(pipeline):
    """Return the ids of a text that no document has word for word, shorter than a block."""
    tokenizer = Sources(pipeline.output, pipeline.base).tokenizer
    return tokenizer("unless required by applicable law, the work is under the License")[
        "input_ids"
    ][:30]


def test_keys_that_are_not_kept_and_an_index_in_parts(
    pipeline, quick, tmp_path, text_ids, monkeypatch
):
    expected = compared(pipeline.output, pipeline.base, text_ids)
    settings = parse_settings(quick({"datastore": {"keep_keys": False}}))
    context = Context(ram_budget=2**18)
    run(pipeline.base, pipeline.corpus, tmp_path, settings, None, context, "targets")
    assert not list(tmp_path.glob("datastore/keys-*"))
    assert len(list(tmp_path.glob("index/lists-*.faiss"))) > 3
    monkeypatch.setattr(finding, "RAM_BUDGET", 2**18)
    assert len(Sources(tmp_path, pipeline.base).index.passes) > 1
    assert compared(tmp_path, pipeline.base, text_ids) == expected


def test_keys_of_another_base_than_the_served_one(
    pipeline, tiny_model, text_ids, memdec_here, tmp_path
):
    served = tiny_model("gpt2")
    expected = compared(pipeline.output, pipeline.base, text_ids)
    assert compared(pipeline.output, served, text_ids, keys_base=pipeline.base) == expected
    words = ["explain", "under the License", "--base", served, "--memory",
             pipeline.output / "export", "--sources", pipeline.output, "--alpha", "1"]  # fmt: skip
    code, _, err = memdec_here(*words)
    assert code == 1 and "is not the base that made the keys of" in err and "--keys-base" in err
    assert len(err.strip().splitlines()) == 1
    assert (
        memdec_here(*words, "--keys-base", pipeline.base, "--json", tmp_path / "found.json")[0] == 0
    )
    report = json.loads((tmp_path / "found.json").read_text())
    assert all(token["sources"] for token in report["tokens"])


@pytest.mark.parametrize("fixture", ["tiny_model", "bos_model"])
def test_a_long_text_is_read_in_contexts_of_the_builds_length(
    fixture, request, english, jsonl, build, tmp_path
):
    made = request.getfixturevalue(fixture)
    base = made("llama") if callable(made) else made
    build(base, jsonl(tmp_path / "corpus.jsonl", english(20)), tmp_path / "out", until="targets")
    sources = Sources(tmp_path / "out", base)
    [text] = english(1, 12, seed=5)
    ids = sources.tokenizer(text)["input_ids"]
    n, bos = 32, [0] if fixture == "bos_model" else []
    assert len(ids) > 3 * n and ids[: len(bos)] == bos
    keys, model = sources.keys(ids), load_model(base)
    assert keys.shape == (len(ids) - 1, 64) and keys.dtype == np.float16
    for row in range(0, len(ids) - 1, 5):
        near = False
        for start in range(row + 1):
            block = [*(bos if start else []), *ids[start : row + 1]]
            if min(row + 1, n // 2) <= len(block) <= n:
                read = torch.tensor([block]), torch.arange(len(block))[None]
                with torch.inference_mode():
                    key = hidden_states(model, "last_mlp_input", *read)[0, -1]
                near |= np.allclose(key.numpy(), keys[row], rtol=2e-3, atol=2e-3)
        assert near, row


def test_table_page_and_report(tiny_model, english, jsonl, build, tmp_path, memdec_here):
    """Text of the corpus is shown as text, whatever it holds, and nothing is fetched."""
    corpus = jsonl(tmp_path / "<i>corpus.jsonl", [UNSAFE, *english(40)])
    base, out, page = tiny_model("llama"), tmp_path / "out", tmp_path / "page.html"
    validation = jsonl(tmp_path / "validation.jsonl", english(4, seed=3))
    build(base, corpus, out, validation=validation)
    words = ["explain", UNSAFE, "--base", base, "--memory", out / "export", "--alpha", "1"]
    words += ["--tokens", "0", "--html", page, "--json", tmp_path / "found.json"]
    code, printed, err = memdec_here(*words, "--sources", out)
    assert code == 0 and not err, err
    report = json.loads((tmp_path / "found.json").read_text())
    assert report["build"] == str(out)
    tokens = report["tokens"]
    assert all(1 <= len(token["sources"]) <= 3 for token in tokens)
    first = tokens[-1]["sources"][0]
    assert (first["document"], first["name"]) == (1, "<i>corpus.jsonl, line 1")
    assert "<i>corpus.jsonl, line 1" in printed
    reading = Reading()
    reading.feed(page.read_text(encoding="utf-8"))
    assert reading.text == report["first"] + "".join(token["text"] for token in tokens)
    assert not reading.fetched and not reading.inside
    passages = [
        f"{'' if source['begins'] else '… '}{''.join(span['text'] for span in source['passage'])}"
        f"{'' if source['ends'] else ' …'}"
        for token in tokens
        for source in token["sources"]
    ]
    assert reading.quotes == passages
    assert any("<script>" in passage for passage in passages)
    sections = re.findall(r'<section id="(of-\d+)"', page.read_text())
    assert sections == re.findall(r'data-of="(of-\d+)"', page.read_text()) and sections

    code, printed, err = memdec_here(*words)  # without sources all is as it was
    assert code == 0 and "document" not in printed and "aside>" not in page.read_text()
    report = json.loads((tmp_path / "found.json").read_text())
    assert report["build"] is None and not any("sources" in token for token in report["tokens"])


def test_only_tokens_of_the_memory_have_sources(pipeline, memdec_here, tmp_path):
    words = ["explain", "under the License", "--base", pipeline.base, "--memory",
             pipeline.output / "export", "--sources", pipeline.output,
             "--json", tmp_path / "found.json"]  # fmt: skip
    assert memdec_here(*words, "--alpha", "0.5", "--tokens", "40")[0] == 0
    tokens = json.loads((tmp_path / "found.json").read_text())["tokens"]
    assert {token["decided"] for token in tokens} == {"base", "memory"}
    assert all(bool(t["sources"]) == (t["decided"] == "memory") for t in tokens)
    code, printed, _ = memdec_here(*words, "--alpha", "0")
    assert code == 0 and "The memory decided no token" in printed


def test_a_memory_of_another_build_is_told(pipeline, build, quick, tmp_path, memdec_here):
    build(pipeline.base, pipeline.corpus, tmp_path, {"targets": {"neighbours": 8}}, until="targets")
    code, _, err = memdec_here(
        "explain", "under the License", "--base", pipeline.base, "--memory",
        pipeline.output / "export", "--sources", tmp_path, "--tokens", "1",
    )  # fmt: skip
    assert code == 0 and "was not trained on" in err and len(err.strip().splitlines()) == 1


def damaged(output: Path, tmp_path: Path, how: str) -> Path:
    """Return a copy of a build that lacks something."""
    folder = tmp_path / "copy"
    shutil.copytree(output, folder, ignore=shutil.ignore_patterns("memory", "export"))
    if how == "no build":
        return output / "export"
    if how == "cut off":
        path = folder / "index/labels.i32"
        path.write_bytes(path.read_bytes()[:-4])
    elif how == "of two runs":
        other = folder / "datastore/manifest.json"
        made = json.loads(other.read_text())
        made["inputs"]["corpus"] = "0" * 64
        hashed = {key: made[key] for key in ("schema", "stage", "settings", "inputs", "files")}
        made["hash"] = json_sha256(hashed)
        other.write_text(json.dumps(made))
    else:
        shutil.rmtree(folder / how)
    return folder


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("no build", "is no build: give --sources the --output folder of a memdec build."),
        ("corpus", "corpus is missing or damaged, and --sources reads it: run the memdec build"),
        ("index", "index is missing or damaged, and --sources reads it"),
        ("targets", "targets is missing or damaged, and --sources reads it"),
        ("cut off", "index is missing or damaged, and --sources reads it"),
        ("of two runs", "datastore was made of other stages than those beside it"),
    ],
)
def test_builds_that_do_not_do(pipeline, memdec_here, tmp_path, how, says):
    code, _, err = memdec_here(
        "explain", "under the License", "--base", pipeline.base, "--memory",
        pipeline.output / "export", "--sources", damaged(pipeline.output, tmp_path, how),
    )  # fmt: skip
    assert code == 1 and says in err and len(err.strip().splitlines()) == 1, err


def test_another_tokenizer_and_another_base(pipeline, tiny_model, memdec_here):
    def explained(*words):
        code, _, err = memdec_here("explain", "under the License", *words)
        assert code == 1 and len(err.strip().splitlines()) == 1, err
        return err

    other = tiny_model("llama", tokenizer=3)
    err = explained("--base", other, "--memory", other, "--sources", pipeline.output)
    assert "has another tokenizer than the base" in err
    given = ["--base", pipeline.base, "--memory", pipeline.output / "export", "--sources",
             pipeline.output, "--keys-base"]  # fmt: skip
    assert "nowhere is not a model folder" in explained(*given, "nowhere")
    assert "is not the base that made the keys of" in explained(*given, tiny_model("gpt2"))
