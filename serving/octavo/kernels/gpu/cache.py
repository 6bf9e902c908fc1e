"""The paged cache of one layer in device memory, and the launch that writes it.

```
k        [num_blocks, num_kv_heads, 64, D_PAD]   a token's key in one piece: the product reads along D
v        [num_blocks, num_kv_heads, D_PAD, 64]   a channel's 64 tokens in one piece: the product reads along tokens
k_scale  [num_blocks, num_kv_heads, 64] float32  likewise v_scale
```
D_PAD is head_dim rounded up to 16, so every piece starts at 16 bytes; what lies behind head_dim stays zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.gpu import cache_kernels
from octavo.kernels.gpu.device import GpuBase, checked, power_of_two, round_up
from octavo.kernels.interface import BLOCK, BatchLayout, CacheSpec, HeadLayout, LayerCache
from octavo.kernels.reference.cache import check_heads, check_spec

HEADS = 8  # heads of one program of rope_write
MOST_SHARING = 64  # query heads of one kv head


class GpuCache:
    """Blocks of one layer."""

    def __init__(self, spec: CacheSpec, num_blocks: int, device: torch.device) -> None:
        self.spec = spec
        self.num_blocks = num_blocks
        self.nbytes = num_blocks * block_bytes(spec)
        self.head_pad = padded_head(spec)
        lead = (num_blocks, spec.num_kv_heads)
        self.k = torch.zeros(*lead, BLOCK, self.head_pad, dtype=spec.dtype, device=device)
        self.v = torch.zeros(*lead, self.head_pad, BLOCK, dtype=spec.dtype, device=device)
        count = num_blocks if spec.dtype == torch.int8 else 0
        self.k_scale = _scales(spec.k_scale, (count, spec.num_kv_heads, BLOCK), device)
        self.v_scale = _scales(spec.v_scale, (count, spec.num_kv_heads, BLOCK), device)
        self.k_inverse = _inverse(spec.k_scale, spec, device)  # [num_kv_heads] float32, or None
        self.v_inverse = _inverse(spec.v_scale, spec, device)

    def rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Copies in token order, for tests and tools.

        K and V [num_blocks, 64, num_kv_heads, head_dim], scales [num_blocks, 64, num_kv_heads].
        """
        k = self.k[..., : self.spec.head_dim].transpose(1, 2).contiguous()
        v = self.v[:, :, : self.spec.head_dim].permute(0, 3, 1, 2).contiguous()
        return k, v, self.k_scale.transpose(1, 2).contiguous(), self.v_scale.transpose(1, 2).contiguous()


class GpuCacheWriter(GpuBase):
    """Makes caches and writes rotated keys and values into them."""

    def make_cache(self, spec: CacheSpec, num_blocks: int) -> LayerCache:
        """Zeroed blocks for one layer. Raises ValueError for a spec that is not supported."""
        reason = self.refuses(spec, num_heads=spec.num_kv_heads)
        if reason:
            raise ValueError(reason)
        return GpuCache(spec, num_blocks, self.device)

    def refuses(self, spec: CacheSpec, *, num_heads: int) -> str:
        """See `interface.LimitsShapes`."""
        try:
            check_spec(spec)
        except ValueError as error:
            return str(error)
        needed, have = float_cache_shared(spec), self._limits.shared_bytes
        if needed > have:
            return (
                f"a {spec.dtype} cache with heads of {spec.head_dim} needs {needed // 1024} KiB of shared memory, "
                f"this card has {have // 1024}: use USE_CACHE_KV_INT8=1"
            )
        sharing = num_heads // spec.num_kv_heads
        return "" if sharing <= MOST_SHARING else f"{sharing} heads share a kv head, a card serves up to {MOST_SHARING}"

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
        """See the interface. Rows with a negative slot write nothing to the cache (they fill up a captured graph)."""
        assert isinstance(cache, GpuCache)
        rows, head_dim = len(qkv), heads.head_dim
        count = heads.num_heads + 2 * heads.num_kv_heads
        qkv = checked(qkv, torch.float32, (rows, count * head_dim), "qkv")
        cos_sin = checked(cos_sin, torch.float32, (-1, -1), "cos_sin")
        positions = checked(layout.positions, torch.int32, (rows,), "positions")
        slots = checked(layout.slot_mapping, torch.int32, (rows,), "slot_mapping")
        rotary_dim = cos_sin.shape[1]
        if rotary_dim % 2 or rotary_dim > head_dim:
            raise ValueError(f"rotary_dim must be even and at most {head_dim}, not {rotary_dim}")
        check_heads(heads, cache.spec, most=MOST_SHARING)
        q_weight, k_weight = (
            qkv if x is None else checked(x.float(), torch.float32, (head_dim,), "head norm") for x in (q_norm, k_norm)
        )
        q = torch.empty(rows, heads.num_heads * head_dim, dtype=torch.float32, device=self.device)
        if rows:
            cache_kernels.rope_write[(rows, -(-count // HEADS))](
                qkv, q, cos_sin, positions, slots, cache.k, cache.v, cache.k_scale, cache.v_scale,
                qkv if cache.k_inverse is None else cache.k_inverse,
                qkv if cache.v_inverse is None else cache.v_inverse, q_weight, k_weight, rows,
                HALF=rotary_dim // 2, H=heads.num_heads, KV=heads.num_kv_heads, D=head_dim, D_PAD=cache.head_pad,
                EPS=eps, Q_NORM=q_norm is not None, K_NORM=k_norm is not None, INT8=cache.spec.dtype == torch.int8,
                STATIC_K=cache.k_inverse is not None, STATIC_V=cache.v_inverse is not None, HEADS=HEADS,
                BLOCK_D=power_of_two(head_dim), num_warps=4, enable_fp_fusion=False, **self._launch,
            )  # fmt: skip
        return q


def padded_head(spec: CacheSpec) -> int:
    """Channels of a head as stored."""
    return round_up(spec.head_dim, 16)


def float_cache_shared(spec: CacheSpec) -> int:
    """Bytes of shared memory that prompts over a float cache take, as compiled; an int8 cache needs less than any card
    has.
    """
    if spec.dtype == torch.int8:
        return 0
    width = max(64, power_of_two(spec.head_dim))
    return 1088 * width if spec.dtype == torch.float32 else 24576 + 704 * width


def block_bytes(spec: CacheSpec) -> int:
    """Bytes of one block: K, V, and for int8 their scales."""
    rows = 2 * BLOCK * spec.num_kv_heads
    return rows * (padded_head(spec) * spec.dtype.itemsize + (4 if spec.dtype == torch.int8 else 0))


def _scales(static: Tensor | None, shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Scales of new blocks: zeros, or the static one everywhere."""
    plane = torch.zeros(shape, dtype=torch.float32, device=device)
    return plane if static is None else plane + static.to(device).float().reshape(1, -1, 1)


def _inverse(static: Tensor | None, spec: CacheSpec, device: torch.device) -> Tensor | None:
    """1 / scale per kv head, in float32."""
    if static is None or spec.dtype != torch.int8:
        return None
    return torch.reciprocal(static.to(device).float().reshape(-1)).expand(spec.num_kv_heads).contiguous()
