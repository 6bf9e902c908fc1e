"""Numbers of 8 bits: how weights, activations and caches are written as integers, and how a float weight becomes one.

Used by checkpoint readers and the model loader while a model loads, and by export tools. Knows nothing of files, layers
or kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

VALUES_AT_ONCE = 1 << 20  # four megabytes of float32: what a cache holds
FLOAT_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class ActivationScheme:
    """How a product's input is written: limbs 0 float, 1 int8, 2 two int8; a scale per row unless one is given.

    fp8, with limbs 1: e4m3 in place of int8.
    """

    limbs: int
    static_scale: float | None = None
    zero_point: int = 0
    fp8: bool = False


FLOAT_ACTIVATION = ActivationScheme(0)
A8 = ActivationScheme(1)
A16 = ActivationScheme(2)
FP8 = ActivationScheme(1, fp8=True)


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight [N, K] ≈ (q − zero_point) · scale, both spread over the columns of their group.

    q of e4m3 has one group and no zero point, and goes with activations of e4m3.
    """

    q: Tensor  # [N, K] int8 or float8_e4m3fn
    scale: Tensor  # [N, 1] or [N, K / group_size] or [1] float32
    zero_point: Tensor | None = None  # like scale, int8

    @property
    def group_size(self) -> int | None:
        """Columns that share a scale; None if all do."""
        groups = self.scale.shape[-1] if self.scale.dim() == 2 else 1
        return None if groups == 1 else self.q.shape[1] // groups


@dataclass(frozen=True)
class LinearWeights:
    """One product y = x · Wᵀ + b as a checkpoint holds it.

    loss: ‖W − Ŵ‖ / ‖W‖ if the weight was written anew while it was read; note: what was left out. Both for the report.
    """

    weight: QuantizedTensor | Tensor  # [N, K]; a Tensor is float
    activation: ActivationScheme
    bias: Tensor | None = None  # [N] float32
    loss: float | None = None
    note: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        tensor = self.weight.q if isinstance(self.weight, QuantizedTensor) else self.weight
        return tensor.shape[0], tensor.shape[1]

    def take_rows(self, rows: Tensor) -> LinearWeights:
        """The same product with the outputs `rows` [R] int64, in that order."""
        bias = None if self.bias is None else self.bias[rows]
        if not isinstance(self.weight, QuantizedTensor):
            return LinearWeights(self.weight[rows], self.activation, bias)
        per_row = _per_row(self.weight)
        zero_point = None if per_row.zero_point is None else per_row.zero_point[rows]
        return LinearWeights(QuantizedTensor(per_row.q[rows], per_row.scale[rows], zero_point), self.activation, bias)


@dataclass(frozen=True)
class CacheScheme:
    """Static scales of one layer's int8 cache, [1] or [num_kv_heads] float32; None: dynamic, per token and head."""

    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    note: str = ""  # what was left out, for the report

    @property
    def static(self) -> bool:
        return self.k_scale is not None


def quantize_per_channel(weight: Tensor) -> QuantizedTensor:
    """A float weight [N, K] to the nearest of 256 levels per row.

    The step is absmax / 127.5, as compressed-tensors has it: no value is further from its level than half a step, the
    two extremes (128 cut to 127) included, and the step is smaller than absmax / 127. A row with NaN or infinity gets
    a scale that is not finite.
    """
    return quantize_rows(lambda rows: weight[rows], shape=(weight.shape[0], weight.shape[1]))[0]


def quantize_rows(
    read: Callable[[slice], Tensor],  # rows -> [R, K] float
    *,
    shape: tuple[int, int],
    scale: Tensor | None = None,  # [N, 1] float32; None: the best for each row
    measure: bool = False,
) -> tuple[QuantizedTensor, float | None]:
    """Like `quantize_per_channel` of a weight that is read some rows at a time, and the relative error if measured."""
    num_rows = shape[0]
    q = torch.empty(shape, dtype=torch.int8)  # [N, K]
    scales = torch.empty((num_rows, 1)) if scale is None else scale.expand(num_rows, 1)  # [N, 1] float32
    lost = total = 0.0
    work = torch.empty(0)  # of a slice, used again and again: what is freed on the way of a load is not given back
    for rows in row_slices(shape):
        x = read(rows).float()
        if scale is None:
            absmax = torch.maximum(x.amax(dim=1, keepdim=True), -x.amin(dim=1, keepdim=True))
            scales[rows] = torch.where(absmax == 0, torch.ones_like(absmax), absmax / 127.5)
        torch.div(x, scales[rows], out=work.resize_(x.shape))
        q[rows] = work.round_().clamp_(-128, 127)
        if measure:
            total += _energy(x)
            lost += _energy(torch.mul(q[rows], scales[rows], out=work).sub_(x))
    return QuantizedTensor(q, scales), math.sqrt(lost / total) if total else (0.0 if measure else None)


def row_slices(shape: tuple[int, ...], *, values: int = VALUES_AT_ONCE) -> Iterator[slice]:
    """The rows of a tensor in parts of about so many values: four megabytes of float32."""
    step = max(1, values // max(1, math.prod(shape[1:])))
    return (slice(low, low + step) for low in range(0, shape[0], step))


def _energy(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x).double().square())


def dequantize(tensor: QuantizedTensor) -> Tensor:
    """[N, K] float32."""
    rows, columns = tensor.q.shape
    per_row = _per_row(tensor)
    groups = per_row.scale.shape[1]
    q = tensor.q.float().view(rows, groups, columns // groups)
    if per_row.zero_point is not None:
        q = q - per_row.zero_point.float()[..., None]
    return (q * per_row.scale[..., None]).view(rows, columns)


def concatenate(parts: Sequence[LinearWeights]) -> LinearWeights | None:
    """The parts as one product with all their outputs in a row, or None where their schemes differ."""
    if any(part.activation != parts[0].activation or (part.bias is None) != (parts[0].bias is None) for part in parts):
        return None
    bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts if part.bias is not None])
    weight = _concatenate_weights([part.weight for part in parts])
    return None if weight is None else LinearWeights(weight, parts[0].activation, bias)


def _concatenate_weights(weights: list[QuantizedTensor | Tensor]) -> QuantizedTensor | Tensor | None:
    quantized = [_per_row(weight) for weight in weights if isinstance(weight, QuantizedTensor)]
    floats = [weight for weight in weights if isinstance(weight, Tensor)]
    if not quantized:
        return torch.cat(floats) if len({weight.dtype for weight in floats}) == 1 else None
    zero_points = [weight.zero_point for weight in quantized if weight.zero_point is not None]
    if floats or len({weight.scale.shape[1] for weight in quantized}) > 1 or 0 < len(zero_points) < len(quantized):
        return None
    return QuantizedTensor(
        torch.cat([weight.q for weight in quantized]),
        torch.cat([weight.scale for weight in quantized]),
        torch.cat(zero_points) if zero_points else None,
    )


def _per_row(tensor: QuantizedTensor) -> QuantizedTensor:
    """The same with a scale per tensor [1] spread to one per row [N, 1]."""
    if tensor.scale.dim() == 2:
        return tensor
    rows = tensor.q.shape[0]
    zero_point = None if tensor.zero_point is None else tensor.zero_point.reshape(1, 1).expand(rows, 1)
    return QuantizedTensor(tensor.q, tensor.scale.reshape(1, 1).expand(rows, 1), zero_point)
