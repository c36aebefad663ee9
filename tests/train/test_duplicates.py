"""What is held out and trained on as well: never word for word, and near copies are measured."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest

from vllm_memdec.train.data import duplicates
from vllm_memdec.train.data.blocks import load_blocks, pack
from vllm_memdec.train.data.duplicates import Overlap, overlap, stored_documents
from vllm_memdec.train.data.splits import digest, split_lengths

rng = np.random.default_rng(0)


def random_documents(count, length=200):
    return [rng.integers(0, 5000, length).astype(np.int32) for _ in range(count)]


def changed(document, share):
    """Return a document in which the tokens of one place are replaced."""
    other = document.copy()
    other[: int(share * len(other))] = rng.integers(5000, 9000, int(share * len(other)))
    return other


@pytest.mark.parametrize("at_once", [1, 1000, 2**17])
def test_equal_and_near_documents_are_counted(monkeypatch, at_once):
    monkeypatch.setattr(duplicates, "AT_ONCE", at_once)
    train = random_documents(300)
    held_out = random_documents(20) + train[:3]  # 3 equal
    held_out += [changed(train[n], 0.2) for n in range(10, 15)]  # 5 near
    held_out += [changed(train[n], 0.8) for n in range(20, 24)]  # a quotation is no near copy
    held_out += [np.arange(5, dtype=np.int32)]  # too short to be judged
    assert overlap(iter(train), iter(held_out)) == Overlap(33, 3, 32, 5)
    assert overlap(train, []) == Overlap(0, 0, 0, 0) == overlap([], [])
    assert overlap([], held_out).near == 0


def compared_by_hand(train, held_out):
    """Return the overlap by sets of all shingles, each pair compared."""

    def shingles(document):
        runs = {tuple(document[n : n + duplicates.SHINGLE]) for n in range(len(document))}
        return {run for run in runs if len(run) == duplicates.SHINGLE}

    train = [tuple(document.tolist()) for document in train]
    held_out = [tuple(document.tolist()) for document in held_out]
    owned = {document: shingles(document) for document in held_out}
    owners = Counter(run for runs in owned.values() for run in runs)
    compared = near = 0
    for document, runs in owned.items():
        runs = {run for run in runs if owners[run] <= duplicates.MAX_OWNERS}
        judged = len(runs) >= duplicates.MIN_SHINGLES or document in train
        most = max((len(runs & shingles(other)) for other in train), default=0)
        compared += judged
        near += judged and document not in train and most >= duplicates.NEAR * len(runs)
    return Overlap(len(held_out), sum(d in train for d in held_out), compared, near)


@pytest.mark.parametrize("words", [3, 50, 5000])
@pytest.mark.parametrize("at_once", [1, 200, 2**17])
def test_overlap_is_that_of_sets(monkeypatch, words, at_once):
    """Where all shingles are looked at: texts of few words, changed at a place, joined."""
    monkeypatch.setattr(duplicates, "KEPT", 1)
    monkeypatch.setattr(duplicates, "AT_ONCE", at_once)
    near = 0
    for _ in range(8):
        texts = [rng.integers(0, words, rng.integers(2, 60)).astype(np.int32) for _ in range(12)]
        made = []
        for n in rng.integers(0, 12, 90):
            text = np.concatenate([texts[n], texts[rng.integers(12)]][: rng.integers(1, 3)])
            text[rng.integers(len(text))] = rng.integers(words)
            made.append(text)
        train, held_out = made[:40], made[40:]
        found = overlap(train, held_out)
        assert found == compared_by_hand(train, held_out)
        near += found.near
    assert near > 20


def with_header(documents, header):
    return [np.concatenate([header, document]) for document in documents]


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_header_that_many_documents_have_makes_none_near(share):
    """A licence or a table's head is no copy, however long: what follows it is compared."""
    header = rng.integers(0, 5000, round(share * 400)).astype(np.int32)
    length = 400 - len(header)
    train = with_header(random_documents(50, length), header)
    held_out = with_header(random_documents(50, length), header)
    held_out += [np.concatenate([header, changed(d[len(header) :], 0.2)]) for d in train[:5]]
    assert overlap(train, held_out) == Overlap(55, 0, 55, 5)


def test_a_header_costs_nothing():
    """Pairs of a training and a held-out document are kept for what few of them share."""
    header = rng.integers(0, 5000, 100).astype(np.int32)
    train = with_header(random_documents(600, 100), header)
    held_out = with_header(random_documents(512, 100), header)
    tracemalloc.start()
    overlap(train, held_out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6  # of 300,000 pairs, with some thirty shingles each, it would be 200 MB


def test_copies_of_one_document_are_no_header():
    """A text that is held out many times is compared once, whatever it shares with itself."""
    [one], train = random_documents(1), random_documents(20)
    held_out = [one] * 30 + random_documents(3)
    assert overlap([*train, changed(one, 0.2)], held_out) == Overlap(33, 0, 4, 1)


def test_only_a_sample_is_compared(monkeypatch):
    monkeypatch.setattr(duplicates, "SAMPLE", 10)
    train = random_documents(50)
    found = overlap(train, train)
    assert found == Overlap(50, 50, 10, 0)


@pytest.mark.parametrize("lengths", [[3, 2, 5, 2, 2], [40], [8, 8, 9, 7], [2, 30, 17]])
def test_documents_come_back_from_blocks(monkeypatch, tmp_path, lengths):
    documents = np.split(np.arange(sum(lengths), dtype=np.int32), np.cumsum(lengths)[:-1])
    blocks = pack(documents, 8, -7)
    monkeypatch.setattr(duplicates, "load_blocks", lambda corpus, split: blocks)
    monkeypatch.setattr(duplicates, "SLICE", 2)
    back = list(stored_documents(tmp_path, "train"))
    assert [d.tolist() for d in back] == [d.tolist() for d in documents]


def test_no_text_is_on_both_sides_whatever_is_held_out():
    for names, lengths in (("ABA", [300, 200, 300]), ("AAAB", [400] * 4), ("ABCAB", [90] * 5)):
        texts = np.array([digest(name) for name in names], np.uint64)
        taken = split_lengths(np.array(lengths), texts, texts, 0.1, 16)
        assert taken.any() and (taken < lengths).any()
        for name in names:
            assert (
                len({int(n) for n, other in zip(taken, names, strict=True) if other == name}) == 1
            )


def test_a_build_warns_of_near_copies(build, tiny_model, tmp_path, jsonl, english):
    texts = english(40, sentences_each=10)
    copies = [f"{text} Copied once more." for text in texts]
    lines = build(
        tiny_model("llama"), jsonl(tmp_path / "a.jsonl", texts + copies), tmp_path / "out",
        {"corpus": {"validation_fraction": 0.1}}, until="corpus",
    )  # fmt: skip
    assert any("have a near copy in the training text" in line for line in lines)
    tokens, _ = load_blocks(tmp_path / "out" / "corpus", "validation")
    assert len(tokens)
    lines = build(
        tiny_model("llama"), jsonl(tmp_path / "b.jsonl", texts), tmp_path / "other", until="corpus"
    )
    assert not any("near copy" in line for line in lines)
