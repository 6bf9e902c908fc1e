"""Attention over the paged cache on the CPU: checks arguments and calls csrc/attention.cpp.

Runs in the engine's thread, like all kernels; knows nothing of requests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.cpu.cache import MOST_SHARING, CpuCache, CpuCacheWriter
from octavo.kernels.cpu.library import checked, pointer
from octavo.kernels.interface import BatchLayout, HeadLayout, LayerCache
from octavo.kernels.reference.cache import check_heads

SIGNATURES = {"octavo_attention": "p" + "ppppp" + "iiiif" + "pppp" + "iii"}


class CpuAttention(CpuCacheWriter):
    """The attention half of the CPU backend."""

    def attention(self, q: Tensor, layout: BatchLayout, heads: HeadLayout, cache: LayerCache) -> Tensor:
        """See the interface. [M, num_heads · head_dim] float32, new memory. Nobody checks block ids."""
        assert isinstance(cache, CpuCache)
        rows, sequences = len(q), len(layout.query_start) - 1
        q = checked(q, torch.float32, (rows, heads.num_heads * heads.head_dim), "q")
        starts = checked(layout.query_start, torch.int32, (-1,), "query_start")
        tables = checked(layout.block_tables, torch.int32, (sequences, -1), "block_tables")
        positions = checked(layout.positions, torch.int32, (rows,), "positions")
        check_heads(heads, cache.spec, most=MOST_SHARING)
        out = torch.empty_like(q)
        self._lib.octavo_attention(
            self._pool, pointer(q), pointer(out), pointer(starts), pointer(tables), pointer(positions), sequences,
            tables.shape[1], heads.num_heads, heads.window or 0, heads.scale, *cache.arguments,
        )  # fmt: skip
        return out
