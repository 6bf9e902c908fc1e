"""GPTQ checkpoints of 8 bits: values packed along K, scales and zero points per group, inputs in two limbs.

Groups of neighbouring columns are kept as they are. With act-order (`desc_act`) a group's columns lie anywhere: such a
product is dequantised and written anew per channel, its loss measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.quantization.errors import CheckpointError
from octavo.quantization.files import QUANTIZE_AGAIN
from octavo.quantization.formats.cache_scales import read_cache_scales
from octavo.quantization.formats.packed_words import unpack
from octavo.quantization.formats.reader import (
    AttentionShape,
    ReaderInputs,
    bias_tensor,
    float_linear,
    quantized_tensor,
    scale_tensor,
    type_name,
)
from octavo.quantization.formats.source import TensorSource
from octavo.quantization.scheme import A16, CacheScheme, LinearWeights, QuantizedTensor

REORDERED = "act-order: the groups' columns lie apart, so the weight is written as int8 per channel"


@dataclass(frozen=True)
class _Stored:
    """One product: w[n, k] = (q[n, k] − zero_point[n, group_of[k]]) · scale[n, group_of[k]]."""

    q: Tensor  # [N, K] int8
    scale: Tensor  # [N, G] float32
    zero_point: Tensor  # [N, G] int8
    group_of: Tensor  # [K] int64


class GptqReader:
    """qweight i32 [K/4, N], qzeros i32 [G, N/4], scales [G, N], g_idx i32 [K]. Raises CheckpointError."""

    weight_scheme = "w8a16"

    def __init__(self, inputs: ReaderInputs) -> None:
        config = inputs.quantization or {}
        if config.get("bits") != 8:
            bits = f"GPTQ of {config.get('bits')} bits"
            raise CheckpointError(f"quantization_config.bits: {bits} is not supported, only of 8; {QUANTIZE_AGAIN}")
        self._inputs = inputs
        self._zero_offset = _zero_offset(config)

    def linear(self, name: str, *, shape: tuple[int, int], bias: bool, keep_float: bool = False) -> LinearWeights:
        source = self._inputs.source
        if f"{name}.qweight" not in source and f"{name}.weight" in source:
            return float_linear(self._inputs, name, shape=shape, bias=bias)
        stored = _take(source, name, shape=shape, zero_offset=self._zero_offset)
        bias_values = bias_tensor(self._inputs, name, size=shape[0], present=bias)
        if not bias:
            _check_empty_bias(source, f"{name}.bias")
        groups = _in_order(stored)
        if groups is not None:
            return LinearWeights(groups, A16, bias_values)
        weight, loss = quantized_tensor(
            self._inputs, f"{name}.qweight", shape=shape, read=lambda rows: _dequantize(stored, rows), measure=True
        )
        return LinearWeights(weight, A16, bias_values, loss=loss, note=REORDERED)

    def cache(self, attention: str, *, heads: AttentionShape) -> CacheScheme:
        return read_cache_scales(self._inputs.source, attention, heads=heads, required=False)


def _zero_offset(config: Mapping[str, object]) -> int:
    """What is added to stored zero points: version 1 of the format keeps them one too low."""
    form = config.get("checkpoint_format", "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"quantization_config.checkpoint_format: must be gptq or gptq_v2: {form!r}")
    return 1 if form == "gptq" else 0


def _take(source: TensorSource, name: str, *, shape: tuple[int, int], zero_offset: int) -> _Stored:
    rows, columns = shape
    if rows % 4 or columns % 4:
        raise CheckpointError(f"{name}: GPTQ weights of {list(shape)} are not supported: no multiple of 4")
    words = source.take(f"{name}.qweight", shape=(columns // 4, rows))
    q = unpack(words.t().contiguous(), f"{name}.qweight")  # [N, K]
    scale = scale_tensor(source, f"{name}.scales")  # [G, N]
    if scale.dim() != 2 or scale.shape[1] != rows or not 0 < scale.shape[0] <= columns:
        raise CheckpointError(f"{name}.scales: has shape {list(scale.shape)}, [groups, {rows}] is needed")
    num_groups = scale.shape[0]
    zeros = unpack(source.take(f"{name}.qzeros", shape=(num_groups, rows // 4)), f"{name}.qzeros")
    zeros = (zeros.view(torch.uint8) + zero_offset).view(torch.int8)  # [G, N]; 255 + 1 is zero again
    group_of = _groups(source, f"{name}.g_idx", columns=columns, num_groups=num_groups)
    return _Stored(q, scale.t().contiguous(), zeros.t().contiguous(), group_of)


def _groups(source: TensorSource, name: str, *, columns: int, num_groups: int) -> Tensor:
    """The group of each column, [K] int64. Without act-order files may leave them out."""
    if name not in source:
        return torch.arange(columns) // -(-columns // num_groups)
    group_of = source.take(name, shape=(columns,))
    if group_of.dtype not in (torch.int32, torch.int64):
        raise CheckpointError(f"{name}: is {type_name(group_of)}, int32 is needed")
    group_of = group_of.long()
    if int(group_of.min()) < 0 or int(group_of.max()) >= num_groups:
        raise CheckpointError(f"{name}: names groups outside 0 to {num_groups - 1}")
    return group_of


def _in_order(stored: _Stored) -> QuantizedTensor | None:
    """The product as it is, if its groups are runs of equally many columns; None if they are not."""
    columns, num_groups = stored.q.shape[1], stored.scale.shape[1]
    size = columns // num_groups
    if columns % num_groups or (num_groups > 1 and size % 4):
        return None
    if not torch.equal(stored.group_of, torch.arange(columns) // size):
        return None
    symmetric = not bool(stored.zero_point.any())
    return QuantizedTensor(stored.q, stored.scale, None if symmetric else stored.zero_point)


def _dequantize(stored: _Stored, rows: slice) -> Tensor:
    """[R, K] float32."""
    q = stored.q[rows].float()
    return (q - stored.zero_point[rows].float()[:, stored.group_of]) * stored.scale[rows][:, stored.group_of]


def _check_empty_bias(source: TensorSource, name: str) -> None:
    """Some writers give every product a bias of zeros."""
    if name in source and bool(source.take(name).any()):
        raise CheckpointError(f"{name}: the model has no such bias")
