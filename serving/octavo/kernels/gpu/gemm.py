"""The products as kernels. int8: one or two limbs of activations on the tensor cores, scales and sums in the epilogue.

Integer sums are exact, so tiles are chosen for speed alone: every tile gives a row the same bits. Group scales add up
in ascending K. Weights lie [N, stride] with zeros behind K, activations [limbs, M, stride]. The same kernel multiplies
e4m3 (LIMBS 0): its tiles have one BLOCK_K and one kind of instruction on a card, so the order of sums does not depend
on M. The float product has one tile for every M.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.gpu.arithmetic import begin, dot_float, part_sums, product_tile, rounded, scaled_sums


@triton.jit(do_not_specialize=["M"])
def int8_gemm(
    x_ptr,  # [LIMBS, M, K] int8, or [1, M, K] e4m3
    x_scale_ptr,  # [M] float32
    w_ptr,  # [N, K] int8 or e4m3
    w_scale_ptr,  # [GROUPS, N] float32
    correction_ptr,  # [GROUPS, N] int32: input zero point · Σ_k (w − zw), read if HAS_INPUT_ZERO
    zero_ptr,  # [GROUPS, N] int32: zero points of the weights, read if HAS_ZERO
    bias_ptr,  # [N] float32, read if HAS_BIAS
    residual_ptr,  # [M, N] float32, read if HAS_RESIDUAL
    y_ptr,  # [M, N] float32
    M,
    N,
    K,  # a multiple of BLOCK_K; what lies behind the inputs is zero
    stride,  # bytes of a row of x and w
    STEPS_PER_GROUP: tl.constexpr,  # K steps of one group; 0: one group
    LIMBS: tl.constexpr,
    HAS_INPUT_ZERO: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """One tile [BLOCK_M, BLOCK_N] of y. Grid: (tiles,), GROUP_M tiles of M side by side so that weights stay in L2."""
    begin(PDL)
    rows, columns = _tile_of(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    k = tl.arange(0, BLOCK_K)
    # Rows and columns beyond the edge read the last one again: no masks in the loop, and nothing of them is stored.
    x_row = tl.minimum(rows, M - 1).to(tl.int64)
    w_row = tl.minimum(columns, N - 1).to(tl.int64)
    hi_ptrs = x_ptr + x_row[:, None] * stride + k[None, :]
    lo_ptrs = hi_ptrs + M.to(tl.int64) * stride
    w_ptrs = w_ptr + w_row[:, None] * stride + k[None, :]
    zero = tl.minimum(M, 0)
    total = product_tile(
        hi_ptrs, lo_ptrs, w_ptrs, w_row, w_scale_ptr, correction_ptr, zero_ptr, N, K, zero,
        STEPS_PER_GROUP, LIMBS, HAS_INPUT_ZERO, HAS_ZERO, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    _write(total, rows, columns, x_row, w_row, x_scale_ptr, bias_ptr, residual_ptr, y_ptr, M, N, HAS_BIAS, HAS_RESIDUAL)


@triton.jit
def _write(
    total,  # [BLOCK_M, BLOCK_N]: all of a product but the scales of the rows
    rows,
    columns,
    x_row,  # rows and columns within the edges
    w_row,
    x_scale_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    M,
    N,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Scales of the rows, bias, residual; what lies within the edges is stored."""
    y = rounded(total * tl.load(x_scale_ptr + x_row)[:, None], tl.minimum(M, 0))
    if HAS_BIAS:
        y += tl.load(bias_ptr + w_row)[None, :]
    out = rows[:, None].to(tl.int64) * N + columns[None, :]
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + out, mask=inside, other=0.0)
    tl.store(y_ptr + out, y, mask=inside)


@triton.jit(do_not_specialize=["M", "steps"])
def int8_gemm_parts(
    x_ptr,  # as int8_gemm; one group, no zero points
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    sums_ptr,  # [tiles, PARTS, LIMBS, BLOCK_M, BLOCK_N] int32
    arrived_ptr,  # [tiles] int32: how many parts of a tile are done; 0 before and after
    M,
    N,
    K,
    stride,
    steps,  # of BLOCK_K inputs, of one part
    PARTS: tl.constexpr,
    LIMBS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """One part of K of one tile; the part that comes last adds them all up. Grid: (tiles, PARTS), columns first.

    For products whose tiles alone would leave much of the card without work. Integer sums have the same bits in any
    order, so neither the number of parts nor who came last shows.
    """
    begin(PDL)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    rows = (tile // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * steps * BLOCK_K
    k = first + tl.arange(0, BLOCK_K)
    x_row = tl.minimum(rows, M - 1).to(tl.int64)
    w_row = tl.minimum(columns, N - 1).to(tl.int64)
    hi_ptrs = x_ptr + x_row[:, None] * stride + k[None, :]
    lo_ptrs = hi_ptrs + M.to(tl.int64) * stride
    w_ptrs = w_ptr + w_row[:, None] * stride + k[None, :]
    inputs = tl.minimum(K - first, steps * BLOCK_K)
    hi, lo = part_sums(hi_ptrs, lo_ptrs, w_ptrs, inputs, LIMBS, BLOCK_M, BLOCK_N, BLOCK_K)
    SIZE: tl.constexpr = BLOCK_M * BLOCK_N
    inside_tile = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    sums = sums_ptr + tile.to(tl.int64) * (PARTS * LIMBS * SIZE) + inside_tile
    mine = sums + tl.program_id(1) * (LIMBS * SIZE)
    tl.store(mine, hi)
    if LIMBS == 2:
        tl.store(mine + SIZE, lo)
    tl.debug_barrier()  # all threads have stored before one of them says so
    if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == PARTS - 1:
        hi, lo = _all_parts(sums, PARTS, LIMBS, BLOCK_M, BLOCK_N)
        tl.store(arrived_ptr + tile, 0)
        no_sum = tl.zeros((BLOCK_M,), tl.int32)
        total = scaled_sums(
            hi, lo, no_sum, no_sum, w_row, w_scale_ptr, w_scale_ptr, w_scale_ptr, LIMBS, False, False
        )  # fmt: skip
        _write(
            total, rows, columns, x_row, w_row, x_scale_ptr, bias_ptr, residual_ptr, y_ptr, M, N, HAS_BIAS, HAS_RESIDUAL
        )


@triton.jit
def _all_parts(sums, PARTS: tl.constexpr, LIMBS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The parts of a tile added up, both limbs: from L2, where other programs stored them."""
    SIZE: tl.constexpr = BLOCK_M * BLOCK_N
    hi = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    lo = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for i in tl.static_range(PARTS):
        hi += tl.load(sums + i * (LIMBS * SIZE), cache_modifier=".cg")
        if LIMBS == 2:
            lo += tl.load(sums + i * (LIMBS * SIZE) + SIZE, cache_modifier=".cg")
    return hi, lo


@triton.jit
def _tile_of(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Rows [BLOCK_M] and columns [BLOCK_N] of this program."""
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    first = (pid // (GROUP_M * tiles_n)) * GROUP_M
    size = tl.minimum(tiles_m - first, GROUP_M)
    inside = pid % (GROUP_M * tiles_n)
    tile_m = first + inside % size
    tile_n = inside // size
    return tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit(do_not_specialize=["M"])
def float_gemm(
    x_ptr,  # [M, K] float32
    w_ptr,  # [N, K] float32, bfloat16 or float16
    bias_ptr,  # [N] float32, read if HAS_BIAS
    residual_ptr,  # [M, N] float32, read if HAS_RESIDUAL
    y_ptr,  # [M, N] float32
    M,
    N,
    K,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EXACT_TF32: tl.constexpr,  # w is of 16 bits
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile [BLOCK_M, BLOCK_N] of y, sums in ascending K. Grid: (tiles,)."""
    rows, columns = _tile_of(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    x_row = tl.minimum(rows, M - 1).to(tl.int64)
    w_row = tl.minimum(columns, N - 1).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + x_row[:, None] * K + k[None, :]
    w_ptrs = w_ptr + w_row[:, None] * K + k[None, :]
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            inside = (k < K - start)[None, :]
            x = tl.load(x_ptrs, mask=inside, other=0.0)
            w = tl.load(w_ptrs, mask=inside, other=0.0)
        y = dot_float(x, w.to(tl.float32).T, y, EXACT_TF32)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    if HAS_BIAS:
        y += tl.load(bias_ptr + w_row)[None, :]
    out = rows[:, None].to(tl.int64) * N + columns[None, :]
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + out, mask=inside, other=0.0)
    tl.store(y_ptr + out, y, mask=inside)
