"""Attention over the paged cache as kernels: 128-token tiles, 256-token segments, one arithmetic for every query row.

A decode program takes one segment and leaves a partial, `reduce_segments` folds them; a prompt program walks over all
segments of its rows. Both call `_segment` and `_combine`, whose steps are exact integer sums or single float32
operations on single elements, so a row has the same bits either way. Σ e is an integer sum of 2^-23 steps for that
reason.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.gpu.arithmetic import (
    LARGEST,
    LOG2E,
    begin,
    dot_float,
    high_limb,
    integer_bits,
    inverse_scale,
    low_limb,
    row_scale,
)

TILE = tl.constexpr(128)
SEGMENT = tl.constexpr(256)
BLOCK = tl.constexpr(64)
ONE_BITS = tl.constexpr(0x3F800000)  # the bits of 1.0; one unit in the last place from 1 to 2 is 2^-23
STEP = tl.constexpr(1.1920928955078125e-07)  # 2^-23


@triton.jit(do_not_specialize=["table_width", "scale", "max_rows"])
def decode_segments(
    q_ptr,  # [M, H · D] float32
    k_ptr,  # [num_blocks, KV, 64, D_PAD]
    v_ptr,  # [num_blocks, KV, D_PAD, 64]
    k_scale_ptr,  # [num_blocks, KV, 64] float32, read if INT8
    v_scale_ptr,
    query_start_ptr,  # [B + 1] int32
    seq_lens_ptr,  # [B] int32
    tables_ptr,  # [B, table_width] int32
    partial_ptr,  # [B · max_rows, H, num_segments, D] float32
    stats_ptr,  # [B · max_rows, H, num_segments, 2] float32: maximum and sum
    table_width,
    scale,
    max_rows,  # sequences with more query rows are left to prompt_rows
    WINDOW: tl.constexpr,  # 0: none
    KV: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of one kv head
    GROUP_PAD: tl.constexpr,  # the next power of two
    D: tl.constexpr,
    D_PAD: tl.constexpr,  # as stored
    BLOCK_D: tl.constexpr,  # a power of two
    ROWS: tl.constexpr,  # query rows times GROUP_PAD
    INT8: tl.constexpr,
    EXACT_TF32: tl.constexpr,
    PACKED: tl.constexpr,  # the assembler may join packed products and sums: from sm_100 on
    PDL: tl.constexpr = False,
):
    """One segment of one kv head of one sequence with few query rows. Grid: (B, KV, num_segments)."""
    begin(PDL)
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    segment = tl.program_id(2)
    num_segments = tl.num_programs(2)
    first_row = tl.load(query_start_ptr + sequence)
    num_rows = tl.load(query_start_ptr + sequence + 1) - first_row
    seq_len = tl.load(seq_lens_ptr + sequence)
    start = segment * SEGMENT
    if (num_rows > max_rows) | (num_rows == 0) | (start >= seq_len):
        return
    if WINDOW > 0:  # noqa: SIM102  # the first row's window begins behind this segment: so do all
        if start + SEGMENT <= seq_len - num_rows + 1 - WINDOW:
            return
    LIMBS: tl.constexpr = 2 if INT8 else 1
    position, _, valid = _rows(0, first_row, num_rows, seq_len, kv_head, KV, GROUP, GROUP_PAD, ROWS, 1)
    _, twice_at, twice_valid = _rows(0, first_row, num_rows, seq_len, kv_head, KV, GROUP, GROUP_PAD, ROWS, LIMBS)
    q, q_scale = _queries(q_ptr, twice_at, twice_valid, scale, D, BLOCK_D, ROWS, INT8)
    maximum, total, out = _segment(
        q, q_scale, position, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, tables_ptr + sequence * table_width, kv_head,
        start, seq_len, table_width, True, WINDOW, KV, D_PAD, BLOCK_D, ROWS, INT8, EXACT_TF32,
        PACKED,
    )  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    m = tl.arange(0, ROWS)
    row = (sequence * max_rows + m // GROUP_PAD).to(tl.int64)
    place = (row * (KV * GROUP) + kv_head * GROUP + m % GROUP_PAD) * num_segments + segment
    tl.store(stats_ptr + place * 2, maximum, mask=valid)
    tl.store(stats_ptr + place * 2 + 1, total, mask=valid)
    tl.store(partial_ptr + place[:, None] * D + d[None, :], out, mask=valid[:, None] & (d[None, :] < D))


@triton.jit(do_not_specialize=["num_segments", "max_rows"])
def reduce_segments(
    partial_ptr,  # as decode_segments leaves them
    stats_ptr,
    query_start_ptr,
    seq_lens_ptr,
    out_ptr,  # [M, H · D] float32
    num_segments,
    max_rows,  # query rows of a sequence that decode_segments takes
    WINDOW: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    AHEAD: tl.constexpr,  # partials loaded together
    PDL: tl.constexpr = False,
):
    """Fold the segments of one row's head from the left. Grid: (B, H, max_rows)."""
    begin(PDL)
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2)
    first_row = tl.load(query_start_ptr + sequence)
    num_rows = tl.load(query_start_ptr + sequence + 1) - first_row
    if (num_rows > max_rows) | (row >= num_rows):
        return
    position = tl.load(seq_lens_ptr + sequence) - num_rows + row
    d = tl.arange(0, BLOCK_D)
    at = (first_row + row).to(tl.int64) * H + head
    source = ((sequence * max_rows + row).to(tl.int64) * H + head) * num_segments
    maximum = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    out = tl.zeros((1, BLOCK_D), tl.float32)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(0, position + 1 - WINDOW) // SEGMENT
    last = position // SEGMENT
    for base in range(first, last + 1, AHEAD):
        for i in tl.static_range(AHEAD):
            used = base + i <= last
            place = source + base + i + tl.zeros((1,), tl.int32)
            m = tl.load(stats_ptr + place * 2, mask=used, other=float("-inf"))
            s = tl.load(stats_ptr + place * 2 + 1, mask=used, other=0.0)
            o = tl.load(partial_ptr + place[:, None] * D + d[None, :], mask=used & (d[None, :] < D), other=0.0)
            maximum, total, out = _combine(maximum, total, out, m, s, o)
    tl.store(out_ptr + at * D + d[None, :], tl.div_rn(out, total[:, None] + tl.zeros_like(out)), mask=d[None, :] < D)


@triton.jit(do_not_specialize=["table_width", "scale", "min_rows"])
def prompt_rows(
    q_ptr,  # as decode_segments
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    query_start_ptr,
    seq_lens_ptr,
    tables_ptr,
    out_ptr,  # [M, H · D] float32
    table_width,
    scale,
    min_rows,  # sequences with fewer query rows were taken by decode_segments
    WINDOW: tl.constexpr,
    KV: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    INT8: tl.constexpr,
    EXACT_TF32: tl.constexpr,
    PACKED: tl.constexpr,  # the assembler may join packed products and sums: from sm_100 on
):
    """All segments of ROWS / GROUP_PAD query rows of one kv head. Grid: (row tiles, KV, B), last rows first."""
    sequence = tl.program_id(2)
    kv_head = tl.program_id(1)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest work first
    first_row = tl.load(query_start_ptr + sequence)
    num_rows = tl.load(query_start_ptr + sequence + 1) - first_row
    seq_len = tl.load(seq_lens_ptr + sequence)
    QUERIES: tl.constexpr = ROWS // GROUP_PAD
    if (num_rows < min_rows) | (tile * QUERIES >= num_rows):
        return
    LIMBS: tl.constexpr = 2 if INT8 else 1
    first = tile * QUERIES
    position, at, valid = _rows(first, first_row, num_rows, seq_len, kv_head, KV, GROUP, GROUP_PAD, ROWS, 1)
    _, twice_at, twice_valid = _rows(first, first_row, num_rows, seq_len, kv_head, KV, GROUP, GROUP_PAD, ROWS, LIMBS)
    q, q_scale = _queries(q_ptr, twice_at, twice_valid, scale, D, BLOCK_D, ROWS, INT8)
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, BLOCK_D), tl.float32)
    end = seq_len - num_rows + tl.minimum(num_rows, (tile + 1) * QUERIES)
    start = 0
    if WINDOW > 0:
        start = tl.maximum(0, seq_len - num_rows + tile * QUERIES + 1 - WINDOW) // SEGMENT * SEGMENT
    if WINDOW > 0:  # noqa: SIM108
        full = start
    else:  # the first row, and with it all, sees everything before here
        full = (seq_len - num_rows + tile * QUERIES + 1) // SEGMENT * SEGMENT
    table_ptr = tables_ptr + sequence * table_width
    maximum, total, out = _walk(
        maximum, total, out, q, q_scale, position, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, kv_head, start,
        full, table_width, False, WINDOW, KV, D_PAD, BLOCK_D, ROWS, INT8, EXACT_TF32, PACKED,
    )  # fmt: skip
    maximum, total, out = _walk(
        maximum, total, out, q, q_scale, position, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, kv_head, full,
        end, table_width, True, WINDOW, KV, D_PAD, BLOCK_D, ROWS, INT8, EXACT_TF32, PACKED,
    )  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    out = tl.div_rn(out, total[:, None] + tl.zeros_like(out))
    tl.store(out_ptr + at[:, None] * D + d[None, :], out, mask=valid[:, None] & (d[None, :] < D))


@triton.jit
def _walk(
    maximum,  # what was found before, and is joined to
    total,
    out,
    q,  # from here on as _segment
    q_scale,
    position,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    table_ptr,
    kv_head,
    first,  # token of the first segment
    end,
    table_width,
    MASKED: tl.constexpr,  # False: all rows see all tokens, and `end` ends a segment
    WINDOW: tl.constexpr,
    KV: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    INT8: tl.constexpr,
    EXACT_TF32: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Segment after segment, joined in order."""
    for here in range(first, end, SEGMENT):
        last = end if MASKED else here + SEGMENT
        m2, l2, o2 = _segment(
            q, q_scale, position, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, kv_head, here, last, table_width,
            MASKED, WINDOW, KV, D_PAD, BLOCK_D, ROWS, INT8, EXACT_TF32, PACKED,
        )  # fmt: skip
        maximum, total, out = _combine(maximum, total, out, m2, l2, o2)
    return maximum, total, out


@triton.jit
def _rows(
    first,
    first_row,
    num_rows,
    seq_len,
    kv_head,
    KV: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    TIMES: tl.constexpr,
):
    """Position (-1: none), place among all rows' heads, and existence of ROWS heads from query `first`, TIMES over."""
    m = tl.arange(0, TIMES * ROWS) % ROWS
    row = first + m // GROUP_PAD
    valid = (row < num_rows) & (m % GROUP_PAD < GROUP)
    head = kv_head * GROUP + m % GROUP_PAD
    at = ((first_row + row) * (KV * GROUP) + head).to(tl.int64)
    return tl.where(valid, seq_len - num_rows + row, -1), at, valid


@triton.jit
def _queries(q_ptr, at, valid, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, INT8: tl.constexpr):
    """Query heads as limbs int8 [2 · ROWS, BLOCK_D], all hi above all lo, and qs · scale · log2(e) [ROWS].

    `at` and `valid` are [2 · ROWS], the rows twice: what multiplies the limbs is read once. For a float cache they are
    [ROWS], and the result is q itself and scale · log2(e).
    """
    d = tl.arange(0, BLOCK_D)
    q = tl.load(q_ptr + at[:, None] * D + d[None, :], mask=valid[:, None] & (d[None, :] < D), other=0.0)
    if INT8:
        absmax = tl.max(tl.abs(q), 1)
        bits = integer_bits(tl.minimum(q * inverse_scale(absmax, 32512.0)[:, None], 32512.0))
        limb = tl.where((tl.arange(0, 2 * ROWS) < ROWS)[:, None], high_limb(bits), low_limb(bits))
        absmax = tl.max(tl.reshape(absmax, (2, ROWS)), 0)
        return limb, (row_scale(absmax, 32512.0) * scale) * LOG2E
    else:
        return q, tl.zeros((ROWS,), tl.float32) + scale * LOG2E


@triton.jit
def _unstack(sums, ROWS: tl.constexpr):
    """256 · hi + lo of the sums [2 · ROWS, N] of a stacked product, float32 [ROWS, N]."""
    N: tl.constexpr = sums.shape[1]
    high, low = tl.split(tl.permute(tl.reshape(sums, (2, ROWS, N)), (1, 2, 0)))
    return ((high << 8) + low).to(tl.float32)


@triton.jit
def _segment(
    q,  # as _queries gives them
    q_scale,
    position,  # [ROWS] of each row; -1: sees nothing
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    table_ptr,  # blocks of this sequence
    kv_head,
    start,  # first token of the segment
    end,  # tokens from here on are visible to no row
    table_width,
    MASKED: tl.constexpr,  # False: all rows see all tokens of the segment
    WINDOW: tl.constexpr,
    KV: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    INT8: tl.constexpr,
    EXACT_TF32: tl.constexpr,
    PACKED: tl.constexpr,  # the assembler may join packed products and sums: from sm_100 on
):
    """Maximum (of s · log2(e)), sum and output of the tokens of one segment: two tiles, joined."""
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for base in range(start, tl.minimum(start + SEGMENT, end), TILE):
        t = base + tl.arange(0, TILE)
        d = tl.arange(0, BLOCK_D)
        block, offset, k_at, v_at = _tile(k_ptr, v_ptr, table_ptr, kv_head, base, d, table_width, KV, D_PAD)
        if D_PAD == BLOCK_D:
            k = tl.load(k_at)
            v = tl.load(v_at)
        else:
            k = tl.load(k_at, mask=(d < D_PAD)[None, :], other=0.0)
            v = tl.load(v_at, mask=(d < D_PAD)[:, None], other=0.0)
        visible = t[None, :] <= position[:, None]
        if WINDOW > 0:
            visible = visible & (t[None, :] > position[:, None] - WINDOW)
        if INT8:
            k_scale = tl.load(k_scale_ptr + block * BLOCK + offset)
            s = _unstack(tl.dot(q, k.T, out_dtype=tl.int32), ROWS) * (q_scale[:, None] * k_scale[None, :])
        else:
            s = dot_float(q, k.to(tl.float32).T, tl.zeros((ROWS, TILE), tl.float32), EXACT_TF32) * q_scale[:, None]
        if MASKED:
            s = tl.where(visible, s, float("-inf"))
        elif PACKED:  # as `rounded`, which where and minimum do as well
            s = tl.minimum(s, LARGEST)
        m = tl.max(s, 1)
        e = tl.exp2(s - _finite(m)[:, None])  # 0 where not visible
        # 1 + e is 1 and a whole number of steps: their sum is exact in any order.
        steps = tl.sum((e + 1.0).to(tl.int32, bitcast=True) - ONE_BITS, 1)
        if INT8:
            w = e * tl.load(v_scale_ptr + block * BLOCK + offset)[None, :]
            if MASKED:
                w = tl.where(visible, w, 0.0)
            o = _weighted(w, v, PACKED)
        else:
            if MASKED:  # what nobody wrote may be anything, and 0 · nan would spoil the sum
                v = tl.where((t < end)[None, :], v, 0.0)
            o = dot_float(e, v.to(tl.float32).T, tl.zeros((ROWS, BLOCK_D), tl.float32), EXACT_TF32)
        maximum, total, out = _combine(maximum, total, out, m, steps.to(tl.float32) * STEP, o)
    return maximum, total, out


@triton.jit
def _tile(k_ptr, v_ptr, table_ptr, kv_head, base, d, table_width, KV: tl.constexpr, D_PAD: tl.constexpr):
    """Where the tile from token `base` lies: block · KV + kv head and place in the block [TILE], pointers to K
    [TILE, BLOCK_D] and to V [BLOCK_D, TILE].
    """
    # A tile's last block may be beyond the table: nobody sees its tokens, any block may stand in.
    entry = tl.minimum(base // BLOCK + tl.arange(0, TILE) // BLOCK, table_width - 1)
    block = tl.max_constancy(tl.load(table_ptr + entry).to(tl.int64) * KV + kv_head, [BLOCK])  # [TILE]
    offset = tl.arange(0, TILE) % BLOCK
    k_at = k_ptr + (block * BLOCK + offset)[:, None] * D_PAD + d[None, :]
    v_at = v_ptr + (block * D_PAD * BLOCK + offset)[None, :] + d[:, None] * BLOCK
    return block, offset, k_at, v_at


@triton.jit
def _weighted(w, v, PACKED: tl.constexpr):
    """Σ_t w[t] · V[t], w [ROWS, TILE] written as two limbs with a scale per row, v [BLOCK_D, TILE] int8."""
    a = tl.max(w, 1)
    inverse = tl.where(a > 0.0, tl.minimum(32512.0 / tl.where(a > 0.0, a, 1.0), LARGEST), 0.0)
    w = w * inverse[:, None]
    if PACKED:
        w = tl.minimum(w, 32512.0)
    bits = integer_bits(w)
    sums = tl.dot(high_limb(bits), v.T, out_dtype=tl.int32) << 8
    sums = tl.dot(low_limb(bits), v.T, sums, out_dtype=tl.int32)
    return sums.to(tl.float32) * (a * (1.0 / 32512.0))[:, None]


@triton.jit
def _finite(m):
    """m, or 0 for a row that saw nothing."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _combine(m1, l1, o1, m2, l2, o2):
    """Join two partials. A partial that saw nothing (m = -inf, l = 0, o = 0) leaves the other's bits as they are."""
    m = tl.maximum(m1, m2)
    f1 = tl.exp2(m1 - _finite(m))
    f2 = tl.exp2(m2 - _finite(m))
    # Fused here and everywhere: written so, the compiler has no choice that could differ between kernels.
    return m, tl.fma(l2, f2, l1 * f1), tl.fma(o2, f2[:, None] + tl.zeros_like(o2), o1 * f1[:, None])
