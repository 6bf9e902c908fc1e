"""Weights in 8-bit floats (e4m3): as they are where the device multiplies them, else as the nearest int8 form.

That is int8 per channel, with inputs in two limbs. Each value is read exactly, times its scale; what the second
rounding costs is measured and reported per product. Weights whose inputs have 16 bits are always converted: products of
fp8 would round those inputs, which the checkpoint does not ask for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.quantization.errors import CheckpointError
from octavo.quantization.formats.reader import (
    ReaderInputs,
    bias_tensor,
    quantized_tensor,
    scale_tensor,
    type_name,
    weight_scale,
)
from octavo.quantization.scheme import A16, FP8, ActivationScheme, LinearWeights, QuantizedTensor, row_slices

CONVERTED = "fp8 written as int8 per channel"
INPUT_SCALE_UNUSED = f"{CONVERTED}; the fp8 input scale is not used: inputs are two limbs with a scale per row"
CACHE_UNUSED = "fp8 cache scales are not used: the cache takes one from each token and head"
NAN_BITS = 0x7F  # of e4m3, either sign; it has no infinity


def fp8_scheme(inputs: ReaderInputs, *, activations: bool = True) -> str:
    """For people. activations: of 8 bits."""
    return "fp8" if inputs.keep_fp8 and activations else "w8a16 from fp8"


def fp8_linear(
    inputs: ReaderInputs,
    name: str,
    *,
    shape: tuple[int, int],
    bias: bool,
    scale_name: str = "weight_scale",
    static: bool = False,
    activations: bool = True,
) -> LinearWeights:
    """The product `name`, kept or converted. static: it has an input scale; activations: its inputs are fp8 too.

    Raises CheckpointError.
    """
    source = inputs.source
    stored = source.take(f"{name}.weight", shape=shape)
    if stored.dtype != torch.float8_e4m3fn:
        raise CheckpointError(f"{name}.weight: is {type_name(stored)}, the quantization_config says float8_e4m3fn")
    scale = weight_scale(source, f"{name}.{scale_name}", num_rows=shape[0])
    input_scale = _input_scale(inputs, name) if static else None
    bias_values = bias_tensor(inputs, name, size=shape[0], present=bias)
    if inputs.keep_fp8 and activations:
        _check_numbers(stored, f"{name}.weight")
        scheme = FP8 if input_scale is None else ActivationScheme(1, static_scale=input_scale, fp8=True)
        return LinearWeights(QuantizedTensor(stored, scale), scheme, bias_values)
    wide = scale.expand(shape[0], 1)
    weight, loss = quantized_tensor(
        inputs,
        f"{name}.weight",
        shape=shape,
        read=lambda rows: stored[rows].float().mul_(wide[rows]),
        measure=True,
    )
    return LinearWeights(weight, A16, bias_values, loss=loss, note=INPUT_SCALE_UNUSED if static else CONVERTED)


def _input_scale(inputs: ReaderInputs, name: str) -> float:
    scale = scale_tensor(inputs.source, f"{name}.input_scale")  # checked like any other, also where it is not used
    if scale.numel() != 1:
        raise CheckpointError(f"{name}.input_scale: has shape {list(scale.shape)}; a scale per tensor is supported")
    return float(scale.item())


def _check_numbers(stored: Tensor, name: str) -> None:
    """Raises CheckpointError for a NaN."""
    for rows in row_slices(tuple(stored.shape)):
        if bool((stored[rows].view(torch.uint8) & NAN_BITS == NAN_BITS).any()):
            raise CheckpointError(f"{name}: has values that are not finite")
