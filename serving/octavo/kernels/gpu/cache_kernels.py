"""The kernel that rotates queries and keys, quantises keys and values, and writes them into the paged cache."""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.gpu.arithmetic import begin, inverse_scale, rint, rounded, row_scale


@triton.jit(do_not_specialize=["M"])
def rope_write(
    x_ptr,  # [M, (H + 2 · KV) · D] float32: q heads, k heads, v heads
    q_ptr,  # [M, H · D] float32
    table_ptr,  # [max_position, 2 · HALF] float32: cos, sin
    positions_ptr,  # [M] int32
    slots_ptr,  # [M] int32; negative: a row that fills a bucket, nothing of it is written to the cache
    k_ptr,  # [num_blocks, KV, 64, D_PAD]
    v_ptr,  # [num_blocks, KV, D_PAD, 64]
    k_scale_ptr,  # [num_blocks, KV, 64] float32, written if INT8 and not STATIC_K
    v_scale_ptr,
    k_inverse_ptr,  # [KV] float32, read if STATIC_K
    v_inverse_ptr,
    q_norm_ptr,  # [D] float32, read if Q_NORM
    k_norm_ptr,
    M,
    HALF: tl.constexpr,  # pairs that turn
    H: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    EPS: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    INT8: tl.constexpr,
    STATIC_K: tl.constexpr,
    STATIC_V: tl.constexpr,
    HEADS: tl.constexpr,  # heads of one program
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """HEADS heads of one row. Grid: (M, head blocks)."""
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, BLOCK_D)
    is_q = head < H
    is_k = (head >= H) & (head < H + KV)
    is_v = (head >= H + KV) & (head < H + 2 * KV)
    inside = (head < H + 2 * KV)[:, None] & (d < D)[None, :]
    angles = table_ptr + tl.load(positions_ptr + row).to(tl.int64) * (2 * HALF)
    x = _rotated(
        x_ptr + (row * (H + 2 * KV) + head)[:, None] * D, inside, q_norm_ptr, k_norm_ptr, angles, d, is_q, is_k,
        tl.minimum(M, 0), HALF, D, EPS, Q_NORM, K_NORM,
    )  # fmt: skip
    tl.store(q_ptr + (row * H + head)[:, None] * D + d[None, :], x, mask=inside & is_q[:, None])
    slot = tl.load(slots_ptr + row).to(tl.int64)
    kv_head = tl.where(is_k, head - H, head - H - KV)
    place = (slot // 64) * KV + kv_head  # [HEADS]
    offset = slot % 64
    k_mask = is_k & (slot >= 0)
    v_mask = is_v & (slot >= 0)
    if INT8:
        stored, scale = _quantized(x, is_k, kv_head, k_mask, v_mask, k_inverse_ptr, v_inverse_ptr, STATIC_K, STATIC_V)
        if not STATIC_K:
            tl.store(k_scale_ptr + place * 64 + offset, scale, mask=k_mask)
        if not STATIC_V:
            tl.store(v_scale_ptr + place * 64 + offset, scale, mask=v_mask)
    else:
        stored = x.to(k_ptr.dtype.element_ty)
    k_at = k_ptr + (place * 64 + offset)[:, None] * D_PAD + d[None, :]
    v_at = v_ptr + (place * D_PAD * 64 + offset)[:, None] + d[None, :] * 64
    tl.store(k_at, stored, mask=inside & k_mask[:, None])
    tl.store(v_at, stored, mask=inside & v_mask[:, None])


@triton.jit
def _rotated(
    here,  # [HEADS, 1] pointers to the heads
    inside,
    q_norm_ptr,
    k_norm_ptr,
    angles,
    d,
    is_q,
    is_k,
    zero,  # as `rounded` takes it
    HALF: tl.constexpr,
    D: tl.constexpr,
    EPS: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
):
    """The heads [HEADS, BLOCK_D]: normed where there is a norm, queries and keys turned."""
    partner = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
    x = tl.load(here + d[None, :], mask=inside, other=0.0)
    other = tl.load(here + partner[None, :], mask=inside, other=0.0)
    if Q_NORM or K_NORM:
        wide = x.to(tl.float64)
        inverse = (1.0 / tl.sqrt(tl.sum(wide * wide, 1) / D + EPS)).to(tl.float32)[:, None]
        if Q_NORM:
            x, other = _normed(x, other, inverse, q_norm_ptr, d, partner, is_q, D)
        if K_NORM:
            x, other = _normed(x, other, inverse, k_norm_ptr, d, partner, is_k, D)
    if HALF > 0:
        x = _turned(x, other, angles, d, (is_q | is_k)[:, None], zero, HALF)
    return x


@triton.jit
def _quantized(
    x, is_k, kv_head, k_mask, v_mask, k_inverse_ptr, v_inverse_ptr, STATIC_K: tl.constexpr, STATIC_V: tl.constexpr
):
    """Heads as int8 [HEADS, BLOCK_D] and their dynamic scales [HEADS]."""
    absmax = tl.max(tl.abs(x), 1)
    bound = inverse_scale(absmax, 127.0)
    k_inverse = tl.load(k_inverse_ptr + kv_head, mask=k_mask, other=0.0) if STATIC_K else bound
    v_inverse = tl.load(v_inverse_ptr + kv_head, mask=v_mask, other=0.0) if STATIC_V else bound
    scaled = x * tl.where(is_k, k_inverse, v_inverse)[:, None]
    return rint(tl.minimum(tl.maximum(scaled, -128.0), 127.0)).to(tl.int8), row_scale(absmax, 127.0)


@triton.jit
def _turned(x, other, angles, d, chosen, zero, HALF: tl.constexpr):
    """Rotated by cos and sin at `angles`: element d with its partner, for the chosen heads."""
    pair = tl.where(d < HALF, d, d - HALF)
    cos = tl.load(angles + pair, mask=d < 2 * HALF, other=0.0)[None, :]
    sin = tl.load(angles + HALF + pair, mask=d < 2 * HALF, other=0.0)[None, :]
    along, across = rounded(x * cos, zero), rounded(other * sin, zero)
    turned = tl.where((d < HALF)[None, :], along - across, along + across)
    return tl.where((d < 2 * HALF)[None, :] & chosen, turned, x)


@triton.jit
def _normed(x, other, inverse, weight_ptr, d, partner, chosen, D: tl.constexpr):
    """(x · inverse) · weight for the chosen heads, of each element and of its partner."""
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0)[None, :]
    partner_weight = tl.load(weight_ptr + partner, mask=d < D, other=0.0)[None, :]
    x = tl.where(chosen[:, None], (x * inverse) * weight, x)
    return x, tl.where(chosen[:, None], (other * inverse) * partner_weight, other)
