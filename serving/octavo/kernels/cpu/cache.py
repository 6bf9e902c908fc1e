"""The paged cache of one layer as the native kernels lay it out, and the call that writes it.

Owns the memory: one anonymous mapping per layer, zero by itself, resident only where written, on huge pages where the
system has them (K and V). csrc/attention_layout.h draws the blocks. Knows nothing of sequences.
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

from octavo.kernels.cpu.library import CpuBase, checked, pointer
from octavo.kernels.interface import BLOCK, BatchLayout, CacheSpec, HeadLayout, LayerCache
from octavo.kernels.reference.cache import check_heads, check_spec

SIGNATURES = {"octavo_rope_write": "p" + "ppppp" + "iii" + "ppd" + "pp" + "pppp" + "iii"}

_TYPES = {torch.int8: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_LANES, _QUAD = 16, 4  # columns of a panel, neighbours of the summed axis
_PAGE = 4096
MOST_SHARING = 128  # query heads of one kv head


class CpuCache:
    """Blocks of one layer in native layout, as planes of one mapping: K, V, K scales, V scales."""

    def __init__(self, spec: CacheSpec, num_blocks: int) -> None:
        self.spec = spec
        self.num_blocks = num_blocks
        self.nbytes = num_blocks * block_bytes(spec)
        sizes = [_round_up(num_blocks * size, _PAGE) for size in _plane_bytes(spec)]
        memory = _zero_pages(sum(sizes), huge=sum(sizes[:2]))  # [nbytes rounded up] uint8
        self.k, self.v, k_scale, v_scale = torch.split(memory, sizes)
        # [num_blocks, num_kv_heads, 64] float32; no blocks for a float cache
        self.k_scale = _fill(k_scale, spec.k_scale, spec=spec, num_blocks=num_blocks)
        self.v_scale = _fill(v_scale, spec.v_scale, spec=spec, num_blocks=num_blocks)
        self.k_inverse = _inverse(spec.k_scale, spec)  # [num_kv_heads] float32, or None
        self.v_inverse = _inverse(spec.v_scale, spec)
        planes = (self.k, self.v, self.k_scale, self.v_scale)
        self.arguments = (*map(pointer, planes), spec.num_kv_heads, spec.head_dim, _TYPES[spec.dtype])

    def rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Copies in token order, for tests and tools.

        K and V [num_blocks, 64, num_kv_heads, head_dim], scales [num_blocks, 64, num_kv_heads].
        """
        spec, head_dim = self.spec, self.spec.head_dim
        lead, width = (self.num_blocks, spec.num_kv_heads), _round_up(head_dim, _LANES)
        k_bytes, v_bytes = (self.num_blocks * size for size in _plane_bytes(spec)[:2])
        k, v = self.k[:k_bytes].view(spec.dtype), self.v[:v_bytes].view(spec.dtype)
        if spec.dtype == torch.int8:
            k = k.view(*lead, BLOCK // _LANES, head_dim // _QUAD, _LANES, _QUAD).permute(0, 2, 4, 1, 3, 5)
            k = k.flatten(4).flatten(1, 2)
            v = v.view(*lead, BLOCK // _QUAD, width, _QUAD).permute(0, 2, 4, 1, 3).flatten(1, 2)
        else:
            k = k.view(*lead, head_dim, BLOCK).permute(0, 3, 1, 2)
            v = v.view(*lead, BLOCK, width).permute(0, 2, 1, 3)
        k_scale, v_scale = (x.transpose(1, 2).contiguous() for x in (self.k_scale, self.v_scale))
        return k.contiguous(), v[..., :head_dim].contiguous(), k_scale, v_scale


class CpuCacheWriter(CpuBase):
    """Makes caches and writes rotated keys and values into them."""

    def make_cache(self, spec: CacheSpec, num_blocks: int) -> LayerCache:
        """Zeroed blocks for one layer. Raises ValueError for a spec that is not supported."""
        check_spec(spec)
        return CpuCache(spec, num_blocks)

    def cache_block_bytes(self, spec: CacheSpec) -> int:
        """Bytes of one block of one layer, K and V and scales."""
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
        """See the interface. Returns q [M, num_heads · head_dim], new memory. Nobody checks positions and slots."""
        assert isinstance(cache, CpuCache)
        rows, head_dim = len(qkv), heads.head_dim
        qkv = checked(qkv, torch.float32, (rows, (heads.num_heads + 2 * heads.num_kv_heads) * head_dim), "qkv")
        cos_sin = checked(cos_sin, torch.float32, (-1, -1), "cos_sin")
        positions = checked(layout.positions, torch.int32, (rows,), "positions")
        slots = checked(layout.slot_mapping, torch.int32, (rows,), "slot_mapping")
        rotary_dim = cos_sin.shape[1]
        if rotary_dim % 2 or rotary_dim > head_dim:
            raise ValueError(f"rotary_dim must be even and at most {head_dim}, not {rotary_dim}")
        check_heads(heads, cache.spec, most=MOST_SHARING)
        norms = [None if x is None else checked(x, torch.float32, (head_dim,), "head norm") for x in (q_norm, k_norm)]
        q = torch.empty(rows, heads.num_heads * head_dim)
        self._lib.octavo_rope_write(
            self._pool, pointer(qkv), pointer(q), pointer(cos_sin), pointer(positions), pointer(slots), rows,
            heads.num_heads, rotary_dim, pointer(norms[0]), pointer(norms[1]), eps, pointer(cache.k_inverse),
            pointer(cache.v_inverse), *cache.arguments,
        )  # fmt: skip
        return q


def block_bytes(spec: CacheSpec) -> int:
    """Bytes of one block: K, V (head_dim padded to 16), and for int8 their scales."""
    return sum(_plane_bytes(spec))


def _plane_bytes(spec: CacheSpec) -> tuple[int, int, int, int]:
    """Bytes a block takes of the planes K, V, K scales, V scales."""
    rows, item = BLOCK * spec.num_kv_heads, spec.dtype.itemsize
    scales = rows * 4 if spec.dtype == torch.int8 else 0
    return rows * spec.head_dim * item, rows * _round_up(spec.head_dim, _LANES) * item, scales, scales


def _fill(plane: Tensor, static: Tensor | None, *, spec: CacheSpec, num_blocks: int) -> Tensor:
    """View bytes as scales [num_blocks, num_kv_heads, 64]. Static ones are written now: readers need not know."""
    count = num_blocks if spec.dtype == torch.int8 else 0
    scales = plane.view(torch.float32)[: count * spec.num_kv_heads * BLOCK].view(count, spec.num_kv_heads, BLOCK)
    if static is not None:
        scales += static.float().reshape(1, -1, 1)
    return scales


def _inverse(static: Tensor | None, spec: CacheSpec) -> Tensor | None:
    """1 / scale per kv head, in float32."""
    if static is None or spec.dtype != torch.int8:
        return None
    return (1.0 / static.float().reshape(-1)).expand(spec.num_kv_heads).contiguous()


def _zero_pages(num_bytes: int, *, huge: int) -> Tensor:
    """A private anonymous mapping as uint8; it lives as long as a tensor over it.

    The first `huge` bytes are on huge pages, one of which is 64 blocks of K or V of 8 heads of 64, but 1024 of scales:
    the two of every layer would take tens of megabytes for the first token.
    """
    mapping = mmap.mmap(-1, max(num_bytes, _PAGE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages: slower, not wrong
            mapping.madvise(mmap.MADV_HUGEPAGE, 0, huge)
    return torch.frombuffer(mapping, dtype=torch.uint8, count=num_bytes)


def _round_up(count: int, multiple: int) -> int:
    return (count + multiple - 1) // multiple * multiple
