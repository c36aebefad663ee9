"""The mixture on a GPU, by two plans that do the same arithmetic; interpolate.py has the formula.

  * split: one program for SLICE columns of a row, two launches: normalisers of all slices, then
    each slice of the mixture, the last rows first: what was read last is still in the L2 cache;
  * whole: one program a row, one launch, which sweeps the row twice. For rows of one slice.

Whole is one slice, or, where bits must not depend on the plan, combines the same slices in the same
order.

Threads hold VECTOR columns side by side and load them at once: 16 bytes in bf16. A mask that cuts a
vector forbids that, so the vectors that V and `shared` cut, the edges, are handled on their own.
"""

from __future__ import annotations

from vllm_memdec.kernels import weights as given
from vllm_memdec.kernels.rows import jit, tl, triton

if triton is not None:
    VECTOR = tl.constexpr(8)
    LOWEST = tl.constexpr(-3.4028234663852886e38)
    NEGLIGIBLE = tl.constexpr(-200.0)  # exp() of it is 0 in float32
    KEEP_NAN = tl.constexpr(tl.PropagateNan.ALL)
    PARTS, LARGEST = tl.constexpr(given.PARTS), tl.constexpr(given.LARGEST)
    SHRINK = tl.constexpr(1 / given.STEP)


@jit
def _columns(start, BLOCK: tl.constexpr):
    """Return BLOCK columns from `start` on as [BLOCK / VECTOR, VECTOR]."""
    vector = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR
    return start + vector + tl.arange(0, VECTOR)[None, :]


@jit
def _masks(columns, V, shared, reach, EDGES: tl.constexpr):
    """Return which columns of base and memory are read in whole vectors, by bounds that divide.

    reach: columns of the memory that are wanted, `shared` or 0.
    """
    base_end, memory_end = V // VECTOR * VECTOR, shared // VECTOR * VECTOR
    inside = columns < base_end
    if EDGES:
        inside &= (columns < memory_end) | (columns >= memory_end + VECTOR)
    return inside, columns < reach // VECTOR * VECTOR


@jit
def _edges(V, shared):
    """Return the columns [2, VECTOR] of the cut vectors, and which of them the base has."""
    base_end, memory_end = V // VECTOR * VECTOR, shared // VECTOR * VECTOR
    ends = tl.where(tl.arange(0, 2) == 0, memory_end, base_end)[:, None]
    again = (tl.arange(0, 2) == 1)[:, None] & (ends == memory_end)  # one vector, not two
    columns = ends + tl.arange(0, VECTOR)[None, :]
    return columns, (columns < V) & ~again


@jit
def _load(row, columns, mask):
    return tl.load(row + columns, mask=mask, other=float("-inf"))


@jit
def _exp(x):
    """Return exp(x) in two instructions; tl.exp spends three more on results below 2^-126."""
    return tl.exp2(x * 1.4426950408889634)


@jit
def _log1p(x):
    """Return log(1 + x) for x in [0, 1] within 1.5e-7; tl.log takes twice as many instructions."""
    p = x * -0.006452583242207766 + 0.036084406077861786
    p = p * x - 0.09532231092453003
    p = p * x + 0.16764770448207855
    p = p * x - 0.24073068797588348
    p = p * x + 0.3317982256412506
    p = p * x - 0.4998740553855896
    p = p * x + 0.9999964237213135
    return p * x


@jit
def _add(x, sums, MOMENT: tl.constexpr):
    """Add x [L, VECTOR] to each lane's triple: peak, sum exp(x - peak), sum (x - peak) exp(...)."""
    x = x.to(tl.float32)
    peak, total, moment = sums
    higher = tl.maximum(peak, tl.max(x, axis=1))
    down = tl.maximum(peak - higher, NEGLIGIBLE)
    below = x - higher[:, None]
    share = _exp(below)
    if MOMENT:
        # -inf has no share in the entropy: its difference must not be multiplied by 0.
        lost = tl.sum(tl.maximum(below, NEGLIGIBLE) * share, axis=1)
        moment = (moment + down * total) * _exp(down) + lost
    return higher, total * _exp(down) + tl.sum(share, axis=1), moment


@jit
def _merge(sums, MOMENT: tl.constexpr):
    """Return one such triple for all lanes."""
    peak, total, moment = sums
    top = tl.max(peak, axis=0)
    down = tl.maximum(peak - top, NEGLIGIBLE)
    merged = top  # a number of the right type, which nothing reads
    if MOMENT:
        merged = tl.sum((moment + down * total) * _exp(down), axis=0)
    return top, tl.sum(total * _exp(down), axis=0), merged


@jit
def _nothing(LANES: tl.constexpr):
    """Return the triple of no columns. Starting at the lowest finite number, not at -inf, keeps
    exp(-inf - peak) a plain 0."""
    zeros = tl.zeros((LANES,), tl.float32)
    return zeros + LOWEST, zeros, zeros


@jit
def _sum_slice(
    base, memory, start, end, V, shared,
    MOMENT: tl.constexpr, EDGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the triples of base and memory over the whole vectors of columns start..end."""
    # Lanes are merged after the loop: no exchange between threads inside it.
    b_sums, m_sums = _nothing(BLOCK // VECTOR), _nothing(BLOCK // VECTOR)
    for at in range(start, end, BLOCK):
        columns = _columns(at, BLOCK)
        b_mask, m_mask = _masks(columns, V, shared, shared, EDGES)
        b = _load(base, columns, b_mask)
        m = _load(memory, columns, m_mask)
        b_sums = _add(b, b_sums, False)
        m_sums = _add(m, m_sums, MOMENT)
    return _merge(b_sums, False), _merge(m_sums, MOMENT)


@jit
def _sum_edges(base, memory, V, shared, MOMENT: tl.constexpr):
    """Return the triples of base and memory over the edges."""
    columns, inside = _edges(V, shared)
    b = _load(base, columns, inside)
    m = _load(memory, columns, inside & (columns < shared))
    b_sums, m_sums = _add(b, _nothing(2), False), _add(m, _nothing(2), MOMENT)
    return _merge(b_sums, False), _merge(m_sums, MOMENT)


@jit
def _asked(weights, n, stride, number, COLUMNS: tl.constexpr, GATED: tl.constexpr):
    """Return the weight of row n and whether the row is this memory's; see weights.py."""
    row = weights + n * stride
    a = tl.load(row).to(tl.float32)
    mine = a == a
    if COLUMNS:
        rest = tl.load(row + 1).to(tl.float32) + tl.load(row + 2).to(tl.float32) * SHRINK
        a = tl.clamp(a + rest * SHRINK, -1.0, 1.0, KEEP_NAN)
        if not GATED:
            a = tl.maximum(a, 0.0, KEEP_NAN)
        mine = tl.load(row + PARTS).to(tl.float32) == number
        a = tl.where(mine, a, 0.0)
    return a, mine


@jit
def _gate_weight(a, score, top, entropy, certainty, K, UNITS: tl.constexpr):
    """Return the weight, of a negative one the gate's, -a at most; and 1 minus the weight.

    A weight close to 1 has lost the bits of the latter.
    """
    k = tl.arange(0, UNITS)
    x = tl.load(certainty + k, mask=k < K, other=0.0) * top
    x += tl.load(certainty + K + k, mask=k < K, other=0.0) * entropy
    x += tl.load(certainty + 2 * K + k, mask=k < K, other=0.0)
    x *= 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    rise = tl.sum(x * tl.load(certainty + 3 * K + k, mask=k < K, other=0.0), axis=0)
    z = tl.load(score) + rise
    weight = LARGEST * tl.sigmoid(z)
    rest = (1 - LARGEST) + LARGEST * tl.sigmoid(-z)
    rest = tl.where(weight >= -a, 1 + a, rest)
    # A NaN of the gate's is kept: the row is broken.
    return tl.where(a < 0, tl.minimum(weight, -a, KEEP_NAN), a), tl.where(a < 0, rest, 1 - a)


@jit
def _terms(
    a, b_sums, m_sums, score, certainty, K,
    GATED: tl.constexpr, UNITS: tl.constexpr, AS_LOGITS: tl.constexpr,
):  # fmt: skip
    """Return what _mix needs of a row: its weight, shift and scale of base and of memory.

    The triples are those of all parts of the row.
    """
    b_peak, b_total, none = _merge(b_sums, False)
    m_peak, m_total, m_moment = _merge(m_sums, GATED)
    # No mass: peak and logsum 0, so that -inf - lse stays -inf.
    b_peak, b_total = tl.where(b_total == 0, 0.0, b_peak), tl.where(b_total == 0, 1.0, b_total)
    m_peak, m_total = tl.where(m_total == 0, 0.0, m_peak), tl.where(m_total == 0, 1.0, m_total)
    b_logsum, m_logsum = tl.log(b_total), tl.log(m_total)
    if GATED:
        entropy = m_logsum - m_moment / m_total
        a, keep = _gate_weight(a, score, _exp(-m_logsum), entropy, certainty, K, UNITS)
    else:
        keep = 1 - a
    # log(1-a), log a. The zeros are replaced before the log: the interpreter warns of log(0).
    log_keep = tl.where(a == 1, float("-inf"), tl.log(tl.where(a == 1, 1.0, keep)))
    log_take = tl.where(a == 0, float("-inf"), tl.log(tl.where(a == 0, 1.0, a)))
    if AS_LOGITS:
        # Only the difference of the normalisers is needed. Its rounding error is carried along:
        # between peaks of 1e4 and 3 it is 5e-4, and the memory's best token may end up near 3.
        gap = m_peak.to(tl.float64) - b_peak.to(tl.float64)
        shift = gap.to(tl.float32)
        rounded = (gap - shift.to(tl.float64)).to(tl.float32)
        return a, 0.0, log_keep, shift, log_take + b_logsum - m_logsum - rounded
    return a, b_peak, log_keep - b_logsum, m_peak, log_take - m_logsum


@jit
def _tell(tally, used, weight, mine, first, COUNT: tl.constexpr, TELL: tl.constexpr):
    """Add a row's weight, and the row, to what its memory gave, no NaN; write the weight. Once."""
    if COUNT:
        right = first & mine & (weight == weight)
        tl.atomic_add(tally, weight.to(tl.float64), mask=right, sem="relaxed")
        tl.atomic_add(tally + 1, (weight * 0 + 1).to(tl.float64), mask=right, sem="relaxed")
    if TELL:
        tl.store(used, weight, mask=first)


@jit
def _mix(b, m, terms, AS_LOGITS: tl.constexpr):
    """Return logaddexp of the two, or b itself where the weight is 0."""
    a, b_shift, b_scale, m_shift, m_scale = terms
    b, m = b.to(tl.float32), m.to(tl.float32)
    x = (b - b_shift) + b_scale
    y = (m - m_shift) + m_scale
    # max + log1p(exp(min - max)); where both are -inf, the lowest number stands for the max.
    high = tl.maximum(x, y, KEEP_NAN)
    low = tl.minimum(x, y, KEEP_NAN)
    mixed = high + _log1p(_exp(low - tl.maximum(high, LOWEST)))
    if AS_LOGITS:
        mixed = tl.where(a == 0, b, mixed)
    return mixed


@jit
def _write(
    base, memory, out, start, end, V, shared, terms,
    AS_LOGITS: tl.constexpr, EDGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the mixture of columns start..end, the last ones first, and with them the edges."""
    reach = shared
    if AS_LOGITS:
        reach = tl.where(terms[0] == 0, 0, shared)  # weight 0: the memory is not read
    blocks = tl.cdiv(end - start, BLOCK)
    for i in range(0, blocks):
        columns = _columns(start + (blocks - 1 - i) * BLOCK, BLOCK)
        b_mask, m_mask = _masks(columns, V, shared, reach, EDGES)
        b, m = _load(base, columns, b_mask), _load(memory, columns, m_mask)
        mixed = _mix(b, m, terms, AS_LOGITS)
        # Evicted first: the inputs have to stay in the L2 cache until they are read again.
        tl.store(out + columns, mixed, mask=b_mask, eviction_policy="evict_first")
    if EDGES:
        columns, inside = _edges(V, shared)
        inside &= columns < tl.where(end >= V, V, 0)
        b, m = _load(base, columns, inside), _load(memory, columns, inside & (columns < reach))
        tl.store(out + columns, _mix(b, m, terms, AS_LOGITS), mask=inside)


@jit
def _put(sums, part, here):
    """Return the triple of vectors with that of one part in its place."""
    return (
        tl.where(here, part[0], sums[0]),
        tl.where(here, part[1], sums[1]),
        tl.where(here, part[2], sums[2]),
    )


@jit
def whole_kernel(
    base,  # [N, V]
    memory,  # [N, W]
    weights,  # [N], or columns [N, A]
    score,  # [N]
    certainty,  # [4, K]
    tally,  # [2] in float64: the sum of the weights, and of how many rows
    used,  # [N], the weights
    out,  # [N, V]
    base_stride,
    memory_stride,
    weights_stride,
    out_stride,
    number,  # the memory's number; float32, because the columns are floats
    V,
    shared,  # min(V, W): columns both models have
    K,
    S,  # slices
    blocks,  # iterations of a slice
    PARTIALS: tl.constexpr,  # slices and edges, or the next power of 2
    UNITS: tl.constexpr,  # K, or the next power of 2
    COLUMNS: tl.constexpr,
    KEEP: tl.constexpr,
    GATED: tl.constexpr,
    AS_LOGITS: tl.constexpr,
    COUNT: tl.constexpr,  # whether to add to the tally
    TELL: tl.constexpr,  # whether to write the weights
    EDGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)  # 16k rows of 152k columns pass 2^31 elements
    a, mine = _asked(weights, n, weights_stride, number, COLUMNS, GATED)
    if KEEP & (not mine):
        return
    base += n * base_stride
    memory += n * memory_stride
    if AS_LOGITS:
        S = tl.where(a == 0, 0, S)  # the base's own row needs no normalisers
    i = tl.arange(0, PARTIALS)
    b_sums, m_sums = _nothing(PARTIALS), _nothing(PARTIALS)
    if EDGES:
        b_part, m_part = _sum_edges(base, memory, V, shared, GATED)
        b_sums = _put(b_sums, b_part, i == PARTIALS - 1)
        m_sums = _put(m_sums, m_part, i == PARTIALS - 1)
    for s in range(0, S):
        start = s * blocks * BLOCK
        end = tl.minimum(start + blocks * BLOCK, V)
        b_part, m_part = _sum_slice(base, memory, start, end, V, shared, GATED, EDGES, BLOCK)
        b_sums = _put(b_sums, b_part, i == s)
        m_sums = _put(m_sums, m_part, i == s)
    tl.debug_barrier()  # `out` may be the base: all threads have read it
    terms = _terms(a, b_sums, m_sums, score + n, certainty, K, GATED, UNITS, AS_LOGITS)
    _tell(tally, used + n, terms[0], mine, n >= 0, COUNT, TELL)
    out += n * out_stride
    _write(base, memory, out, 0, V, V, shared, terms, AS_LOGITS, EDGES, BLOCK)


@jit
def _store_partial(at, b_part, m_part):
    for j in tl.static_range(3):
        tl.store(at + j, b_part[j])
        tl.store(at + 3 + j, m_part[j])


@jit
def partial_kernel(
    base, memory, weights, partials,  # [N, PARTIALS, 8]: both triples of each slice, of the edges
    base_stride, memory_stride, weights_stride, number, V, shared, S,
    PARTIALS: tl.constexpr, COLUMNS: tl.constexpr, KEEP: tl.constexpr, GATED: tl.constexpr,
    AS_LOGITS: tl.constexpr, EDGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // S).to(tl.int64)
    s = tl.program_id(0) % S
    a, mine = _asked(weights, n, weights_stride, number, COLUMNS, GATED)
    if (KEEP & (not mine)) | (AS_LOGITS & (a == 0)):
        return
    base += n * base_stride
    memory += n * memory_stride
    at = partials + n * PARTIALS * 8
    start = s * BLOCK
    b_part, m_part = _sum_slice(base, memory, start, start + BLOCK, V, shared, GATED, EDGES, BLOCK)
    _store_partial(at + s * 8, b_part, m_part)
    if EDGES & (s == S - 1):
        b_part, m_part = _sum_edges(base, memory, V, shared, GATED)
        _store_partial(at + (PARTIALS - 1) * 8, b_part, m_part)


@jit
def combine_kernel(
    base, memory, weights, score, certainty, tally, used, partials, out,
    base_stride, memory_stride, weights_stride, out_stride, number, V, shared, K, S,
    PARTIALS: tl.constexpr, UNITS: tl.constexpr, COLUMNS: tl.constexpr, KEEP: tl.constexpr,
    GATED: tl.constexpr, AS_LOGITS: tl.constexpr, COUNT: tl.constexpr, TELL: tl.constexpr,
    EDGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Backwards: the L2 cache still holds the rows that the first launch read last.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    n = (program // S).to(tl.int64)
    s = program % S
    a, mine = _asked(weights, n, weights_stride, number, COLUMNS, GATED)
    if KEEP & (not mine):
        return
    i = tl.arange(0, PARTIALS)
    there = (i < S) | (EDGES & (i == PARTIALS - 1))
    if AS_LOGITS:
        there &= i < tl.where(a == 0, 0, PARTIALS)  # none was stored
    at = partials + (n * PARTIALS + i) * 8
    b_sums = (
        tl.load(at, mask=there, other=LOWEST),
        tl.load(at + 1, mask=there, other=0.0),
        tl.load(at + 2, mask=there, other=0.0),
    )
    m_sums = (
        tl.load(at + 3, mask=there, other=LOWEST),
        tl.load(at + 4, mask=there, other=0.0),
        tl.load(at + 5, mask=there, other=0.0),
    )
    terms = _terms(a, b_sums, m_sums, score + n, certainty, K, GATED, UNITS, AS_LOGITS)
    _tell(tally, used + n, terms[0], mine, s == 0, COUNT, TELL)
    base += n * base_stride
    memory += n * memory_stride
    out += n * out_stride
    start = s * BLOCK
    _write(base, memory, out, start, start + BLOCK, V, shared, terms, AS_LOGITS, EDGES, BLOCK)
