"""The corpus stage: every token predicted once, documents apart, and every format read alike."""

import datetime
import gzip
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from vllm_memdec.checkpoint import tokenizer_fingerprint
from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data import inputs, readers
from vllm_memdec.train.data.blocks import (
    load_blocks,
    load_rows,
    load_used,
    pack,
    packed,
    tokenise,
    valid_rows,
)
from vllm_memdec.train.data.documents import (
    Reading,
    canonical,
    documents,
    pieces,
    read_documents,
    read_whole,
    text_hash,
)
from vllm_memdec.train.data.files import corpus_files
from vllm_memdec.train.data.readers import TEXT, Piece
from vllm_memdec.train.data.splits import digest, split_lengths
from vllm_memdec.train.executor.context import Context
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.settings import CorpusSettings
from vllm_memdec.train.stages.corpus import build_corpus, tokenise_pieces

FILLER = -7
# Lengths of documents: shorter and longer than a block of 8, ending on its edge, of one token.
LENGTHS = {
    "short": [3, 2, 5, 2, 2],
    "long": [40],
    "on the edge": [8, 8, 9, 7],
    "one past the edge": [9],
    "two": [2],
    "one-token documents": [1, 4, 1, 1, 20, 1],
    "mixed": list(np.random.default_rng(0).integers(2, 30, 50)),
}


def numbered(lengths):
    """Return documents whose tokens are all different: 0, 1, 2, ... in order."""
    return np.split(np.arange(sum(lengths), dtype=np.int32), np.cumsum(lengths)[:-1])


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_every_token_but_a_documents_first_is_predicted_once(lengths):
    tokens, positions = pack(numbered(lengths), 8, FILLER)
    mask = valid_rows(positions)
    pairs = sorted(zip(tokens[:, :-1][mask].tolist(), tokens[:, 1:][mask].tolist(), strict=True))
    starts = set(np.r_[0, np.cumsum(lengths)[:-1]].tolist())
    assert pairs == [(t - 1, t) for t in range(sum(lengths)) if t not in starts]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_positions_restart_per_document_and_per_block(lengths):
    tokens, positions = pack(numbered(lengths), 8, FILLER)
    document_start = np.repeat(np.r_[0, np.cumsum(lengths)[:-1]], lengths)
    assert tokens.shape == positions.shape and tokens.shape[1] == 9
    for block, row in enumerate(tokens):
        for t, token in enumerate(row):
            expected = 0 if token == FILLER else token - max(document_start[token], block * 8)
            assert positions[block, t] == expected


def test_filler_is_only_at_the_end_and_holds_no_pair():
    tokens, positions = pack(numbered([5, 6]), 8, FILLER)
    filler = tokens == FILLER
    assert filler.ravel().tolist() == sorted(filler.ravel().tolist()) and filler.sum() == 6
    mask = valid_rows(positions)
    assert not (mask & (filler[:, 1:] | filler[:, :-1])).any()


@pytest.mark.parametrize("adds_itself", [False, True])
def test_end_of_text_is_added_once(tiny_model, tmp_path, jsonl, adds_itself):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    if adds_itself:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    texts = ["one text", "another", " \n ", "the last"]
    path = jsonl(tmp_path / "a.jsonl", texts)
    documents = list(tokenise(tokenizer, read_documents(Piece(path))))
    assert [tokenizer.decode(d, skip_special_tokens=True) for d in documents] == [
        "one text", "another", "the last",
    ]  # fmt: skip
    for document in documents:
        assert (document == 1).nonzero()[0].tolist() == [len(document) - 1]
        assert (document[0] == 0) == adds_itself


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_special_tokens_in_a_document_are_text(tiny_model, kind):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(kind))
    before = tokenizer_fingerprint(tokenizer)
    text = f"It ends with {tokenizer.eos_token} and goes on."
    assert tokenizer.eos_token_id in tokenizer(text)["input_ids"]
    [ids] = tokenise(tokenizer, [text])
    assert (ids == tokenizer.eos_token_id).nonzero()[0].tolist() == [len(ids) - 1]
    assert tokenizer.decode(ids[:-1]) == text
    assert tokenizer_fingerprint(tokenizer) == before
    assert tokenizer.eos_token_id in tokenizer(text)["input_ids"]  # nothing stays behind


def test_a_text_file_of_several_documents(tmp_path, jsonl):
    stories = ["One day\nthere was a bird.", "Two days.", "It said <|endoftext|> and left."]
    for n, ends in enumerate(("\n", "\r\n", "\r")):
        text = "\n<|endoftext|>\n".join(stories) + "\n<|endoftext|>\n"
        path = tmp_path / f"{n}.txt"
        path.write_bytes(text.replace("\n", ends).encode())
        reading = read_whole(path)
        assert list(documents(path)) == stories and reading.separated == [str(path)]
        assert reading.hash == text_hash(jsonl(tmp_path / "a.jsonl", stories))
        small = tmp_path / f"{n}.txt.gz"
        small.write_bytes(gzip.compress(path.read_bytes()))
        assert read_whole(small) == Reading(reading.hash, 3, [str(small)])
    (tmp_path / "one.txt").write_text("one\n")
    assert not read_whole(tmp_path / "one.txt").separated


def test_it_is_said_that_a_file_holds_several_documents(
    build, tiny_model, tmp_path, english, monkeypatch
):
    monkeypatch.setattr(inputs, "SETTLED", 0)
    path = tmp_path / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(english(40)))
    for _ in range(2):  # the second time from what is remembered
        lines = build(tiny_model("llama"), path, tmp_path / "out", until="corpus")
        assert sum(f"such as {path}" in line for line in lines) == 1
    assert "corpus: up to date" in lines


def test_all_formats_give_the_same_documents(tmp_path, jsonl):
    texts = ["first: naïve café", "second", "third\n\nwith a blank line"]
    folder = tmp_path / "txt"
    (folder / "deeper").mkdir(parents=True)
    (folder / "a.txt").write_text(texts[0], encoding="utf-8-sig")  # a byte order mark is no text
    (folder / "b.TXT").write_text(texts[1])
    (folder / "deeper" / "c.txt").write_text(texts[2])
    (folder / "readme.rst").write_text("left out")
    lines = jsonl(tmp_path / "a.jsonl", [*texts, " "])
    table = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1, 2, 3], "text": texts}), table)
    for path in (folder, lines, table):
        assert [t for f in corpus_files(path).files for t in read_documents(Piece(f))] == texts
        assert [t for piece in pieces(path) for t in read_documents(piece)] == texts
    assert corpus_files(folder).counts == {".rst": 1}
    assert text_hash(folder) == text_hash(lines) == text_hash(table)
    assert text_hash(jsonl(tmp_path / "b.jsonl", texts[::-1])) != text_hash(lines)
    assert text_hash(jsonl(tmp_path / "c.jsonl", ["".join(texts)])) != text_hash(lines)


def split(lengths, texts=None, groups=None, fraction=0.1, block_tokens=16):
    """Return split_lengths() of documents whose texts all differ, unless they are given."""
    names = [str(n) for n in range(len(lengths))] if texts is None else texts
    texts, groups = (
        np.array([digest(str(name)) for name in chosen], np.uint64)
        for chosen in (names, names if groups is None else groups)
    )
    return split_lengths(np.array(lengths), texts, groups, fraction, block_tokens)


@pytest.mark.parametrize("lengths", [[20] * 40, [3] * 12, [5, 400, 5], [200], [50, 50]])
def test_split_is_disjoint_and_complete(lengths):
    documents = numbered(lengths)
    taken = split(lengths)
    parts = {
        "train": [d[:n] for d, n in zip(documents, taken, strict=True)],
        "validation": [d[n:] for d, n in zip(documents, taken, strict=True)],
    }
    tokens = {name: np.concatenate(part).tolist() for name, part in parts.items()}
    assert len(tokens["validation"]) >= 17  # a whole block
    assert sorted(tokens["train"] + tokens["validation"]) == list(range(sum(lengths)))
    assert 1 not in taken  # one token alone predicts nothing


def test_whole_documents_are_held_out_where_there_are_many():
    assert sorted(split([20] * 40).tolist()) == [0] * 4 + [20] * 36


def test_a_period_in_the_corpus_does_not_decide_the_split():
    """Of twenty sections a country, every twentieth document would be one section."""
    held_out = np.flatnonzero(split([20] * 2000, fraction=0.05) == 0)
    assert len(held_out) == 100 and len(set((held_out % 20).tolist())) > 12


def test_equal_texts_and_groups_are_on_one_side():
    rng = np.random.default_rng(0)
    texts = rng.integers(0, 150, 400)  # many occur more than once
    taken = split([20] * 400, texts)
    sides = {(text, bool(n)) for text, n in zip(texts.tolist(), taken, strict=True)}
    assert len(sides) == len({text for text, _ in sides})
    groups = np.arange(400) // 8  # eight chunks of each book
    taken = split([20] * 400, groups=groups)
    assert all(len(set(taken[groups == g].tolist())) == 1 for g in range(50))
    order = rng.permutation(400)
    again = split([20] * 400, np.arange(400)[order], groups[order])
    assert np.array_equal(again, taken[order])  # whatever order the corpus is in


def test_rows_of_one_group_are_held_out_together(tiny_model, tmp_path, jsonl, english):
    path = tmp_path / "chunks.jsonl"
    texts = [f"{text} The end of {n}." for n, text in enumerate(english(60))]
    rows = [{"text": t, "book": {"n": n // 6}, "shelf": 1} for n, t in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "chunks.parquet")
    base, held_out = tiny_model("llama"), []
    tokenizer = AutoTokenizer.from_pretrained(base)
    for file in (path, tmp_path / "chunks.parquet"):
        work = tmp_path / file.suffix
        work.mkdir()
        settings = CorpusSettings(block_tokens=32, group="book", validation_fraction=0.1)
        build_corpus(settings, base, file, None, work, Context())
        tokens, positions = (a[:] for a in load_blocks(work, "validation"))
        stream = tokenizer.decode(tokens[:, 1:].ravel())
        held_out.append([n for n, text in enumerate(texts) if text[-60:] in stream])
    assert held_out[0] == held_out[1] and held_out[0]
    books = sorted({n // 6 for n in held_out[0]})
    assert held_out[0] == [n for book in books for n in range(6 * book, 6 * book + 6)]
    for group, match in (("author", "line 1 has no field `author`"), ("shelf", "too few values")):
        settings = CorpusSettings(block_tokens=32, group=group)
        (tmp_path / group).mkdir()
        with pytest.raises(MemdecError, match=match):
            build_corpus(settings, base, path, None, tmp_path / group, Context())


def test_equal_values_of_a_field_are_one_group():
    day = datetime.date(2026, 1, 31)
    assert canonical({"a": 1, "b": [2]}) == canonical({"b": [2], "a": 1})
    assert canonical(day) == canonical(datetime.date(2026, 1, 31)) != canonical(str(day)[:-1])
    assert canonical(b"x") != canonical(b"y") and canonical(1) != canonical("1")


def test_validation_text_that_is_in_the_corpus(tiny_model, tmp_path, jsonl, english):
    """Text that the memory learns by heart says nothing of text that it does not."""
    texts, said = english(30), []
    corpus = jsonl(tmp_path / "corpus.jsonl", texts)
    progress = Progress()
    progress.say = said.append
    for held_out in (texts[:10] + english(10, seed=9), texts[::-1]):
        work = tmp_path / f"work{len(said)}"
        work.mkdir()
        held_out = jsonl(tmp_path / "held_out.jsonl", held_out)
        settings = CorpusSettings(block_tokens=32)
        run = (settings, tiny_model("llama"), corpus, held_out, work, Context(progress))
        if "work0" in str(work):
            build_corpus(*run)
            expected = "10 of 20 validation documents (50%) are in the corpus word for word"
            assert expected in " ".join(said)
            assert (
                json.loads((work / "corpus.json").read_text())["validation"]["equal_documents"]
                == 10
            )
        else:
            with pytest.raises(MemdecError, match="every document of .*held_out.jsonl is in"):
                build_corpus(*run)


def test_stage_writes_what_it_counts(tiny_model, tmp_path, jsonl, english):
    train = jsonl(tmp_path / "train.jsonl", english(20))
    held_out = jsonl(tmp_path / "held_out.jsonl", english(5, seed=1))
    work = tmp_path / "work"
    work.mkdir()
    settings = CorpusSettings(block_tokens=16, shard_blocks=3)
    build_corpus(settings, tiny_model("gpt2"), train, held_out, work, Context())
    facts = json.loads((work / "corpus.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("gpt2"))
    for name, path in (("train", train), ("validation", held_out)):
        documents = list(tokenise(tokenizer, read_documents(Piece(path))))
        tokens, positions = load_blocks(work, name)
        whole = pack(documents, 16, tokenizer.eos_token_id)
        assert tokens.n_shards > 1
        assert np.array_equal(tokens[:], whole[0]) and np.array_equal(positions[:], whole[1])
        assert np.array_equal(load_rows(work, name), valid_rows(whole[1]).sum(axis=1))
        assert np.array_equal(load_used(work, name), np.unique(whole[0]))
        assert facts[name]["documents"] == len(documents)
        assert facts[name]["rows"] == sum(len(d) - 1 for d in documents)


def test_a_base_that_cannot_take_the_corpus_is_refused(tiny_model, tmp_path, jsonl, english):
    path = jsonl(tmp_path / "a.jsonl", english(20))

    def refused(base, match):
        with pytest.raises(ValueError, match=match):
            settings = CorpusSettings(block_tokens=64)
            build_corpus(settings, base, path, None, tmp_path, Context())

    refused(tiny_model("gpt2", positions=32), "32 positions: lower corpus.block_tokens from 64")
    base = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    refused(str(base), "200 vocabulary rows, but its tokenizer gives token")


def test_a_long_last_document_does_not_take_the_corpus_away():
    lengths = np.array([50] * 19 + [100_000])
    trained = split(lengths, fraction=0.05, block_tokens=64).sum()
    assert trained > 0.9 * lengths.sum() and lengths.sum() - trained > 64


def test_windows_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n")
    assert list(read_documents(Piece(tmp_path / "a.txt"))) == ["one\ntwo\n"]


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_pieces_hold_every_line_once(tmp_path, jsonl, english, monkeypatch, size):
    """However a file is divided, a line is in the piece it starts in."""
    monkeypatch.setattr(readers, "PIECE_BYTES", size)
    texts = [*english(20), "é" * 300, "x"]
    read = [list(read_documents(p)) for p in pieces(jsonl(tmp_path / "a.jsonl", texts))]
    assert len(read) > 3 or size == 1000
    assert [t for piece in read for t in piece] == texts
    lines = "\n".join(texts) + "\n\nthe end"
    (tmp_path / "a.txt").write_text(lines)
    assert "".join(t for p in pieces(tmp_path / "a.txt") for t in read_documents(p)) == "".join(
        line for line in lines.splitlines(keepends=True) if size > 1 or line.strip()
    )
    table = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts}), table, row_group_size=5)
    assert [list(read_documents(p)) for p in pieces(table)] == [
        texts[i : i + 5] for i in range(0, len(texts), 5)
    ]


@pytest.mark.parametrize("at_once", [1, 3, 1000])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_blocks_do_not_depend_on_how_many_are_packed_at_once(lengths, at_once):
    parts = list(packed(iter(numbered(lengths)), 8, FILLER, at_once))
    assert all(len(tokens) == at_once for tokens, _ in parts[:-1])
    for n, whole in enumerate(pack(numbered(lengths), 8, FILLER)):
        assert np.array_equal(np.concatenate([part[n] for part in parts]), whole)


def test_files_cut_anew_while_a_build_was_stopped(tiny_model, tmp_path, jsonl, english):
    """The same text in other files: pieces are known by number, and none is read twice or never."""
    base, corpus, work = tiny_model("llama"), tmp_path / "corpus", tmp_path / "work"
    corpus.mkdir()
    texts = english(12)
    for name, part in (("a", texts[:4]), ("b", texts[4:8]), ("c", texts[8:])):
        jsonl(corpus / f"{name}.jsonl", part)
    tokenise_pieces(base, [corpus], TEXT, work, Context())
    (work / "tokens-00001.npy").unlink()  # as after a kill
    (corpus / "b.jsonl").unlink()
    jsonl(corpus / "b1.jsonl", texts[4:6])
    jsonl(corpus / "b2.jsonl", texts[6:8])
    [again] = tokenise_pieces(base, [corpus], TEXT, work, Context())
    [fresh] = tokenise_pieces(base, [corpus], TEXT, tmp_path / "fresh", Context())
    documents = [[d.tolist() for d in each.documents()] for each in (again, fresh)]
    assert len(documents[1]) == 12 and documents[0] == documents[1]
    before = {p.name: p.stat().st_mtime_ns for p in work.glob("*.npy")}
    tokenise_pieces(base, [corpus], TEXT, work, Context())
    assert before == {p.name: p.stat().st_mtime_ns for p in work.glob("*.npy")}
