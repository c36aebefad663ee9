"""Rows of the datastore and the documents they are of, against a walk over the corpus."""

import gzip
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data import readers
from vllm_memdec.train.data.blocks import load_blocks, tokenise, valid_rows
from vllm_memdec.train.data.places import Places
from vllm_memdec.train.data.shards import load_array

BLOCKS = {"corpus": {"block_tokens": 16, "shard_blocks": 4}}


def walked(corpus):
    """Return (document, place in it) of the label of each training row, a token at a time."""
    tokens, positions = (np.array([*blocks]) for blocks in load_blocks(corpus, "train"))
    rows, document, place = [], -1, 0
    for block in range(len(tokens)):
        repeated = positions[block, 0] < 0  # BOS, and the shared token after it
        for column in range(tokens.shape[1]):
            is_new = block == 0 or column > int(repeated)
            if is_new and positions[block, column] == 0:
                document, place = document + 1, 0
            elif is_new:
                place += 1
            if column and valid_rows(positions[block][None])[0, column - 1]:
                rows.append((document, place))
    return rows


@pytest.mark.parametrize("base", ["tiny_model", "bos_model"])
def test_each_row_is_of_the_document_that_has_its_label(
    base, request, english, jsonl, build, tmp_path
):
    """Documents from a word to several blocks, with BOS and without."""
    made = request.getfixturevalue(base)
    base = made("llama") if callable(made) else made
    texts = [text for n in range(1, 7) for text in english(3, n, seed=n)]
    texts += [" ".join(text.split()[:2]) for text in texts[:6]]
    build(
        base, jsonl(tmp_path / "corpus.jsonl", texts), tmp_path / "out", BLOCKS, until="datastore"
    )
    corpus = tmp_path / "out/corpus"
    places, expected = Places(corpus), walked(corpus)
    rows = np.arange(len(expected))
    assert places.first_rows[-1] == len(rows)
    documents = places.documents(rows)
    assert documents.tolist() == [document for document, _ in expected]
    assert (
        documents.max() + 1
        == json.loads((corpus / "corpus.json").read_text())["train"]["documents"]
    )
    shuffled = np.random.default_rng(0).permutation(rows)
    assert (places.documents(shuffled) == documents[shuffled]).all()

    tokenizer = AutoTokenizer.from_pretrained(base)
    labels = np.concatenate(
        [load_array(p) for p in sorted((tmp_path / "out/datastore").glob("labels*"))]
    )
    begun = {}
    written = list(tokenise(tokenizer, texts))
    for row in rows.tolist():
        document, place = expected[row]
        if document in begun and row % 7:
            continue
        line = int(places.name(document).removeprefix("corpus.jsonl, line "))
        ids = written[line - 1]
        passage = places.passage(row, 20, 12)
        assert ids[place] == labels[row] == passage.ids[passage.at]
        first, last = max(0, place - 20), place + 13
        assert passage.ids == ids[first:last].tolist()
        assert (passage.begins, passage.ends) == (first == 0, last >= len(ids))
        begun[document] = line
    assert len(begun) == documents.max() + 1  # none is left out, and each has a line of its own
    assert len(set(begun.values())) == len(begun)


def test_names_of_files(tiny_model, english, jsonl, build, tmp_path, monkeypatch):
    """Lines, rows, files of one text, and lines far into a file, whose numbers are not known."""
    monkeypatch.setattr(readers, "PIECE_BYTES", 2000)
    texts, folder = english(30), tmp_path / "texts"
    folder.mkdir()
    jsonl(folder / "a.jsonl", [" ", *texts[:9]])
    (folder / "a.jsonl").write_text("\n" + (folder / "a.jsonl").read_text())
    pq.write_table(pa.table({"text": texts[9:15]}), folder / "b.parquet", row_group_size=2)
    (folder / "c.txt").write_text(texts[15])
    with gzip.open(folder / "d.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts[16:30])
    build(tiny_model("llama"), folder, tmp_path / "out", BLOCKS, until="corpus")
    places = Places(tmp_path / "out/corpus")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    last_rows = {}
    for row, document in enumerate(places.documents(np.arange(places.first_rows[-1])).tolist()):
        last_rows[document] = row
    seen = set()
    raw = (folder / "a.jsonl").read_bytes()
    for document, row in last_rows.items():
        ids = places.passage(row, 10_000, 0).ids
        text = tokenizer.decode(ids, skip_special_tokens=True)
        name, _, place = places.name(document).partition(", ")
        kind, _, number = place.partition(" ")
        seen.add((name, kind))
        if kind == "byte":
            assert json.loads(raw[int(number) :].split(b"\n")[0])["text"] == text
        elif kind:
            first = {"texts/a.jsonl": -3, "texts/b.parquet": 8, "texts/d.jsonl.gz": 15}[name]
            assert texts[first + int(number)] == text
        else:
            assert text == texts[15]
    assert {kind for _, kind in seen} == {"byte", "line", "row", ""}


def test_names_change_no_hash_and_a_build_without_them_has_numbers(
    tiny_model, english, jsonl, build, tmp_path
):
    manifests = []
    for name in ("one", "other"):
        corpus = jsonl(tmp_path / f"{name}.jsonl", english(30))
        build(tiny_model("llama"), corpus, tmp_path / name, BLOCKS, until="corpus")
        manifests.append(json.loads((tmp_path / name / "corpus/manifest.json").read_text()))
        assert Places(tmp_path / name / "corpus").name(0).startswith(f"{name}.jsonl, line ")
    assert manifests[0]["hash"] == manifests[1]["hash"]
    for path in (tmp_path / "one/corpus/logs").iterdir():
        path.unlink()
    assert Places(tmp_path / "one/corpus").name(0) is None
    shutil.copytree(tmp_path / "one/corpus", tmp_path / "earlier")
    (tmp_path / "earlier/texts-train.npy").unlink()
    with pytest.raises(MemdecError, match="does not know its documents, an earlier release"):
        Places(tmp_path / "earlier")
    lines = build(
        tiny_model("llama"), tmp_path / "one.jsonl", tmp_path / "one", BLOCKS, until="corpus"
    )
    assert lines == ["corpus: up to date"]
