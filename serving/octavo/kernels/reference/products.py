"""Products of the specification: integer sums are exact in float64, the epilogue is float32 in the documented order.

Each row of a float product is one float64 matrix-vector product, rounded once, so a row's bits cannot depend on the
others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels.interface import FLOAT, FP8_STEP, Activation, ActivationFormat, PackedLinear, Quantized


@dataclass(frozen=True)
class ReferenceLinear:
    """Weights as they came. `scale` [N, G] float32 and `zero_point` [N, G] int32 for integers; neither for floats, and
    a scale [N, 1] for e4m3.
    """

    weight: Tensor  # [N, K] int8, e4m3 or a float type
    format: ActivationFormat
    bias: Tensor | None  # [N] float32
    scale: Tensor | None = None
    zero_point: Tensor | None = None

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0])

    @property
    def nbytes(self) -> int:
        parts = (self.weight, self.bias, self.scale, self.zero_point)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


def per_group(values: Tensor, *, weight: Tensor, name: str) -> Tensor:
    """Scales or zero points [1], [N], [N, 1] or [N, G] as [N, G]. Raises ValueError if they do not fit the weight
    [N, K].
    """
    rows, columns = weight.shape
    if values.numel() == 1:
        values = values.reshape(1, 1).expand(rows, 1)
    elif values.dim() == 1:
        values = values[:, None]
    if values.dim() != 2 or values.shape[0] != rows or values.shape[1] < 1 or columns % values.shape[1] != 0:
        raise ValueError(f"{name} {list(values.shape)} does not fit a weight {[rows, columns]}")
    group_size = columns // values.shape[1]
    if values.shape[1] > 1 and group_size % 4 != 0:
        raise ValueError(f"groups of {group_size} inputs are not served: a group must be a multiple of 4")
    return values.contiguous()


def check_int8(weight: Tensor, zero_point: Tensor | None, *, format: ActivationFormat, group_size: int) -> None:
    """Raise ValueError for weights whose integer sums could leave int32, and for formats that do not exist."""
    if weight.dtype != torch.int8 or weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"an int8 weight must be int8 [N, K], not {weight.dtype} {list(weight.shape)}")
    if format.limbs not in (1, 2) or format.fp8 or (format.static_scale is not None and format.limbs != 1):
        raise ValueError(f"int8 weights have no product with {format}")
    if format.static_scale is not None and not (format.static_scale > 0 and -128 <= format.zero_point <= 127):
        raise ValueError(f"a static scale must be above 0 and its zero point an int8, not {format}")
    if format.static_scale is None and format.zero_point != 0:
        raise ValueError("a dynamic scale has no zero point")
    largest_x = 128 + abs(format.zero_point)
    largest_w = 128 + (0 if zero_point is None else int(zero_point.abs().max()))
    if largest_x * largest_w * group_size >= 1 << 31:
        raise ValueError(f"sums over {group_size} inputs do not fit 32 bits")


def check_fp8(weight: Tensor, *, format: ActivationFormat) -> None:
    """Raise ValueError for what is no product of e4m3."""
    if weight.dtype != torch.float8_e4m3fn or weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"an fp8 weight must be float8_e4m3fn [N, K], not {weight.dtype} {list(weight.shape)}")
    if not format.fp8 or format.limbs != 1 or format.zero_point != 0:
        raise ValueError(f"fp8 weights have no product with {format}")
    if format.static_scale is not None and not format.static_scale > 0:
        raise ValueError(f"a static scale must be above 0, not {format.static_scale}")


def fp8_scale(scale: Tensor, *, weight: Tensor) -> Tensor:
    """[1], [N] or [N, 1] as [N, 1] float32. Raises ValueError for anything else."""
    scale = per_group(scale.float(), weight=weight, name="scale")
    if scale.shape[1] != 1:
        raise ValueError(f"fp8 weights have one scale a row, not {scale.shape[1]}")
    return scale


class ReferenceProducts:
    """`pack_int8`, `pack_float` and `linear` of `interface.Kernels`, and `interface.MultipliesFp8`."""

    multiplies_fp8 = False  # slowly: a checkpoint is better converted

    def pack_int8(
        self,
        weight: Tensor,
        scale: Tensor,
        *,
        format: ActivationFormat,
        zero_point: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> ReferenceLinear:
        scale = per_group(scale.float(), weight=weight, name="scale")
        if zero_point is not None:
            zero_point = per_group(zero_point.int(), weight=weight, name="zero_point").expand_as(scale)
        check_int8(weight, zero_point, format=format, group_size=weight.shape[1] // scale.shape[1])
        return ReferenceLinear(weight, format, None if bias is None else bias.float(), scale, zero_point)

    def pack_fp8(
        self, weight: Tensor, scale: Tensor, *, format: ActivationFormat, bias: Tensor | None = None
    ) -> ReferenceLinear:
        check_fp8(weight, format=format)
        scale = fp8_scale(scale, weight=weight)
        return ReferenceLinear(weight, format, None if bias is None else bias.float(), scale)

    def pack_float(self, weight: Tensor, *, bias: Tensor | None = None) -> ReferenceLinear:
        if not weight.is_floating_point() or weight.dim() != 2:
            raise ValueError(f"a float weight must be float [N, K], not {weight.dtype} {list(weight.shape)}")
        return ReferenceLinear(weight, FLOAT, None if bias is None else bias.float())

    def linear(self, x: Activation, weight: PackedLinear, *, residual: Tensor | None = None) -> Tensor:
        assert isinstance(weight, ReferenceLinear)
        if isinstance(x, Quantized):
            if x.format != weight.format or x.shape[1] != weight.in_features:
                wanted = f"{weight.format} of {weight.in_features} inputs"
                raise ValueError(f"the weight multiplies {wanted}, not {x.format} of {x.shape[1]}")
            y = _fp8_product(x, weight) if x.format.fp8 else _integer_product(x, weight)
        else:
            if weight.format != FLOAT:
                raise ValueError(f"the weight multiplies {weight.format}, not floats")
            y = _float_product(x, weight.weight)
        y = y if weight.bias is None else y + weight.bias
        return y if residual is None else y + residual


def _float_product(x: Tensor, weight: Tensor) -> Tensor:
    wide = weight.double()
    y = torch.empty(x.shape[0], weight.shape[0], dtype=torch.float32)
    for index, row in enumerate(x):
        y[index] = (wide @ row.double()).float()
    return y


def _integer_product(x: Quantized, weight: ReferenceLinear) -> Tensor:
    """The scaled sums u · sx of the contract, [M, N] float32."""
    assert weight.scale is not None
    num_groups = weight.scale.shape[1]
    size = weight.in_features // num_groups
    total = torch.zeros(x.shape[0], weight.out_features)
    for group in range(num_groups):
        columns = slice(group * size, (group + 1) * size)
        w = weight.weight[:, columns].double()  # [N, size]
        if weight.zero_point is not None:
            w = w - weight.zero_point[:, group, None].double()
        # Integers below 2^31 in float64: exact in any order. Converting to float32 rounds once.
        limbs = [((limb[:, columns].double() - x.format.zero_point) @ w.T).float() for limb in x.q]
        t = limbs[0] if len(limbs) == 1 else limbs[0] * 256.0 + limbs[1]
        u = t * weight.scale[:, group]
        total = u if num_groups == 1 else total + u
    return total * x.scale[:, None]


def _fp8_product(x: Quantized, weight: ReferenceLinear) -> Tensor:
    """(t · sw) · sx of the contract, [M, N] float32. 128 products of e4m3 add up exactly in float64, in any order."""
    assert weight.scale is not None
    total = torch.zeros(x.shape[0], weight.out_features)
    for first in range(0, weight.in_features, FP8_STEP):
        columns = slice(first, first + FP8_STEP)
        total = total + (x.q[0, :, columns].double() @ weight.weight[:, columns].double().T).float()
    return (total * weight.scale[:, 0]) * x.scale[:, None]
