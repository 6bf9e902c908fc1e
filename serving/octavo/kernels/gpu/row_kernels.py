"""Kernels over single rows: embedding, quantisation, RMS norm, SiLU, expert routing and mixing. One program a row.

A row lies in one block, so its sums have one order whatever the batch is; sums that matter run in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.gpu.arithmetic import (
    begin,
    exp_accurate,
    high_limb,
    integer_bits,
    inverse_scale,
    low_limb,
    rint,
    rounded,
    row_scale,
)

TAKEN = tl.constexpr(-2147483648)
LARGEST_E4M3 = tl.constexpr(448.0)


@triton.jit
def embedding(
    ids_ptr,  # [M] int64
    table_ptr,  # [V, H]
    y_ptr,  # [M, H] float32
    V,
    H,
    BLOCK: tl.constexpr,
):
    """Rows of the table as float32. An id outside the table gives its nearest row. Grid: (M, column blocks)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.minimum(tl.maximum(tl.load(ids_ptr + row), 0), V - 1)
    x = tl.load(table_ptr + token * H + column, mask=column < H, other=0.0)
    tl.store(y_ptr + row * H + column, x.to(tl.float32), mask=column < H)


@triton.jit(do_not_specialize=["M", "static_inverse", "static_scale"])
def quantize_rows(
    x_ptr,  # [M, K] float32
    absmax_ptr,  # [M] float32, read if HAS_ABSMAX
    q_ptr,  # [LIMBS, M, stride] int8 or e4m3
    scale_ptr,  # [M] float32
    M,
    K,
    stride,
    static_inverse,
    static_scale,
    HAS_ABSMAX: tl.constexpr,
    LIMBS: tl.constexpr,
    STATIC: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    BLOCK: tl.constexpr,  # at least stride
    PDL: tl.constexpr = False,
):
    """Rows as integers. Grid: (M,)."""
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * K + column, mask=column < K, other=0.0)
    if HAS_ABSMAX:  # noqa: SIM108
        absmax = tl.load(absmax_ptr + row)
    else:
        absmax = tl.max(tl.abs(x), 0)
    _write(
        x, absmax, row, column, q_ptr, scale_ptr, M, K, stride, static_inverse, static_scale, LIMBS, STATIC, ZERO_POINT
    )


@triton.jit(do_not_specialize=["M", "static_inverse", "static_scale"])
def rms_norm(
    x_ptr,  # [M, K] float32, becomes x + add if HAS_ADD
    add_ptr,  # [M, K] float32
    weight_ptr,  # [K] float32
    y_ptr,  # [M, K] float32 if LIMBS is 0, else [LIMBS, M, stride] int8 or e4m3
    scale_ptr,  # [M] float32
    M,
    K,
    stride,
    static_inverse,
    static_scale,
    EPS: tl.constexpr,
    HAS_ADD: tl.constexpr,
    LIMBS: tl.constexpr,
    STATIC: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """(r · rsqrt(mean(r²) + eps)) · weight, the sum in float64. Grid: (M,)."""
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < K
    r = tl.load(x_ptr + row * K + column, mask=inside, other=0.0)
    if HAS_ADD:
        r += tl.load(add_ptr + row * K + column, mask=inside, other=0.0)
        tl.store(x_ptr + row * K + column, r, mask=inside)
    wide = r.to(tl.float64)
    mean = tl.sum(wide * wide, 0) / K.to(tl.float64)
    inverse = (1.0 / tl.sqrt(mean + EPS)).to(tl.float32)
    y = (r * inverse) * tl.load(weight_ptr + column, mask=inside, other=0.0)
    if LIMBS == 0:
        tl.store(y_ptr + row * K + column, y, mask=inside)
    else:
        absmax = tl.max(tl.abs(y), 0)
        _write(
            y, absmax, row, column, y_ptr, scale_ptr, M, K, stride, static_inverse, static_scale, LIMBS, STATIC,
            ZERO_POINT,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "static_inverse", "static_scale"])
def silu_mul(
    x_ptr,  # [M, 2 · K] float32: gate, up
    y_ptr,  # as rms_norm
    scale_ptr,
    M,
    K,
    stride,
    static_inverse,
    static_scale,
    LIMBS: tl.constexpr,
    STATIC: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """silu(gate) · up. Grid: (M, 1); as floats (M, column blocks)."""
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < K
    gate = tl.load(x_ptr + row * 2 * K + column, mask=inside, other=0.0)
    up = tl.load(x_ptr + row * 2 * K + K + column, mask=inside, other=0.0)
    y = tl.div_rn(gate, 1.0 + exp_accurate(-gate)) * up
    if LIMBS == 0:
        tl.store(y_ptr + row * K + column, y, mask=inside)
    else:
        absmax = tl.max(tl.abs(y), 0)
        _write(
            y, absmax, row, column, y_ptr, scale_ptr, M, K, stride, static_inverse, static_scale, LIMBS, STATIC,
            ZERO_POINT,
        )  # fmt: skip


@triton.jit
def _write(
    x,  # [BLOCK] float32, 0 behind K
    absmax,
    row,
    column,
    q_ptr,
    scale_ptr,
    M,
    K,
    stride,
    static_inverse,
    static_scale,
    LIMBS: tl.constexpr,
    STATIC: tl.constexpr,
    ZERO_POINT: tl.constexpr,
):
    """Quantise a row and store it with zeros behind K."""
    place = q_ptr + row * stride + column
    if q_ptr.dtype.element_ty == tl.float8e4nv:
        scaled = x * static_inverse if STATIC else x * inverse_scale(absmax, LARGEST_E4M3)
        scaled = tl.minimum(tl.maximum(scaled, -LARGEST_E4M3), LARGEST_E4M3)
        tl.store(place, scaled.to(tl.float8e4nv), mask=column < stride)
        tl.store(scale_ptr + row, static_scale if STATIC else row_scale(absmax, LARGEST_E4M3))
    elif STATIC:
        # Clamped before it is rounded: the same integers, and the rounding stays in its range.
        q = rint(tl.minimum(tl.maximum(x * static_inverse, -1024.0), 1024.0)) + ZERO_POINT
        q = tl.minimum(tl.maximum(q, -128.0), 127.0)
        tl.store(place, tl.where(column < K, q, 0.0).to(tl.int8), mask=column < stride)
        tl.store(scale_ptr + row, static_scale)
    else:
        RANGE: tl.constexpr = 127.0 if LIMBS == 1 else 32512.0
        scaled = tl.minimum(tl.maximum(x * inverse_scale(absmax, RANGE), -RANGE), RANGE)
        bits = integer_bits(scaled)
        if LIMBS == 1:
            tl.store(place, low_limb(bits), mask=column < stride)
        else:
            tl.store(place, high_limb(bits), mask=column < stride)
            tl.store(place + M.to(tl.int64) * stride, low_limb(bits), mask=column < stride)
        tl.store(scale_ptr + row, row_scale(absmax, RANGE))


@triton.jit
def moe_route(
    z_ptr,  # [M, E] float32
    ids_ptr,  # [M, TOP_K] int64
    weights_ptr,  # [M, TOP_K] float32
    E,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The TOP_K experts of a row, the larger logit first, the lower id of equals. Grid: (M,)."""
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    z = tl.load(z_ptr + row * E + expert, mask=expert < E, other=float("-inf"))
    e = exp_accurate(z - tl.max(z, 0))
    e = tl.where(expert < E, e, 0.0)
    total = tl.sum(e.to(tl.float64), 0).to(tl.float32)
    p = tl.div_rn(e, total + tl.zeros_like(e))
    bits = (z + 0.0).to(tl.int32, bitcast=True)  # + 0: both zeros are one
    key = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    key = tl.where(expert < E, key, TAKEN)
    share = 0.0
    for i in tl.static_range(TOP_K):
        best = tl.argmax(key, 0, tie_break_left=True)
        weight = tl.sum(tl.where(expert == best, p, 0.0), 0)
        tl.store(ids_ptr + row * TOP_K + i, best.to(tl.int64))
        tl.store(weights_ptr + row * TOP_K + i, weight)
        share += weight
        key = tl.where(expert == best, TAKEN, key)
    if RENORMALIZE:
        tl.debug_barrier()
        for i in tl.static_range(TOP_K):
            at = weights_ptr + row * TOP_K + i
            tl.store(at, tl.div_rn(tl.load(at), share))


@triton.jit(do_not_specialize=["M"])
def moe_combine(
    x_ptr,  # [M, TOP_K, H] float32
    weights_ptr,  # [M, TOP_K] float32
    y_ptr,  # [M, H] float32
    M,
    H,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """((w0 · y0) + w1 · y1) + … Grid: (M, column blocks)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    zero = tl.minimum(M, 0)
    y = tl.load(x_ptr + row * TOP_K * H + column, mask=inside, other=0.0) * tl.load(weights_ptr + row * TOP_K)
    y = rounded(y, zero)
    for i in tl.static_range(1, TOP_K):
        part = tl.load(x_ptr + (row * TOP_K + i) * H + column, mask=inside, other=0.0)
        y += rounded(part * tl.load(weights_ptr + row * TOP_K + i), zero)
    tl.store(y_ptr + row * H + column, y, mask=inside)
