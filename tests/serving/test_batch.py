"""Memory and weight on their way into rows of bfloat16 and back, no engine."""

import pytest
import torch

from vllm_memdec.batch import (
    Batch,
    ContextTable,
    decode,
    decode_context,
    decode_memory,
    decode_reused,
    encode,
    end_memory,
    graph_sets,
    place_of,
    write_context,
)
from vllm_memdec.request import NO_MEMORY


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
def test_a_memory_that_ends(dtype):
    """Rows beyond it have weight 0; a request that goes on from there has no memory."""
    batch = Batch(2, 64, max_tokens=8, dtype=dtype, device="cpu", lengths=[8, 100])
    memory_B, alpha_B = torch.tensor([0, 0, 1, NO_MEMORY]), torch.tensor([-0.3, 1.0, 0.6, 0.0])
    starts_B = torch.tensor([7, 8, 99, 500])
    batch.write(memory_B, alpha_B, torch.tensor([2, 2, 2, 2]), starts_B=starts_B)
    assert batch.used == [0, 1] and batch.memory_BS[:, 0].tolist() == [0, NO_MEMORY, 1, NO_MEMORY]
    position_N = torch.tensor([7, 8, 8, 9, 99, 100, 500, 501])
    for number, length in enumerate([8, 100]):
        end_memory(batch.columns_TA, position_N, number, length)
    expected = torch.tensor([-0.3, 0, 0, 0, 0.6, 0, 0, 0])
    assert torch.equal(decode(batch.columns_TA), expected)


def test_what_is_asked_stays_on_the_host():
    """Where vLLM builds models with a GPU as the default device."""
    with torch.device("meta"):
        batch = Batch(1, 64, max_tokens=8, dtype=torch.float32, device="cpu", lengths=[4])
    asked = torch.tensor([0, 0]), torch.tensor([0.3, 0.3]), torch.tensor([2, 2])
    batch.write(*asked, starts_B=torch.tensor([3, 4]))
    assert batch.memory_BS[:, 0].tolist() == [0, NO_MEMORY]


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("hidden", [160, 7])
def test_several_memories_in_a_row(dtype, hidden):
    """A place for each, all float32 weights whole, then the columns that rows have once."""
    batch = Batch(
        3, hidden, max_tokens=8, dtype=dtype, device="cpu", lengths=[9, 100, 100], at_once=2
    )
    assert (hidden + batch.columns_TA.shape[1]) % 8 == 0
    assert batch.is_dummy and batch.several and batch.places[2] == [0, 1]
    memory_BS = torch.tensor([[2, 0], [1, NO_MEMORY], [0, 1], [NO_MEMORY] * 2])
    alpha_BS = torch.tensor([[0.37, 1 / 3], [-0.3, 0], [0.2, 1 / 7], [0, 0]])
    lengths_B = torch.tensor([2, 1, 1, 1])
    batch.write(memory_BS, alpha_BS, lengths_B, starts_B=torch.tensor([7, 7, 9, 7]))
    # The third request is past the end of its first memory: the second takes its place.
    memory_BS[2], alpha_BS[2] = torch.tensor([1, NO_MEMORY]), torch.tensor([1 / 7, 0])
    for place in (0, 1):
        rows_NA = place_of(batch.columns_TA, place)[:5]
        wanted = memory_BS[:, place].repeat_interleave(lengths_B)
        assert decode_memory(rows_NA).tolist() == wanted.tolist()
        assert torch.equal(decode(rows_NA), alpha_BS[:, place].repeat_interleave(lengths_B))
    assert (decode_reused(batch.columns_TA, 2)[:5] == -1).all()
    position_N = torch.arange(7, 15)
    write_context(batch.columns_TA, position_N, 2)
    wanted = position_N.float().log1p().to(dtype)
    assert torch.equal(decode_context(batch.columns_TA, 2), wanted)
    end_memory(batch.columns_TA, torch.tensor([8, 9, 9, 9, 9, 0, 0, 0]), 0, 9, 2)
    assert decode(place_of(batch.columns_TA, 1))[:2].tolist() == [alpha_BS[0, 1], 0]

    assert batch.used == [0, 1, 2] and batch.several and not batch.shared
    assert [batch.places[number] for number in (0, 1, 2)] == [[1], [0], [0]]
    tokens = {number: share.tokens.tolist() for number, share in batch.shares.items()}
    assert tokens == {0: [0, 1], 1: [2, 3], 2: [0, 1]}
    batch.write_drafting()  # by each request's first
    assert sorted(batch.shares) == [1, 2] and batch.used == [0, 1, 2] and batch.several
    assert batch.shares[1].tokens.tolist() == [1, 2] and batch.places[2] == [0]
    batch.plan("FULL")
    assert sorted(batch.shares) == [0, 1, 2] and batch.places[1] == [0]
    ones_B = torch.ones(4, dtype=torch.int64)
    batch.write(batch.memory_BS, batch.alpha_BS, ones_B)
    assert sorted(batch.shares) == [0, 1, 2], "all of them run again"
    batch.plan("FULL")
    assert batch.places[1] == [0, 1]
    batch.write(memory_BS[1:2], alpha_BS[1:2], ones_B[:1])
    assert batch.shared and not batch.several and batch.shares[1].tokens is None


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
