"""What a checkpoint reader takes and gives, and the checks that all of them share. Runs while a model loads."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from octavo.quantization.errors import CheckpointError
from octavo.quantization.formats.source import TensorSource
from octavo.quantization.scheme import (
    FLOAT_ACTIVATION,
    CacheScheme,
    LinearWeights,
    QuantizedTensor,
    quantize_rows,
    row_slices,
)

LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)")
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # below it 1 / scale is infinite


@dataclass(frozen=True)
class ReaderInputs:
    """All that a reader may look at."""

    source: TensorSource
    quantization: Mapping[str, object] | None  # quantization_config of config.json
    weight_quant: str = "auto"  # auto, none, wint8, a8w8: for float weights
    float_dtype: torch.dtype | None = None  # None: keep the checkpoint's
    measure: bool = False  # the loss of float weights too: slower
    head_quant: str = "none"  # none, wint8, a8w8: for a float head
    keep_fp8: bool = False  # the device multiplies fp8: weights of it stay as they are


@dataclass(frozen=True)
class AttentionShape:
    """Heads of an attention module."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


class Reader(Protocol):
    """Reads products and cache scales by their names in the checkpoint. Tensors may be views of the mapped file."""

    @property
    def weight_scheme(self) -> str:
        """For people: "w8a8", "w8a16", "bfloat16", …"""
        ...

    def linear(self, name: str, *, shape: tuple[int, int], bias: bool, keep_float: bool = False) -> LinearWeights:
        """The product `name` with weights of `shape` (N out, K in). keep_float: a head or router, never quantised here.

        Raises CheckpointError if a tensor is missing or has another shape or type.
        """
        ...

    def cache(self, attention: str, *, heads: AttentionShape) -> CacheScheme:
        """Scales of the cache of the attention module `attention`. Raises CheckpointError."""
        ...


def float_tensor(inputs: ReaderInputs, name: str, shape: tuple[int, ...]) -> Tensor:
    """A float tensor of `shape`, as stored. Raises CheckpointError."""
    tensor = inputs.source.take(name, shape=shape)
    if tensor.dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"{name}: is {type_name(tensor)}, a float type is needed here")
    return tensor


def kept_tensor(inputs: ReaderInputs, name: str, shape: tuple[int, ...]) -> Tensor:
    """The same in DTYPE if that is set, in memory of its own, every value finite. Raises CheckpointError."""
    tensor = float_tensor(inputs, name, shape)
    kept = torch.empty(shape, dtype=inputs.float_dtype or tensor.dtype)
    for rows in row_slices(shape):
        part = tensor[rows].to(kept.dtype)
        # one pass: a sum of finite values is finite, and a tensor's NaN or infinity stays in it
        if not bool(torch.isfinite(part.sum(dtype=torch.float64 if part.dtype == torch.float32 else torch.float32))):
            raise _not_finite(name)
        kept[rows] = part
    return kept


def quantized_tensor(
    inputs: ReaderInputs,
    name: str,
    *,
    shape: tuple[int, int],
    read: Callable[[slice], Tensor],
    scale: Tensor | None = None,
    measure: bool,
) -> tuple[QuantizedTensor, float | None]:
    """`quantize_rows` for the tensor `name`. Raises CheckpointError if a value is not finite."""
    weight, loss = quantize_rows(read, shape=shape, scale=scale, measure=measure)
    if not bool(torch.isfinite(weight.scale).all()) or (loss is not None and not math.isfinite(loss)):
        raise _not_finite(name)
    return weight, loss


def bias_tensor(inputs: ReaderInputs, name: str, *, size: int, present: bool) -> Tensor | None:
    """`name`.bias as float32, or None if the model has none. Raises CheckpointError."""
    return vector_tensor(inputs.source, f"{name}.bias", size) if present else None


def vector_tensor(source: TensorSource, name: str, size: int) -> Tensor:
    """A bias or a norm's weight: [size] float32, every value finite. Raises CheckpointError."""
    vector = source.take(name, shape=(size,))
    if not vector.dtype.is_floating_point:
        raise CheckpointError(f"{name}: is {type_name(vector)}, a float type is needed here")
    if not bool(torch.isfinite(vector.float()).all()):
        raise _not_finite(name)
    return vector.float().clone()


def float_linear(inputs: ReaderInputs, name: str, *, shape: tuple[int, int], bias: bool) -> LinearWeights:
    """A product that stays float. Raises CheckpointError."""
    weight = kept_tensor(inputs, f"{name}.weight", shape)
    return LinearWeights(weight, FLOAT_ACTIVATION, bias_tensor(inputs, name, size=shape[0], present=bias))


def scale_tensor(source: TensorSource, name: str) -> Tensor:
    """A tensor of scales as float32, all of them finite and above zero. Raises CheckpointError."""
    scale = source.take(name)
    if not scale.dtype.is_floating_point:
        raise CheckpointError(f"{name}: is {type_name(scale)}, scales must be of a float type")
    scale = scale.float()
    if not bool(torch.isfinite(scale).all()) or not bool((scale >= SMALLEST_SCALE).all()):
        raise CheckpointError(f"{name}: every scale must be finite and above zero")
    return scale


def weight_scale(source: TensorSource, name: str, *, num_rows: int) -> Tensor:
    """Scales of a weight with `num_rows` outputs, per tensor or per row, as [1] or [N, 1]. Raises CheckpointError."""
    scale = scale_tensor(source, name)
    if scale.numel() == 1:
        return scale.reshape(1)
    if scale.numel() != num_rows or tuple(scale.shape) not in ((num_rows,), (num_rows, 1)):
        raise CheckpointError(f"{name}: has shape {list(scale.shape)}, [1] or [{num_rows}, 1] is needed")
    return scale.reshape(num_rows, 1)


def int8_tensor(source: TensorSource, name: str, *, shape: tuple[int, int]) -> Tensor:
    """An int8 weight [N, K]. Raises CheckpointError."""
    q = source.take(name, shape=shape)
    if q.dtype != torch.int8:
        raise CheckpointError(f"{name}: is {type_name(q)}, the quantization_config says int8")
    return q


def texts(value: object, name: str) -> Sequence[str]:
    """A list of texts of the quantization_config; missing: none. Raises CheckpointError."""
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"quantization_config.{name}: must be a list of texts")
    return value


def pattern_matches(target: str, name: str) -> bool:
    """Whether `re:…` matches from the start of a name. Raises CheckpointError if it is no regular expression."""
    try:
        return re.match(target.removeprefix("re:"), name) is not None
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"quantization_config: {target!r} is not a regular expression: {error}") from None


def module_matches(target: str, name: str) -> bool:
    """Whether an entry of a list of modules means the product `name`: itself, a module around it, or its last parts."""
    if target.startswith("re:"):
        return pattern_matches(target, name)
    return target == name or name.startswith(f"{target}.") or name.endswith(f".{target}")


def without_trunk(name: str) -> str:
    """The part of a name that does not depend on how a model calls its trunk: `layers.0.self_attn.q_proj`."""
    found = LAYER.fullmatch(name)
    return name if found is None else f"layers.{found[1]}.{found[2]}"


def type_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _not_finite(name: str) -> CheckpointError:
    return CheckpointError(f"{name}: has values that are not finite")
