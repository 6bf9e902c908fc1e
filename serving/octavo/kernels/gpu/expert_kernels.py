"""Products of many experts in one launch: each tile of rows belongs to one expert, which the device itself found out.

The arithmetic is that of an int8 product for one weight: a row has the bits that its own expert would give it alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.gpu.arithmetic import product_tile, rounded


@triton.jit(do_not_specialize=["M", "num_pairs"])
def grouped_gemm(
    x_ptr,  # [LIMBS, M, K] int8, or [1, M, K] e4m3
    x_scale_ptr,  # [M] float32
    w_ptr,  # [E, N, K] int8 or e4m3
    w_scale_ptr,  # [E, GROUPS, N] float32
    zero_ptr,  # [E, GROUPS, N] int32, read if HAS_ZERO
    correction_ptr,  # [E, GROUPS, N] int32, read if HAS_INPUT_ZERO
    bias_ptr,  # [E, N] float32, read if HAS_BIAS
    order_ptr,  # [pairs] int64: pairs of row and choice, those of one expert side by side
    tile_expert_ptr,  # [tiles] int64: whose rows a tile has; `num_experts`: nobody's
    tile_first_ptr,  # [tiles] int64: the place in `order` of its first pair
    expert_end_ptr,  # [E] int64: the place behind the last pair of an expert
    y_ptr,  # [pairs, N] float32
    M,
    num_pairs,
    num_experts,
    N,
    K,  # a multiple of BLOCK_K; what lies behind the inputs is zero
    stride,  # bytes of a row of x and w
    scales_stride,  # GROUPS · N
    SHARED: tl.constexpr,  # pairs that read one row of x
    STEPS_PER_GROUP: tl.constexpr,
    LIMBS: tl.constexpr,
    HAS_INPUT_ZERO: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile [BLOCK_M, BLOCK_N] of y. Grid: (tiles, columns of tiles)."""
    expert = tl.load(tile_expert_ptr + tl.program_id(0))
    if expert >= num_experts:
        return
    end = tl.load(expert_end_ptr + expert)
    place = tl.load(tile_first_ptr + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    pair = tl.load(order_ptr + tl.minimum(place, end - 1))  # [BLOCK_M] int64
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_row = pair // SHARED
    w_row = tl.minimum(columns, N - 1).to(tl.int64)
    hi_ptrs = x_ptr + x_row[:, None] * stride + k[None, :]
    lo_ptrs = hi_ptrs + M.to(tl.int64) * stride
    w_ptrs = w_ptr + (expert * N + w_row)[:, None] * stride + k[None, :]
    zero = tl.minimum(num_pairs, 0)
    scales = expert * scales_stride
    total = product_tile(
        hi_ptrs, lo_ptrs, w_ptrs, w_row, w_scale_ptr + scales, correction_ptr + scales, zero_ptr + scales, N, K, zero,
        STEPS_PER_GROUP, LIMBS, HAS_INPUT_ZERO, HAS_ZERO, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    y = rounded(total * tl.load(x_scale_ptr + x_row)[:, None], zero)
    if HAS_BIAS:
        y += tl.load(bias_ptr + expert * N + w_row)[None, :]
    inside = (place[:, None] < end) & (columns[None, :] < N)
    tl.store(y_ptr + pair[:, None] * N + columns[None, :], y, mask=inside)
