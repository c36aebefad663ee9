"""Memory and weight on their way from extra_args into rows of bfloat16 and back, no engine."""

import pytest
import torch

from vllm_memdec.batch import (
    Batch,
    ContextTable,
    decode,
    decode_memory,
    decode_reused,
    encode,
    graph_sets,
)
from vllm_memdec.request import NO_MEMORY, Choices, check_extra_args

CHOICES = Choices({"law": 0.6, "bio": 0.4}, "law")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_float32_weight_survives(dtype):
    alpha_B = torch.cat(
        [torch.tensor([0.0, 1.0, 0.3, 0.6, 0.37, 1e-3, 1 - 2**-24]), torch.rand(10000)]
    )
    alpha_B = torch.cat([alpha_B, -alpha_B])  # the caps of gates
    assert torch.equal(decode(encode(alpha_B, dtype)), alpha_B)


def write(batch, *rows):
    """Write a batch of requests, each (memory, weight, tokens)."""
    memory_B, alpha_B, lengths_B = (torch.tensor(x) for x in zip(*rows, strict=True))
    batch.write(memory_B, alpha_B, lengths_B)


@pytest.mark.parametrize("hidden", [64, 160, 100, 7])
def test_rows(hidden):
    """Each request's tokens get its choice, and rows stay a multiple of 8 elements long."""
    batch = Batch(2, hidden, max_tokens=16, dtype=torch.bfloat16, device="cpu")
    assert (hidden + batch.columns_TA.shape[1]) % 8 == 0
    buffer = batch.columns_TA.data_ptr()
    write(batch, (1, 0.3, 2), (0, 1.0, 1), (NO_MEMORY, 0.0, 3))
    expected = torch.tensor([0.3, 0.3, 1, 0, 0, 0] + 10 * [0.0])
    assert torch.equal(decode(batch.columns_TA), expected)
    assert decode_memory(batch.columns_TA)[:6].tolist() == [1, 1, 0, -1, -1, -1]
    write(batch, (1, 0.6, 1))
    assert decode(batch.columns_TA)[:2].tolist() == torch.tensor([0.6, 0.3]).tolist()
    assert batch.columns_TA.data_ptr() == buffer, "a captured graph would read the old one"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_by_context(dtype):
    """A table's weight is put into rows that ask for it, by their positions, and into no others."""
    batch = Batch(2, 64, max_tokens=8, dtype=dtype, device="cpu")
    write(batch, (1, -1.0, 5), (1, 0.4, 1), (0, -1.0, 1), (NO_MEMORY, 0.0, 1))
    for table, expected in (
        ([[0, 0.37], [8, 0.0], [131071, 0.1]], [0.37, 0.37, 0.0, 0.0, 0.1, 0.4, -1.0, 0.0]),
        ([[0, 0.37]], [0.37] * 5 + [0.4, -1.0, 0.0]),
    ):
        rows = batch.columns_TA.clone()
        position_N = torch.tensor([0, 7, 8, 131070, 131071, 9, 9, 9])
        ContextTable(table, 1, dtype, "cpu").write(rows, position_N)
        assert torch.equal(decode(rows), torch.tensor(expected))
        assert torch.equal(rows[:, 3:], batch.columns_TA[:, 3:])


def test_shares():
    """A memory runs on the tokens of those who chose it, and a memory nobody chose does not."""
    batch = Batch(3, 64, max_tokens=16, dtype=torch.float32, device="cpu")
    assert batch.used == [0, 1, 2] and all(s.tokens is None for s in batch.shares.values())
    write(batch, (2, 0.3, 2), (0, 0.4, 1), (NO_MEMORY, 0.0, 3), (2, 0.5, 1))
    assert batch.used == [0, 2] and not batch.shared and sorted(batch.shares) == [0, 2]
    share = batch.shares[2]
    assert share.requests.tolist() == [0, 3] and share.lengths.tolist() == [2, 1]
    assert share.tokens.tolist() == [0, 1, 6] and batch.shares[0].tokens.tolist() == [2]
    write(batch, (1, 0.3, 2), (1, 0.4, 1))
    assert batch.used == [1] and batch.shared and batch.shares[1].tokens is None
    write(batch, (NO_MEMORY, 0.0, 2))
    assert batch.used == [] and batch.shares == {}
    batch.reset()
    assert batch.used == [0, 1, 2] and batch.shared and sorted(batch.shares) == [0, 1, 2]


def test_the_same_batch_is_written_once():
    """A batch that asks for the same is not written again; one that differs in anything is."""
    same = ((1, 0.3, 1), (0, 0.4, 2))
    others = (
        ((0, 0.3, 1), (1, 0.4, 2)),
        ((1, 0.5, 1), (0, 0.4, 2)),
        ((1, 0.3, 2), (0, 0.4, 1)),
        ((1, 0.3, 1), (0, 0.4, 2), (0, 0.4, 1)),
        ((1, 0.3, 1),),
    )
    expected = torch.tensor([0.3, 0.4, 0.4])
    batch = Batch(2, 64, max_tokens=16, dtype=torch.bfloat16, device="cpu")
    for other in others:
        write(batch, *same)
        shares = batch.shares
        write(batch, *same)
        assert batch.shares is shares, "written again"
        write(batch, *other)
        assert batch.shares is not shares
        write(batch, *same)
        assert torch.equal(decode(batch.columns_TA[:3]), expected)
        assert decode_memory(batch.columns_TA[:3]).tolist() == [1, 0, 0]
        assert batch.shares[1].tokens.tolist() == [0] and batch.shares[0].tokens.tolist() == [1, 2]
    batch.reset()
    write(batch, *same)
    assert sorted(batch.shares) == [0, 1] and batch.shares[1].tokens.tolist() == [0]
    # The rows of a draft are of one step alone.
    memory_B, alpha_B, lengths_B = (
        torch.tensor(x) for x in zip((1, 0.3, 2), (1, 0.4, 1), strict=True)
    )
    for reusable in ([range(4, 5), range(0)], [range(7, 8), range(0)]):
        batch.write(memory_B, alpha_B, lengths_B, reusable)
        assert decode_reused(batch.columns_TA)[:3].tolist() == [reusable[0].start, -1, -1]
    batch.write(memory_B, alpha_B, lengths_B)
    assert batch.reused is None and (decode_reused(batch.columns_TA)[:3] == -1).all()


def test_reused_tokens_are_left_out():
    """A request's first tokens may be rows of a draft; the memory runs on the others."""
    batch = Batch(2, 64, max_tokens=16, dtype=torch.bfloat16, device="cpu")
    rows = ((1, 0.3, 3), (1, 0.4, 2), (1, 0.4, 4))
    memory_B, alpha_B, lengths_B = (torch.tensor(x) for x in zip(*rows, strict=True))
    batch.write(memory_B, alpha_B, lengths_B, [range(253, 255), range(0), range(3, 4)])
    assert decode_reused(batch.columns_TA)[:9].tolist() == [253, 254, -1, -1, -1, 3, -1, -1, -1]
    assert [x.tolist() for x in batch.reused] == [[0, 1, 5], [253, 254, 3]]
    share = batch.shares[1]
    assert share.tokens.tolist() == [2, 3, 4, 6, 7, 8] and share.lengths.tolist() == [1, 2, 3]
    # Not with other requests beside it, nor of what comes next.
    other_B = torch.tensor([1, NO_MEMORY, 1])
    batch.write(other_B, alpha_B, lengths_B, [range(2), range(0), range(0)])
    assert batch.reused is None and batch.shares[1].tokens.tolist() == [0, 1, 2, 5, 6, 7, 8]
    batch.write_drafting()
    assert batch.reused is None and (decode_reused(batch.columns_TA)[:3] == -1).all()


@pytest.mark.parametrize(
    ("mode", "chosen", "expected"),
    [
        ("PIECEWISE", (1, NO_MEMORY), [1]),
        ("PIECEWISE", (0, 2), [0, 2]),
        ("PIECEWISE", (NO_MEMORY, NO_MEMORY), []),
        ("FULL", (1, NO_MEMORY), [1]),
        ("FULL", (0, 2), [0, 1, 2]),
        ("FULL", (NO_MEMORY, NO_MEMORY), []),
    ],
)
def test_graphs_run_whole_batches(mode, chosen, expected):
    """Pieces of each memory in use, or the captured set that serves the batch; nothing for none."""
    batch = Batch(3, 64, max_tokens=16, dtype=torch.float32, device="cpu")
    memory_B, lengths_B = torch.tensor(chosen), torch.tensor([2, 1])
    alpha_B = (memory_B != NO_MEMORY) * 0.3
    batch.write(memory_B, alpha_B, lengths_B, mode=mode)
    assert sorted(batch.shares) == expected
    assert all(share.tokens is None for share in batch.shares.values())
    assert batch.used == sorted({m for m in chosen if m != NO_MEMORY}) and not batch.is_dummy
    # The same requests, executed otherwise.
    batch.write(memory_B, alpha_B, lengths_B, mode="NONE")
    assert sorted(batch.shares) == batch.used
    if mode == "FULL" and NO_MEMORY in chosen and batch.used:
        assert batch.shares[1].tokens.tolist() == [0, 1]
    batch.plan(mode)
    assert sorted(batch.shares) == expected


def test_sets_of_graphs():
    assert graph_sets(1) == [(0,), ()]
    assert graph_sets(3) == [(0, 1, 2), (0,), (1,), (2,), ()]
    assert graph_sets(9) == [tuple(range(9)), ()], "so many would take minutes to capture"
    batch = Batch(9, 64, max_tokens=16, dtype=torch.float32, device="cpu")
    assert batch.set_of([4]) == tuple(range(9)) and batch.set_of([]) == ()
    batch.run_dummies_with(())
    batch.reset()
    assert batch.shares == {} and batch.used == [] and batch.is_dummy


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan"), float("inf"), "0.3", True, None, [0.3]])
def test_bad_weights_are_refused(value):
    with pytest.raises(ValueError, match="memdec_alpha must be a number between 0 and 1"):
        check_extra_args({"memdec_alpha": value}, CHOICES)


@pytest.mark.parametrize("value", ["tax", "", "LAW", 0, None, ["law"], {"law": 1}])
def test_bad_memories_are_refused(value):
    sentence = r"memdec_memory must be one of \['law', 'bio', 'none'\]"
    with pytest.raises(ValueError, match=sentence):
        check_extra_args({"memdec_memory": value}, CHOICES)


def test_other_arguments():
    check_extra_args(None, CHOICES)
    check_extra_args({"other": "x", "memdec_alpha": 1, "memdec_memory": "none"}, CHOICES)
    check_extra_args({"other": "x"}, None)
    with pytest.raises(ValueError, match="Unknown extra argument 'memdec_apha'"):
        check_extra_args({"memdec_apha": 0.3}, CHOICES)
    for key, value in (("memdec_alpha", 0.3), ("memdec_memory", "none")):
        with pytest.raises(ValueError, match="runs without a memory"):
            check_extra_args({key: value}, None)


@pytest.mark.parametrize(
    ("extra_args", "name", "choice"),
    [
        (None, "law", (0, 0.6)),
        ({"other": 1}, "law", (0, 0.6)),
        ({"memdec_alpha": 0.2}, "law", (0, 0.2)),
        ({"memdec_memory": "bio"}, "bio", (1, 0.4)),
        ({"memdec_memory": "bio", "memdec_alpha": 1}, "bio", (1, 1.0)),
        ({"memdec_memory": "none"}, "none", (NO_MEMORY, 0.0)),
        ({"memdec_memory": "none", "memdec_alpha": 0.5}, "none", (NO_MEMORY, 0.0)),
        ({"memdec_memory": "bio", "memdec_alpha": 0}, "none", (NO_MEMORY, 0.0)),
        ({"memdec_memory": "off"}, "none", (NO_MEMORY, 0.0)),
        ({"memdec_memory": "off", "memdec_alpha": 0.1}, "off", (2, 0.1)),
    ],
)
def test_choice(extra_args, name, choice):
    """What the front end calls it for the cache and what the worker runs agree."""
    choices = Choices({"law": 0.6, "bio": 0.4, "off": 0.0}, "law")
    assert choices.name(extra_args) == name
    assert choices.resolve(extra_args) == choice


@pytest.mark.parametrize(
    ("extra_args", "choice"),
    [
        (None, (0, -1.0)),
        ({"memdec_alpha": "auto"}, (0, -1.0)),
        ({"memdec_alpha": 0.3}, (0, -0.3)),
        ({"memdec_alpha": 0}, (NO_MEMORY, 0.0)),
        ({"memdec_memory": "capped"}, (1, -0.5)),
        ({"memdec_memory": "capped", "memdec_alpha": "auto"}, (1, -1.0)),
        ({"memdec_memory": "fixed"}, (2, 0.4)),
        ({"memdec_memory": "none", "memdec_alpha": "auto"}, (NO_MEMORY, 0.0)),
    ],
)
def test_choice_with_gates(extra_args, choice):
    """What a memory with a gate is asked for is the most that the gate may give."""
    choices = Choices({"law": "auto", "capped": 0.5, "fixed": 0.4}, "law", {"law", "capped"})
    check_extra_args(extra_args, choices)
    assert choices.resolve(extra_args) == choice
    with pytest.raises(ValueError, match="or alpha_by_context, which the memory 'fixed' has not"):
        check_extra_args({"memdec_memory": "fixed", "memdec_alpha": "auto"}, choices)
    with pytest.raises(ValueError, match="memdec_alpha must be"):
        check_extra_args({"memdec_alpha": "Auto"}, choices)


def test_default_none():
    assert Choices({"law": 0.6}, "none").resolve(None) == (NO_MEMORY, 0.0)
