"""The paged cache of one layer, and what is written into it, in plain torch.

Owns the block layout of the reference backend, rotary embedding, the norm of single heads, and how cached rows are
quantised. Runs wherever the reference backend runs; it does not know about attention or about sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.interface import BLOCK, CacheSpec, HeadLayout
from octavo.kernels.reference.rows import quantize_rows

NORM_LANES = 8  # sums of squares of a head run in this many float64 lanes, folded left to right


class ReferenceCache:
    """Blocks of one layer: values [num_blocks, 64, num_kv_heads, head_dim], scales [num_blocks, 64, num_kv_heads]."""

    def __init__(self, spec: CacheSpec, num_blocks: int) -> None:
        check_spec(spec)
        self.spec = spec
        self.num_blocks = num_blocks
        self.nbytes = num_blocks * block_bytes(spec)
        shape = (num_blocks, BLOCK, spec.num_kv_heads, spec.head_dim)
        self.k = torch.zeros(shape, dtype=spec.dtype)
        self.v = torch.zeros(shape, dtype=spec.dtype)
        self.k_scale = static_scales(spec.k_scale, spec, num_blocks)  # [num_blocks, 64, num_kv_heads], int8 only
        self.v_scale = static_scales(spec.v_scale, spec, num_blocks)

    def rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """K and V [num_blocks, 64, num_kv_heads, head_dim] and scales [num_blocks, 64, num_kv_heads] (int8 only)."""
        return self.k, self.v, self.k_scale, self.v_scale

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store rows k and v [M, num_kv_heads, head_dim] float32 at slots [M] (block id · 64 + offset)."""
        spec = self.spec
        if spec.dtype != torch.int8:
            self.k.flatten(0, 1)[slots.long()] = k.to(spec.dtype)
            self.v.flatten(0, 1)[slots.long()] = v.to(spec.dtype)
            return
        for values, scales, x, static in (
            (self.k, self.k_scale, k, spec.k_scale),
            (self.v, self.v_scale, v, spec.v_scale),
        ):
            if static is None:
                q, scale = quantize_heads(x, limbs=1)
                scales.flatten(0, 1)[slots.long()] = scale
            else:
                inverse = torch.reciprocal(static.float()).reshape(-1, 1)  # [num_kv_heads or 1, 1]
                q = torch.clamp(torch.round(x * inverse), -128, 127)
            values.flatten(0, 1)[slots.long()] = q.to(torch.int8)


def check_spec(spec: CacheSpec) -> None:
    """Raise ValueError for what no backend stores."""
    if spec.head_dim % 8 or not 8 <= spec.head_dim <= 256:
        raise ValueError(f"head_dim must be a multiple of 8 up to 256, not {spec.head_dim}")
    if spec.dtype not in (torch.int8, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"a cache of {spec.dtype} is not supported")
    for scale in (spec.k_scale, spec.v_scale):
        if scale is not None and scale.numel() not in (1, spec.num_kv_heads):
            raise ValueError(f"static scales must be [1] or [{spec.num_kv_heads}], not {list(scale.shape)}")


def check_heads(heads: HeadLayout, spec: CacheSpec, *, most: int) -> None:
    """Raise ValueError unless a layer's heads fit its cache; a backend lets `most` heads share a kv head."""
    if (heads.num_kv_heads, heads.head_dim) != (spec.num_kv_heads, spec.head_dim):
        have, want = (f"{x.num_kv_heads} heads of {x.head_dim}" for x in (spec, heads))
        raise ValueError(f"a cache of {have} for a layer of {want}")
    if heads.num_heads % heads.num_kv_heads or heads.num_heads // heads.num_kv_heads > most:
        raise ValueError(f"{heads.num_heads} heads cannot share {heads.num_kv_heads} kv heads")


def block_bytes(spec: CacheSpec) -> int:
    """Bytes of one block: K, V, and for int8 their scales."""
    rows = 2 * BLOCK * spec.num_kv_heads
    return rows * (spec.head_dim * spec.dtype.itemsize + (4 if spec.dtype == torch.int8 else 0))


def static_scales(static: Tensor | None, spec: CacheSpec, num_blocks: int) -> Tensor:
    """Scale plane of new blocks [num_blocks, 64, num_kv_heads]: zeros, or the static scale everywhere."""
    plane = torch.zeros(num_blocks if spec.dtype == torch.int8 else 0, BLOCK, spec.num_kv_heads)
    return plane if static is None else plane + static.float().reshape(-1)


def quantize_heads(x: Tensor, *, limbs: int) -> tuple[Tensor, Tensor]:
    """[..., D] float32 → integers [..., D] int32 and scale [...], each vector like a row of the products."""
    rows = x.flatten(0, -2)
    q, scale = quantize_rows(rows, rows.abs().amax(dim=-1), limbs=limbs)
    return q.view(x.shape), scale.view(x.shape[:-1])


def normalize_heads(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of heads [..., D]: (x · f32(1 / sqrt(Σx² / D + eps))) · weight, the sum in float64 lanes."""
    lanes = split_last(x.double().square(), NORM_LANES)  # [..., D / 8, 8]
    total = fold(fold(lanes, dim=-2), dim=-1)  # [...] float64
    inverse = torch.reciprocal(torch.sqrt(total / x.shape[-1] + eps)).float()
    return (x * inverse[..., None]) * weight.float()


def split_last(x: Tensor, size: int) -> Tensor:
    """[..., n · size] → [..., n, size]."""
    return x.reshape(*x.shape[:-1], -1, size)


def fold(x: Tensor, *, dim: int) -> Tensor:
    """Sum along `dim` from first to last."""
    total = x.select(dim, 0)
    for i in range(1, x.shape[dim]):
        total = total + x.select(dim, i)
    return total


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate heads x [M, heads, D] by cos_sin [M, rotary_dim]: pairs are (i, i + rotary_dim / 2), the rest passes."""
    half = cos_sin.shape[-1] // 2
    cos, sin = cos_sin[:, None, :half], cos_sin[:, None, half:]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
