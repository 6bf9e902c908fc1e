"""Attention over the paged cache as the interface words it: tiles, segments, two limbs, in plain torch.

Integer sums run in float64, where they are exact; exp runs in float64 and is rounded once, so no result depends on how
torch splits its vectors. Runs wherever the reference backend runs; it knows nothing of requests.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from octavo.kernels.interface import BLOCK, SEGMENT, TILE, BatchLayout, CacheSpec, HeadLayout, LayerCache
from octavo.kernels.reference.cache import (
    ReferenceCache,
    block_bytes,
    fold,
    normalize_heads,
    quantize_heads,
    rotate,
    split_last,
)

ROWS = 32  # query rows computed together, to bound memory
SUM_LANES = 16  # Σ e runs in this many float32 lanes, which are then added by halves

Partial = tuple[Tensor, Tensor, Tensor]  # maximum m [...], sum l [...], output o [..., D] of some tokens


class ReferenceAttention:
    """The attention half of the reference backend."""

    def make_cache(self, spec: CacheSpec, num_blocks: int) -> LayerCache:
        """Zeroed blocks for one layer. ValueError for an unsupported spec."""
        return ReferenceCache(spec, num_blocks)

    def cache_block_bytes(self, spec: CacheSpec) -> int:
        """Bytes of one block of one layer."""
        return block_bytes(spec)

    def rope_write(
        self,
        qkv: Tensor,
        cos_sin: Tensor,
        layout: BatchLayout,
        heads: HeadLayout,
        cache: LayerCache,
        *,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 1e-6,
    ) -> Tensor:
        """See the interface. Returns q [M, num_heads · head_dim]."""
        assert isinstance(cache, ReferenceCache)
        parts = split_last(qkv, heads.head_dim)
        q, k, v = torch.split(parts, [heads.num_heads, heads.num_kv_heads, heads.num_kv_heads], dim=1)  # [M, heads, D]
        angles = cos_sin[layout.positions.long()].float()  # [M, rotary_dim]
        if q_norm is not None:
            q = normalize_heads(q, q_norm, eps)
        if k_norm is not None:
            k = normalize_heads(k, k_norm, eps)
        cache.write(layout.slot_mapping, rotate(k, angles), v)
        return rotate(q, angles).flatten(1)

    def attention(self, q: Tensor, layout: BatchLayout, heads: HeadLayout, cache: LayerCache) -> Tensor:
        """See the interface. [M, num_heads · head_dim] float32, new memory."""
        assert isinstance(cache, ReferenceCache)
        rows = q.reshape(len(q), heads.num_kv_heads, -1, heads.head_dim)  # [M, KV, G, D]
        out = torch.zeros_like(rows)
        starts = layout.query_start.tolist()
        for i, (start, stop) in enumerate(pairwise(starts)):
            for first in range(start, stop, ROWS):
                part = slice(first, min(first + ROWS, stop))
                out[part] = _attend(rows[part], layout.positions[part], layout.block_tables[i], heads, cache)
        return out.reshape(len(q), -1)


def _attend(q: Tensor, positions: Tensor, table: Tensor, heads: HeadLayout, cache: ReferenceCache) -> Tensor:
    """Rows q [R, KV, G, D] of one sequence at ascending positions [R] → [R, KV, G, D]."""
    tiles = int(positions[-1]) // TILE + 1
    blocks = torch.zeros(tiles * TILE // BLOCK, dtype=torch.long)
    used = min(len(blocks), len(table))
    blocks[:used] = table[:used]  # a last tile may have one block only: its other half is not visible
    k, v = cache.k[blocks].flatten(0, 1), cache.v[blocks].flatten(0, 1)  # [T, KV, D]
    t = torch.arange(tiles * TILE)
    visible = t <= positions[:, None]  # [R, T]
    if heads.window is not None:
        visible &= t > positions[:, None] - heads.window
    visible = visible[:, None, None, :]  # [R, 1, 1, T]
    if cache.spec.dtype == torch.int8:
        ks, vs = (x[blocks].flatten(0, 1).T[None, :, None, :] for x in (cache.k_scale, cache.v_scale))  # [1, KV, 1, T]
        scores = _int8_scores(q, k, ks, heads.scale)
        partials = _int8_tiles(scores, visible, v, vs)
    else:
        partials = _float_tiles(_float_scores(q, k.float(), heads.scale), visible, v.float())
    _, total, out = _fold_segments(partials)
    return out / total[..., None]


def _int8_scores(q: Tensor, k: Tensor, ks: Tensor, scale: float) -> Tensor:
    """[R, KV, G, D] · [T, KV, D] → [R, KV, G, T] float32, from exact integer sums."""
    q15, qs = quantize_heads(q, limbs=2)
    dots = torch.einsum("rkgd,tkd->rkgt", q15.double(), k.double())
    return dots.float() * ((qs * torch.tensor(scale, dtype=torch.float32))[..., None] * ks)


def _float_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """(Σ_d q[d] · k[d]) · scale with the sum in ascending d."""
    total = torch.zeros(*q.shape[:3], len(k))
    for d in range(q.shape[-1]):
        total = total + q[..., d, None] * k[:, :, d].T[None, :, None, :]
    return total * torch.tensor(scale, dtype=torch.float32)


def _softmax_tiles(scores: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [R, KV, G, T] → per tile m, l [R, KV, G, N] and e [R, KV, G, N, 128]; nothing visible: m = -inf, e = 0."""
    seen = split_last(visible, TILE)
    s = torch.where(seen, split_last(scores, TILE), -torch.inf)
    m = s.amax(dim=-1)
    e = torch.where(seen, exp(s - m[..., None]), 0.0)
    lanes = fold(split_last(e, SUM_LANES), dim=-2)  # [..., 16]
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return m, lanes[..., 0], e


def _int8_tiles(scores: Tensor, visible: Tensor, v: Tensor, vs: Tensor) -> Partial:
    """Per-tile partials, P held as two limbs per row and tile."""
    m, total, e = _softmax_tiles(scores, visible)
    seen_scales = split_last(torch.where(visible, vs, 0.0), TILE)  # what nobody wrote never counts
    p15, scale = quantize_heads(e * seen_scales, limbs=2)
    dots = torch.einsum("rkgnt,ntkd->rkgnd", p15.double(), v.reshape(-1, TILE, *v.shape[1:]).double())
    return m, total, dots.float() * scale[..., None]


def _float_tiles(scores: Tensor, visible: Tensor, v: Tensor) -> Partial:
    """Per-tile partials, Σ e · v in ascending tokens."""
    m, total, e = _softmax_tiles(scores, visible)
    tiles = v.reshape(-1, TILE, *v.shape[1:]).permute(2, 0, 1, 3)[None, :, None]  # [1, KV, 1, N, 128, D]
    seen = split_last(visible, TILE)
    out = torch.zeros(*m.shape, v.shape[-1])
    for t in range(TILE):
        out = out + torch.where(seen[..., t, None], e[..., t, None] * tiles[..., t, :], 0.0)
    return m, total, out


def _fold_segments(tiles: Partial) -> Partial:
    """Two tiles make a segment; segments fold from the left."""
    per_segment = SEGMENT // TILE
    total: Partial | None = None
    for first in range(0, tiles[0].shape[-1], per_segment):
        segment = _tile(tiles, first)
        for i in range(first + 1, min(first + per_segment, tiles[0].shape[-1])):
            segment = combine(segment, _tile(tiles, i))
        total = segment if total is None else combine(total, segment)
    assert total is not None
    return total


def _tile(tiles: Partial, i: int) -> Partial:
    return tiles[0][..., i], tiles[1][..., i], tiles[2][..., i, :]


def combine(a: Partial, b: Partial) -> Partial:
    """Join two partials; one without a visible token (m = -inf) leaves the other as it is."""
    m = torch.maximum(a[0], b[0])
    f1, f2 = exp(a[0] - m), exp(b[0] - m)
    joined = (m, a[1] * f1 + b[1] * f2, a[2] * f1[..., None] + b[2] * f2[..., None])
    only_a, only_b = torch.isneginf(b[0]), torch.isneginf(a[0])
    merged = []
    for x, y, z in zip(a, b, joined, strict=True):
        wide = (only_a[..., None], only_b[..., None]) if x.dim() > m.dim() else (only_a, only_b)
        merged.append(torch.where(wide[0], x, torch.where(wide[1], y, z)))
    return merged[0], merged[1], merged[2]


def exp(x: Tensor) -> Tensor:
    """exp of float32, computed in float64 and rounded once."""
    return torch.exp(x.double()).float()
