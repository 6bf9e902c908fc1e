"""Attention on the GPU: sequences with few query rows by segments, the others row tile by row tile.

Which of the two ran does not show in the bits. The number of segments launched follows `BatchLayout.max_seq_len`, so a
captured graph serves every batch whose lengths stay below that of its capture.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.gpu import attention_kernels
from octavo.kernels.gpu.cache import MOST_SHARING, GpuCache, GpuCacheWriter
from octavo.kernels.gpu.device import checked, power_of_two
from octavo.kernels.interface import SEGMENT, BatchLayout, HeadLayout, LayerCache
from octavo.kernels.reference.cache import check_heads

DECODE_ROWS = 8  # query heads of one program: with their two limbs, the 16 rows of one tensor-core product
PROMPT_ROWS = 16
AHEAD = 4  # partials that a reduction loads together


class GpuAttention(GpuCacheWriter):
    """The attention half of the GPU backend."""

    def attention(self, q: Tensor, layout: BatchLayout, heads: HeadLayout, cache: LayerCache) -> Tensor:
        """See the interface. [M, num_heads · head_dim] float32, new memory. Nobody checks block ids."""
        assert isinstance(cache, GpuCache)
        rows, sequences = len(q), len(layout.query_start) - 1
        q = checked(q, torch.float32, (rows, heads.num_heads * heads.head_dim), "q")
        checked(layout.query_start, torch.int32, (-1,), "query_start")
        checked(layout.seq_lens, torch.int32, (sequences,), "seq_lens")
        checked(layout.block_tables, torch.int32, (sequences, -1), "block_tables")
        check_heads(heads, cache.spec, most=MOST_SHARING)
        out = torch.empty_like(q)
        if rows == 0:
            return out
        group = power_of_two(heads.num_heads // heads.num_kv_heads)
        most = 0  # query rows of a sequence that goes by segments
        if cache.spec.dtype == torch.int8:  # float dots have an order: those caches have one kernel only
            most = min(layout.max_query_len, max(1, DECODE_ROWS // group))
            self._segments(q, out, layout, heads, cache, max_rows=most)
        if layout.max_query_len > most:
            self._row_tiles(q, out, layout, heads, cache, min_rows=most + 1)
        return out

    def _segments(
        self, q: Tensor, out: Tensor, layout: BatchLayout, heads: HeadLayout, cache: GpuCache, *, max_rows: int
    ) -> None:
        """Rows of sequences with up to `max_rows` of them."""
        sequences, num_heads = len(layout.seq_lens), heads.num_heads
        segments = -(-layout.max_seq_len // SEGMENT)
        shape = (sequences * max_rows, num_heads, segments)
        partial = torch.empty(*shape, heads.head_dim, dtype=torch.float32, device=self.device)
        stats = torch.empty(*shape, 2, dtype=torch.float32, device=self.device)
        group = power_of_two(num_heads // heads.num_kv_heads)
        attention_kernels.decode_segments[(sequences, heads.num_kv_heads, segments)](
            q, cache.k, cache.v, cache.k_scale, cache.v_scale, layout.query_start, layout.seq_lens,
            layout.block_tables, partial, stats, layout.block_tables.shape[1], heads.scale, max_rows,
            WINDOW=heads.window or 0, KV=heads.num_kv_heads, GROUP=num_heads // heads.num_kv_heads, GROUP_PAD=group,
            D=heads.head_dim, D_PAD=cache.head_pad, BLOCK_D=_block(heads), ROWS=max(DECODE_ROWS, group), INT8=True,
            EXACT_TF32=False, PACKED=self._limits.capability >= (10, 0), num_warps=4, num_stages=3,
            enable_fp_fusion=False, **self._launch,
        )  # fmt: skip
        attention_kernels.reduce_segments[(sequences, num_heads, max_rows)](
            partial, stats, layout.query_start, layout.seq_lens, out, segments, max_rows, WINDOW=heads.window or 0,
            H=num_heads, D=heads.head_dim, BLOCK_D=_block(heads), AHEAD=AHEAD, num_warps=1, enable_fp_fusion=False,
            **self._launch,
        )  # fmt: skip

    def _row_tiles(
        self, q: Tensor, out: Tensor, layout: BatchLayout, heads: HeadLayout, cache: GpuCache, *, min_rows: int
    ) -> None:
        """Rows of sequences with at least `min_rows` of them."""
        group = power_of_two(heads.num_heads // heads.num_kv_heads)
        rows = max(PROMPT_ROWS, group)
        int8 = cache.spec.dtype == torch.int8
        grid = (-(-layout.max_query_len * group // rows), heads.num_kv_heads, len(layout.seq_lens))
        attention_kernels.prompt_rows[grid](
            q, cache.k, cache.v, cache.k_scale, cache.v_scale, layout.query_start, layout.seq_lens,
            layout.block_tables, out, layout.block_tables.shape[1], heads.scale, min_rows,
            WINDOW=heads.window or 0, KV=heads.num_kv_heads, GROUP=heads.num_heads // heads.num_kv_heads,
            GROUP_PAD=group, D=heads.head_dim, D_PAD=cache.head_pad, BLOCK_D=_block(heads), ROWS=rows, INT8=int8,
            EXACT_TF32=cache.spec.dtype in (torch.float16, torch.bfloat16),
            PACKED=self._limits.capability >= (10, 0), num_warps=prompt_warps(int8, heads.head_dim),
            num_stages=2 if int8 else 1, enable_fp_fusion=False,
        )  # fmt: skip


def prompt_warps(int8: bool, head_dim: int) -> int:
    """Warps of prompt_rows: as many as keep its sums in registers. Integer sums have the same bits with any number."""
    return 4 if int8 and head_dim <= 128 else 8


def _block(heads: HeadLayout) -> int:
    """Channels of a head in a product: a power of two, at least one step of the tensor cores."""
    return max(32, power_of_two(heads.head_dim))
