"""Blocks as requests are read: BOS wherever a server would see it, and what is not predicted."""

import numpy as np
import pytest

from vllm_memdec.train.data.blocks import (
    begun,
    bos_of,
    pack,
    packed,
    tokenise,
    unmarked,
    unshared,
    valid_rows,
)
from vllm_memdec.train.data.duplicates import stored_documents
from vllm_memdec.train.model import windows as windows_module
from vllm_memdec.train.model.huggingface import load_tokenizer
from vllm_memdec.train.model.windows import alone, joined, validation_documents

BOS, FILLER = 9999, -7
rng = np.random.default_rng(0)
LENGTHS = [[40], [9, 9, 17, 8], [2, 30, 3, 1, 50], *(rng.integers(1, 40, 12) for _ in range(5))]


def numbered(lengths, share=0.0, bos=BOS):
    """Return documents of different tokens after BOS; a share of the tokens is not predicted."""
    made, first = [], 0
    for length in lengths:
        ids = np.arange(first, first + length, dtype=np.int32)
        first += length
        ids = np.where(rng.random(length) < share, ~ids, ids)
        made.append(ids if bos is None else np.r_[np.int32(bos), ids])
    return made


def one_by_one(documents, T, bos):
    """Return what pack() does, a token at a time: (tokens, positions, predicted) of each block."""
    stream = [
        (int(unmarked(token)), int(token) >= 0 and place > 0, place == 0)
        for document in documents
        for place, token in enumerate(document)
    ]
    blocks, at = [], 0
    while at < len(stream) - 1 or not blocks:
        token, _, starts = stream[at]
        block = [(token, 0, False)]
        if not starts and bos is not None:
            block = [(bos, 0, False), (token, 1, False)]
        while len(block) < T + 1:
            at += 1
            token, predicted, starts = stream[at] if at < len(stream) else (FILLER, False, True)
            block.append((token, 0 if starts else block[-1][1] + 1, predicted))
        blocks.append(block)
    return (np.array(array) for array in zip(*(zip(*b, strict=True) for b in blocks), strict=True))


@pytest.mark.parametrize("bos", [BOS, None])
@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_blocks_are_those_of_a_token_at_a_time(lengths, share, bos):
    documents = numbered(lengths, share, bos)
    tokens, positions = pack(documents, 8, FILLER, bos)
    expected = one_by_one(documents, 8, bos)
    for array, slow in zip((tokens, unmarked(positions)), expected, strict=False):
        assert np.array_equal(array, slow)
    *_, predicted = one_by_one(documents, 8, bos)
    assert np.array_equal(valid_rows(positions), predicted[:, 1:])
    for at_once in (1, 3):
        parts = list(packed(iter(documents), 8, FILLER, at_once, bos))
        assert np.array_equal(np.concatenate([p for _, p in parts]), positions)
        assert np.array_equal(np.concatenate([t for t, _ in parts]), tokens)
    labels = tokens[:, 1:][valid_rows(positions)]
    assert labels.tolist() == [t for d in documents for t in d[1:].tolist() if t >= 0]
    if bos is not None:
        at_0 = (unmarked(positions) == 0) & (tokens != FILLER)
        assert (tokens[at_0] == BOS).all()


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_documents_come_back_from_blocks(tmp_path, monkeypatch, lengths):
    documents = numbered(lengths, 0.3)
    blocks = pack(documents, 8, FILLER, BOS)
    monkeypatch.setattr("vllm_memdec.train.data.duplicates.load_blocks", lambda *_: blocks)
    monkeypatch.setattr("vllm_memdec.train.data.duplicates.SLICE", 2)
    back = list(stored_documents(tmp_path, "train"))
    assert [d.tolist() for d in back] == [unmarked(d).tolist() for d in documents]
    monkeypatch.setattr(windows_module, "load_blocks", lambda *_: blocks)
    back = validation_documents(tmp_path, 10**6)
    assert [d.tolist() for d in back] == [d.tolist() for d in documents]
    monkeypatch.setattr(windows_module, "RUNS", 2)
    some = validation_documents(tmp_path, 16)  # begins within a document, perhaps
    stream = np.concatenate(documents)
    for document in some:
        first = int(document[0] == BOS)
        at = int(np.flatnonzero(unmarked(stream) == unmarked(document)[first])[0]) - first
        assert document[1:].tolist() == stream[at + 1 : at + len(document)].tolist()
    assert not unshared(blocks[1], first=False)[:, 0].any()


def test_a_part_of_a_document_gets_bos():
    part = np.array([5, 6, ~7], np.int32)
    assert begun(part, BOS).tolist() == [BOS, ~5, 6, ~7]
    assert begun(part, None) is part and begun(part, 5) is part
    tokens, positions = pack([part], 8, FILLER, BOS)
    assert tokens[0, :4].tolist() == [BOS, 5, 6, 7]
    assert valid_rows(positions)[0].nonzero()[0].tolist() == [1]


def test_windows_begin_with_bos_which_stands_nowhere_else():
    documents = numbered([5, 4, 9, 1, 3, 30, 2, 8, 8], 0.2)
    documents[1] = documents[1][1:]  # a part of a document
    each, together = (read(documents, 12, FILLER, BOS) for read in (alone, joined))
    assert (each.tokens[unmarked(each.positions) == 0] != FILLER).any()
    for text in (each, together):
        at_0 = (unmarked(text.positions) == 0) & (text.tokens != FILLER)
        assert (text.tokens[at_0] == BOS).all() and (text.tokens[~at_0] != BOS).all()
        assert text.position_N.min() >= 0
    assert (together.tokens[:, 0] == BOS).all() and len(together) > 1
    firsts = {int(unmarked(d[int(d[0] == BOS)])) for d in documents}
    hidden = {int(~i) for d in documents for i in d if i < 0}
    labels = set(together.tokens[:, 1:][together.scored].tolist())
    assert labels and not labels & (firsts | hidden)
    short = {int(i) for d in documents if len(d) < 12 for i in d if i >= 0}
    assert labels <= short


def test_which_tokenizers_add_bos(tiny_model, bos_model):
    assert bos_of(load_tokenizer(tiny_model("llama"))) is None
    tokenizer = load_tokenizer(bos_model)
    assert bos_of(tokenizer) == tokenizer.bos_token_id == 0
    ids = list(tokenise(tokenizer, ["", "ba ba"], keep_empty=True))
    assert [len(i) > 0 for i in ids] == [False, True]  # BOS alone is no text
    assert ids[1][0] == 0 and ids[1][-1] == tokenizer.eos_token_id


def test_a_build_without_bos_is_what_it_was(pipeline):
    """No manifest speaks of BOS where there is none: earlier builds stay up to date."""
    manifest = (pipeline.output / "corpus" / "manifest.json").read_text()
    assert '"bos"' not in manifest
