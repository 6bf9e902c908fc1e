"""What a checkpoint reader takes and gives, and the checks that all of them share. Runs while a model loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from octavo.quantization.errors import CheckpointError
from octavo.quantization.formats.source import TensorSource
from octavo.quantization.scheme import FLOAT_ACTIVATION, CacheScheme, LinearWeights

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class ReaderInputs:
    """All that a reader may look at."""

    source: TensorSource
    quantization: Mapping[str, object] | None  # quantization_config of config.json
    weight_quant: str = "auto"  # auto, none, wint8, a8w8: for float weights
    float_dtype: torch.dtype | None = None  # None: keep the checkpoint's


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

    def cache(self, attention: str, *, num_kv_heads: int) -> CacheScheme:
        """Scales of the cache of the attention module `attention`. Raises CheckpointError."""
        ...


def float_tensor(inputs: ReaderInputs, name: str, shape: tuple[int, ...]) -> Tensor:
    """A float tensor of `shape`, in DTYPE if that is set. Raises CheckpointError."""
    tensor = inputs.source.take(name, shape=shape)
    if tensor.dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"{name}: is {type_name(tensor)}, a float type is needed here")
    return tensor if inputs.float_dtype is None else tensor.to(inputs.float_dtype)


def bias_tensor(inputs: ReaderInputs, name: str, *, size: int, present: bool) -> Tensor | None:
    """`name`.bias as float32, or None if the model has none. Raises CheckpointError."""
    return inputs.source.take(f"{name}.bias", shape=(size,)).float() if present else None


def float_linear(inputs: ReaderInputs, name: str, *, shape: tuple[int, int], bias: bool) -> LinearWeights:
    """A product that stays float. Raises CheckpointError."""
    weight = float_tensor(inputs, f"{name}.weight", shape)
    return LinearWeights(weight, FLOAT_ACTIVATION, bias_tensor(inputs, name, size=shape[0], present=bias))


def scale_tensor(source: TensorSource, name: str) -> Tensor:
    """A tensor of scales as float32, all of them finite and above zero. Raises CheckpointError."""
    scale = source.take(name).float()
    if not bool(torch.isfinite(scale).all()) or not bool((scale > 0).all()):
        raise CheckpointError(f"{name}: every scale must be finite and above zero")
    return scale


def type_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
