"""On which side the new documents of an update fall."""

import numpy as np

from vllm_memdec.train.data.splits import split_as_before, split_lengths

FRACTION = 0.05


def digests(count, seed):
    return np.random.default_rng(seed).integers(0, 1 << 64, count, np.uint64)


def listed(texts, lengths):
    """Return digest and tokens of the documents of one side, as a corpus stores them."""
    return np.stack([texts, lengths.astype(np.uint64)], axis=1)[lengths > 0]


def updated(texts, lengths, new, new_lengths):
    """Return of new documents what is trained on, after a build of others; and of all."""
    taken = split_lengths(lengths, texts, texts, FRACTION, 32)
    sides = listed(texts, taken), listed(texts, lengths - taken)
    both = np.r_[lengths, new_lengths], np.r_[texts, new]
    after = split_as_before(*both, *sides, FRACTION)
    assert np.array_equal(after[: len(texts)], taken)
    return after[len(texts) :], taken


def test_new_documents_are_learnt_where_the_tail_was_held_out():
    """Eight books and forty notes behind them: the notes' digests say nothing of the next ones."""
    lengths = np.r_[np.full(8, 20_000), np.full(40, 100)]
    taken, before = updated(digests(48, 0), lengths, digests(400, 1), np.full(400, 100))
    assert (before[8:] == 0).all() and 0 < before[7] < 20_000  # the tail indeed
    assert 0.02 < (taken == 0).mean() < 0.1


def test_new_documents_are_held_out_as_the_old_ones_where_digests_decided():
    old, new = digests(400, 2), digests(400, 3)
    taken, before = updated(old, np.full(400, 100), new, np.full(400, 100))
    highest = old[before == 0].max()
    assert (old[before > 0] > highest).all()
    assert np.array_equal(taken == 0, new <= highest)


def test_the_only_new_documents_are_learnt():
    """One at least is: else an update that brings them would learn nothing."""
    old = digests(400, 2)
    low = np.array([3, 5, 4, 5], np.uint64)
    taken, _ = updated(old, np.full(400, 100), low, np.full(4, 100))
    assert taken.tolist() == [0, 100, 0, 100]  # copies are on one side
    taken, _ = updated(old, np.full(400, 100), low, np.array([100, 1, 100, 1]))
    assert taken.tolist() == [0, 0, 100, 0]  # one token predicts nothing
