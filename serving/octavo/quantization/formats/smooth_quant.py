"""Checkpoints of LMDeploy's smooth_quant: int8 weights with a scale per row, activations in 8 bits per token.

The smoothing itself is folded into norms and weights already. Which products are quantised is not written down; their
stored type says it.
"""

from __future__ import annotations

import torch

from octavo.quantization.errors import CheckpointError
from octavo.quantization.formats.cache_scales import read_cache_scales
from octavo.quantization.formats.fp8_weights import fp8_linear, fp8_scheme
from octavo.quantization.formats.reader import (
    FLOAT_DTYPES,
    AttentionShape,
    ReaderInputs,
    bias_tensor,
    float_linear,
    int8_tensor,
    weight_scale,
)
from octavo.quantization.scheme import A8, CacheScheme, LinearWeights, QuantizedTensor

DTYPES = {"int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn, "fp8": torch.float8_e4m3fn}


class SmoothQuantReader:
    """weight i8 [N, K] with scale f32 [N, 1]; or the same in fp8. Raises CheckpointError."""

    def __init__(self, inputs: ReaderInputs) -> None:
        dtype = (inputs.quantization or {}).get("quant_dtype", "int8")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise CheckpointError(f"quantization_config.quant_dtype: must be one of {', '.join(DTYPES)}: {dtype!r}")
        self._inputs = inputs
        self._is_int8 = DTYPES[dtype] == torch.int8

    @property
    def weight_scheme(self) -> str:
        return "w8a8" if self._is_int8 else fp8_scheme(self._inputs)

    def linear(self, name: str, *, shape: tuple[int, int], bias: bool, keep_float: bool = False) -> LinearWeights:
        source = self._inputs.source
        if source.dtype(f"{name}.weight") in FLOAT_DTYPES and f"{name}.scale" not in source:
            return float_linear(self._inputs, name, shape=shape, bias=bias)
        if not self._is_int8:
            return fp8_linear(self._inputs, name, shape=shape, bias=bias, scale_name="scale")
        q = int8_tensor(source, f"{name}.weight", shape=shape)
        weight = QuantizedTensor(q, weight_scale(source, f"{name}.scale", num_rows=shape[0]))
        return LinearWeights(weight, A8, bias_tensor(self._inputs, name, size=shape[0], present=bias))

    def cache(self, attention: str, *, heads: AttentionShape) -> CacheScheme:
        return read_cache_scales(self._inputs.source, attention, heads=heads, required=False)
