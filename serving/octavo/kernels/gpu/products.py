"""Products on the GPU: packs weights, picks tiles and launches gemm.py.

Integer results do not depend on tiles; float products have one tile for every number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from octavo.kernels.gpu import gemm
from octavo.kernels.gpu.device import GpuBase, checked, round_up
from octavo.kernels.gpu.rows import FLOAT_TYPES, STRIDE
from octavo.kernels.gpu.tiles import GROUP_M, MOST_TILES, float_tile, fp8_tile, int8_tile, num_tiles, parts_of
from octavo.kernels.gpu.tuned_tiles import Choice, entry_name
from octavo.kernels.interface import FLOAT, Activation, ActivationFormat, PackedLinear, Quantized
from octavo.kernels.reference.products import check_fp8, check_int8, fp8_scale, per_group

SMALLEST_GROUP = 32  # inputs of one step of the tensor cores
OLDEST_FP8 = (8, 9)  # tensor cores that multiply e4m3


@dataclass(frozen=True)
class GpuLinear8:
    """Weights of int8 or e4m3 [N, stride], zeros behind the inputs; scales and zero points [G, N]."""

    in_features: int
    out_features: int
    format: ActivationFormat
    weight: Tensor
    scale: Tensor
    correction: Tensor | None  # [G, N] int32: input zero point · Σ_k (w − zw)
    zero_point: Tensor | None
    bias: Tensor | None
    group: int  # inputs of one group as they lie in `weight`; 0: one group

    @property
    def nbytes(self) -> int:
        parts = (self.weight, self.scale, self.correction, self.zero_point, self.bias)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


@dataclass(frozen=True)
class GpuFloatLinear:
    """Float weights [N, K] where they lie: a table shared with the embedding stays shared."""

    weight: Tensor
    bias: Tensor | None
    format: ActivationFormat = FLOAT

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0])

    @property
    def nbytes(self) -> int:
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        return self.weight.numel() * self.weight.element_size() + bias


class GpuProducts(GpuBase):
    """`pack_int8`, `pack_float` and `linear` of `interface.Kernels`, and `interface.MultipliesFp8`."""

    _counters: Tensor | None = None
    _tuned: Mapping[str, Choice] = MappingProxyType({})

    def pack_int8(
        self,
        weight: Tensor,
        scale: Tensor,
        *,
        format: ActivationFormat,
        zero_point: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> GpuLinear8:
        scale = per_group(scale.float(), weight=weight, name="scale")  # [N, G]
        outputs, inputs = weight.shape
        groups = scale.shape[1]
        if zero_point is not None:
            zero_point = per_group(zero_point.int(), weight=weight, name="zero_point").expand_as(scale)
        check_int8(weight, zero_point, format=format, group_size=inputs // groups)
        bias = None if bias is None else checked(bias.float(), torch.float32, (outputs,), "bias")
        group = 0 if groups == 1 else round_up(inputs // groups, SMALLEST_GROUP)
        laid_out = spread(weight[None], groups=groups, group=group)[0]
        return GpuLinear8(
            in_features=inputs,
            out_features=outputs,
            format=format,
            weight=laid_out.to(self.device),
            scale=scale.T.contiguous().to(self.device),
            correction=_correction(weight, zero_point, groups=groups, format=format, device=self.device),
            zero_point=None if zero_point is None else zero_point.T.contiguous().to(self.device),
            bias=None if bias is None else bias.to(self.device),
            group=group,
        )

    @property
    def multiplies_fp8(self) -> bool:
        return self._limits.capability >= OLDEST_FP8

    def pack_fp8(
        self, weight: Tensor, scale: Tensor, *, format: ActivationFormat, bias: Tensor | None = None
    ) -> GpuLinear8:
        if not self.multiplies_fp8:
            major, minor = self._limits.capability
            raise ValueError(f"a card of compute capability {major}.{minor} has no fp8 products: they begin with 8.9")
        check_fp8(weight, format=format)
        scale = fp8_scale(scale, weight=weight).T.contiguous()  # [1, N]
        bias = None if bias is None else checked(bias.float(), torch.float32, (len(weight),), "bias").to(self.device)
        laid_out = spread(weight.view(torch.int8)[None], groups=1, group=0)[0].view(weight.dtype)
        outputs, inputs = weight.shape
        return GpuLinear8(
            inputs, outputs, format, laid_out.to(self.device), scale.to(self.device), None, None, bias, group=0
        )

    def pack_float(self, weight: Tensor, *, bias: Tensor | None = None) -> GpuFloatLinear:
        if weight.dtype not in FLOAT_TYPES or weight.dim() != 2:
            raise ValueError(f"a float weight must be float32, float16 or bfloat16 [N, K], not {weight.dtype}")
        bias = None if bias is None else checked(bias.float(), torch.float32, (weight.shape[0],), "bias")
        return GpuFloatLinear(weight.contiguous().to(self.device), None if bias is None else bias.to(self.device))

    def linear(self, x: Activation, weight: PackedLinear, *, residual: Tensor | None = None) -> Tensor:
        rows = x.shape[0]
        y = torch.empty(rows, weight.out_features, dtype=torch.float32, device=self.device)
        if residual is not None:
            residual = checked(residual, torch.float32, (rows, weight.out_features), "residual")
        if isinstance(x, Quantized):
            if not isinstance(weight, GpuLinear8) or x.format != weight.format or x.shape[1] != weight.in_features:
                wanted = f"{weight.format} of {weight.in_features} inputs"
                raise ValueError(f"the weight multiplies {wanted}, not {x.format} of {x.shape[1]}")
            if rows:
                self._product8(x, weight, residual, y)
            return y
        if not isinstance(weight, GpuFloatLinear):
            raise ValueError(f"the weight multiplies {weight.format}, not floats")
        x = checked(x, torch.float32, (-1, weight.in_features), "x")
        if rows:
            self._float_product(x, weight, residual, y)
        return y

    @property
    def shared_bytes(self) -> int:
        """What a program may have of a processor's shared memory."""
        return self._limits.shared_bytes

    def use_tiles(self, table: Mapping[str, Choice]) -> Mapping[str, Choice]:
        """Replace the card's table, as a tuner does; returns the one before."""
        before, self._tuned = self._tuned, table
        return before

    def choice(self, weight: GpuLinear8, *, rows: int, inputs: int, residual: bool) -> Choice:
        """How a product of 8 bits with `rows` rows is cut: by the card's table, else by rule."""
        format, outputs, limits = weight.format, weight.out_features, self._limits
        if format.fp8:
            return Choice(fp8_tile(rows, outputs, limits=limits))
        plain = not weight.group and weight.zero_point is None and weight.correction is None
        if plain:
            tuned = self._tuned.get(entry_name(rows, outputs, inputs, format.limbs))
            if tuned is not None:
                return tuned
        tile = int8_tile(
            rows, outputs, inputs, limbs=format.limbs, group=weight.group, residual=residual, limits=limits
        )
        return Choice(tile, parts_of(tile, rows, outputs, inputs, limits=limits) if plain else 1)

    def _product8(self, x: Quantized, weight: GpuLinear8, residual: Tensor | None, y: Tensor) -> None:
        rows, outputs = x.shape[0], weight.out_features
        groups = weight.scale.shape[0]
        q, inputs = x.q, weight.weight.shape[1]
        if weight.group:
            inputs = groups * weight.group
            if weight.group * groups != weight.in_features:
                q = spread(q[:, :, : weight.in_features], groups=groups, group=weight.group)
        chosen = self.choice(weight, rows=rows, inputs=inputs, residual=residual is not None)
        tile = chosen.tile
        if chosen.parts > 1:
            self._in_parts(x, weight, residual, y, chosen)
            return
        grid = (num_tiles(tile, rows, outputs),)
        unused = weight.scale
        gemm.int8_gemm[grid](
            q, x.scale, weight.weight, weight.scale,
            unused if weight.correction is None else weight.correction,
            unused if weight.zero_point is None else weight.zero_point,
            unused if weight.bias is None else weight.bias,
            y if residual is None else residual, y, rows, outputs, inputs, q.shape[2],
            STEPS_PER_GROUP=weight.group // tile.block_k, LIMBS=kernel_limbs(x.format),
            HAS_INPUT_ZERO=weight.correction is not None, HAS_ZERO=weight.zero_point is not None,
            HAS_BIAS=weight.bias is not None, HAS_RESIDUAL=residual is not None, BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=GROUP_M, num_warps=tile.num_warps,
            num_stages=tile.num_stages, enable_fp_fusion=False, **self._launch,
        )  # fmt: skip

    def _in_parts(self, x: Quantized, weight: GpuLinear8, residual: Tensor | None, y: Tensor, chosen: Choice) -> None:
        tile, parts = chosen.tile, chosen.parts
        rows, outputs, inputs = x.shape[0], weight.out_features, weight.weight.shape[1]
        tiles, limbs = num_tiles(tile, rows, outputs), x.format.limbs
        shape = (tiles, parts, limbs, tile.block_m, tile.block_n)
        sums = torch.empty(shape, dtype=torch.int32, device=self.device)
        steps = -(-inputs // (parts * tile.block_k))
        gemm.int8_gemm_parts[(tiles, parts)](
            x.q, x.scale, weight.weight, weight.scale, weight.scale if weight.bias is None else weight.bias,
            y if residual is None else residual, y, sums, self._arrivals(tiles), rows, outputs, inputs, x.q.shape[2],
            steps, PARTS=parts, LIMBS=limbs, HAS_BIAS=weight.bias is not None, HAS_RESIDUAL=residual is not None,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, num_warps=tile.num_warps,
            num_stages=tile.num_stages, enable_fp_fusion=False, **self._launch,
        )  # fmt: skip

    def _arrivals(self, tiles: int) -> Tensor:
        """Counters of tiles, all 0 whenever no product runs. Made once: recorded steps keep their address."""
        if self._counters is None:
            self._counters = torch.zeros(MOST_TILES, dtype=torch.int32, device=self.device)
        assert tiles <= MOST_TILES
        return self._counters

    def _float_product(self, x: Tensor, weight: GpuFloatLinear, residual: Tensor | None, y: Tensor) -> None:
        rows, outputs, inputs = x.shape[0], weight.out_features, weight.in_features
        tile = float_tile(weight.weight.dtype)
        grid = (num_tiles(tile, rows, outputs),)
        gemm.float_gemm[grid](
            x, weight.weight, x if weight.bias is None else weight.bias, y if residual is None else residual, y,
            rows, outputs, inputs, HAS_BIAS=weight.bias is not None, HAS_RESIDUAL=residual is not None,
            EXACT_TF32=weight.weight.dtype != torch.float32, EVEN_K=inputs % tile.block_k == 0,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=GROUP_M,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=False,
        )  # fmt: skip


def kernel_limbs(format: ActivationFormat) -> int:
    """What the kernels call LIMBS."""
    return 0 if format.fp8 else format.limbs


def spread(x: Tensor, *, groups: int, group: int) -> Tensor:
    """[L, R, K] int8 as [L, R, stride]: each group padded to `group` (0: one group as it is), zeros behind."""
    lead, inputs = x.shape[:2], x.shape[2]
    size = inputs // groups
    out = torch.zeros(*lead, round_up(groups * (group or size), STRIDE), dtype=torch.int8, device=x.device)
    used = out[:, :, : groups * (group or size)].view(*lead, groups, group or size)
    used[..., :size] = x.reshape(*lead, groups, size)
    return out


def _correction(
    weight: Tensor, zero_point: Tensor | None, *, groups: int, format: ActivationFormat, device: torch.device
) -> Tensor | None:
    """Input zero point · Σ_k (w − zw), [G, N] int32; None without an input zero point."""
    if format.zero_point == 0:
        return None
    size = weight.shape[1] // groups
    sums = weight.reshape(weight.shape[0], groups, size).sum(dim=2, dtype=torch.int64)  # [N, G]
    if zero_point is not None:
        sums = sums - size * zero_point
    return (sums * format.zero_point).T.to(torch.int32).contiguous().to(device)
