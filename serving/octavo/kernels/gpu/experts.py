"""The MLPs of all experts in two launches: stacks their weights, and sorts rows by expert without asking the host.

How many rows an expert gets is known on the device only, so the number of tiles is the largest possible one and those
without rows end at once. Nothing here waits, so a step with experts can be recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels.gpu import expert_kernels
from octavo.kernels.gpu.products import GpuLinear8, GpuProducts, kernel_limbs, spread
from octavo.kernels.gpu.rows import GpuRows
from octavo.kernels.gpu.tiles import Tile, fp8_tile, int8_tile
from octavo.kernels.interface import Activation, ActivationFormat, ExpertWeights, PackedLinear, Quantized


@dataclass(frozen=True)
class GpuExperts:
    """Weights of int8 or e4m3 [E, N, stride] of one product of all experts; scales and zero points [E, G, N]."""

    in_features: int
    out_features: int
    num_experts: int
    format: ActivationFormat
    weight: Tensor
    scale: Tensor
    correction: Tensor | None
    zero_point: Tensor | None
    bias: Tensor | None  # [E, N]
    group: int

    @property
    def nbytes(self) -> int:
        parts = (self.weight, self.scale, self.correction, self.zero_point, self.bias)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


@dataclass(frozen=True)
class Tiles:
    """Which pairs of row and choice a tile takes; see expert_kernels.py."""

    order: Tensor  # [pairs] int64
    expert: Tensor  # [tiles] int64
    first: Tensor  # [tiles] int64
    end: Tensor  # [E] int64


class GpuGrouped(GpuProducts, GpuRows):
    """`interface.GroupsExperts`."""

    def stack_experts(self, products: Sequence[PackedLinear]) -> ExpertWeights | None:
        """See the interface. All must be of 8 bits and of one shape and format."""
        linears = [product for product in products if isinstance(product, GpuLinear8)]
        if not linears or len(linears) < len(products) or len(set(map(_shape, linears))) > 1:
            return None
        first = linears[0]
        return GpuExperts(
            in_features=first.in_features,
            out_features=first.out_features,
            num_experts=len(linears),
            format=first.format,
            weight=torch.stack([linear.weight.view(torch.int8) for linear in linears]).view(first.weight.dtype),
            scale=torch.stack([linear.scale for linear in linears]),
            correction=_stack([linear.correction for linear in linears]),
            zero_point=_stack([linear.zero_point for linear in linears]),
            bias=_stack([linear.bias for linear in linears]),
            group=first.group,
        )

    def run_experts(self, x: Activation, ids: Tensor, gate_up: ExpertWeights, down: ExpertWeights) -> Tensor:
        """See the interface. New memory."""
        assert isinstance(gate_up, GpuExperts)
        assert isinstance(down, GpuExperts)
        rows, top_k = ids.shape
        out = torch.empty(rows, top_k, down.out_features, dtype=torch.float32, device=self.device)
        if rows == 0:
            return out
        tile = self._tile(rows * top_k, gate_up)
        tiles = find_tiles(ids, num_experts=gate_up.num_experts, block=tile.block_m)
        inner = self._grouped(x, gate_up, tiles, tile, shared=top_k)
        hidden = self.silu_mul(inner, down.format)
        narrow = self._tile(rows * top_k, down)
        self._grouped(hidden, down, tiles, _with_rows(narrow, tile.block_m), shared=1, y=out)
        return out

    def _tile(self, pairs: int, experts: GpuExperts) -> Tile:
        """For the rows that an expert gets on average, but not the widest: a tile belongs to one expert."""
        rows = min(64, max(1, pairs // experts.num_experts))
        inputs = experts.weight.shape[2]
        limbs, group = experts.format.limbs, experts.group
        if experts.format.fp8:
            return fp8_tile(rows, experts.out_features, limits=self._limits)
        return int8_tile(
            rows, experts.out_features, inputs, limbs=limbs, group=group, residual=False, limits=self._limits
        )

    def _grouped(
        self, x: Activation, experts: GpuExperts, tiles: Tiles, tile: Tile, *, shared: int, y: Tensor | None = None
    ) -> Tensor:
        assert isinstance(x, Quantized)
        rows, outputs, pairs = x.shape[0], experts.out_features, len(tiles.order)
        groups = experts.scale.shape[1]
        q, inputs = x.q, experts.weight.shape[2]
        if experts.group:
            inputs = groups * experts.group
            if inputs != experts.in_features:
                q = spread(q[:, :, : experts.in_features], groups=groups, group=experts.group)
        if y is None:
            y = torch.empty(pairs, outputs, dtype=torch.float32, device=self.device)
        unused = experts.scale
        grid = (len(tiles.expert), -(-outputs // tile.block_n))
        expert_kernels.grouped_gemm[grid](
            q, x.scale, experts.weight, experts.scale,
            unused if experts.zero_point is None else experts.zero_point,
            unused if experts.correction is None else experts.correction,
            unused if experts.bias is None else experts.bias,
            tiles.order, tiles.expert, tiles.first, tiles.end, y, rows, pairs, experts.num_experts, outputs, inputs,
            q.shape[2], groups * outputs, SHARED=shared, STEPS_PER_GROUP=experts.group // tile.block_k,
            LIMBS=kernel_limbs(experts.format), HAS_INPUT_ZERO=experts.correction is not None,
            HAS_ZERO=experts.zero_point is not None, HAS_BIAS=experts.bias is not None, BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, num_warps=tile.num_warps, num_stages=tile.num_stages,
            enable_fp_fusion=False,
        )  # fmt: skip
        return y


def find_tiles(ids: Tensor, *, num_experts: int, block: int) -> Tiles:
    """Tiles of `block` pairs for ids [M, top_k]. A stable order and integer counts: the same every time."""
    flat = ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    end = torch.cumsum(counts, dim=0)
    tiles_of = (counts + block - 1) // block
    last_tile = torch.cumsum(tiles_of, dim=0)  # behind the last tile of an expert
    most = min(len(flat), len(flat) // block + num_experts)
    tile = torch.arange(most, device=ids.device)
    expert = torch.searchsorted(last_tile, tile, right=True)
    known = expert.clamp(max=num_experts - 1)
    first = end[known] - counts[known] + (tile - (last_tile[known] - tiles_of[known])) * block
    return Tiles(order, expert, first, end)


def _with_rows(tile: Tile, block_m: int) -> Tile:
    return Tile(block_m, tile.block_n, tile.block_k, tile.num_warps, tile.num_stages)


def _shape(linear: GpuLinear8) -> tuple[object, ...]:
    parts = (linear.correction, linear.zero_point, linear.bias)
    present = tuple(part is not None for part in parts)
    return (linear.in_features, linear.out_features, linear.format, linear.scale.shape, linear.group, present)


def _stack(parts: Sequence[Tensor | None]) -> Tensor | None:
    tensors = [part for part in parts if part is not None]
    return torch.stack(tensors) if tensors else None
