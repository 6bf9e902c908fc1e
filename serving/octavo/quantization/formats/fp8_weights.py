"""Weights in 8-bit floats (e4m3) as the nearest int8 form: per channel, their inputs in two limbs.

Each value is read exactly, times its scale; what the second rounding costs is measured and reported per product.
"""

from __future__ import annotations

import torch

from octavo.quantization.errors import CheckpointError
from octavo.quantization.formats.reader import (
    ReaderInputs,
    bias_tensor,
    quantized_tensor,
    scale_tensor,
    type_name,
    weight_scale,
)
from octavo.quantization.scheme import A16, LinearWeights

CONVERTED = "fp8 written as int8 per channel"
INPUT_SCALE_UNUSED = f"{CONVERTED}; the fp8 input scale is not used: inputs are two limbs with a scale per row"
CACHE_UNUSED = "fp8 cache scales are not used: the cache takes one from each token and head"


def fp8_linear(
    inputs: ReaderInputs,
    name: str,
    *,
    shape: tuple[int, int],
    bias: bool,
    scale_name: str = "weight_scale",
    static: bool = False,
) -> LinearWeights:
    """The product `name`, converted. static: it has an input scale. Raises CheckpointError."""
    source = inputs.source
    stored = source.take(f"{name}.weight", shape=shape)
    if stored.dtype != torch.float8_e4m3fn:
        raise CheckpointError(f"{name}.weight: is {type_name(stored)}, the quantization_config says float8_e4m3fn")
    scale = weight_scale(source, f"{name}.{scale_name}", num_rows=shape[0]).expand(shape[0], 1)
    if static:
        scale_tensor(source, f"{name}.input_scale")  # checked like any other, though not used
    weight, loss = quantized_tensor(
        inputs,
        f"{name}.weight",
        shape=shape,
        read=lambda rows: stored[rows].float() * scale[rows],
        measure=True,
    )
    bias_values = bias_tensor(inputs, name, size=shape[0], present=bias)
    return LinearWeights(weight, A16, bias_values, loss=loss, note=INPUT_SCALE_UNUSED if static else CONVERTED)
