"""Checkpoints with float weights: kept, or written as int8 per channel while they load (WEIGHT_QUANT)."""

from __future__ import annotations

from octavo.quantization.formats.cache_scales import read_cache_scales
from octavo.quantization.formats.reader import (
    AttentionShape,
    ReaderInputs,
    bias_tensor,
    float_linear,
    float_tensor,
    quantized_tensor,
    type_name,
)
from octavo.quantization.scheme import A8, A16, CacheScheme, LinearWeights

ACTIVATIONS = {"auto": A16, "wint8": A16, "a8w8": A8}


class FloatReader:
    """`weight_quant` none keeps the weights; wint8 (auto): W8A16, a8w8: W8A8. Heads and routers stay float."""

    def __init__(self, inputs: ReaderInputs) -> None:
        self._inputs = inputs
        self._activation = ACTIVATIONS.get(inputs.weight_quant)
        self._dtypes: set[str] = set()

    @property
    def weight_scheme(self) -> str:
        if self._activation is not None:
            return f"w8a{8 * self._activation.limbs}"
        return "/".join(sorted(self._dtypes))

    def linear(self, name: str, *, shape: tuple[int, int], bias: bool, keep_float: bool = False) -> LinearWeights:
        if keep_float or self._activation is None:
            linear = float_linear(self._inputs, name, shape=shape, bias=bias)
            self._dtypes.add(type_name(linear.weight))  # type: ignore[arg-type]
            return linear
        values = float_tensor(self._inputs, f"{name}.weight", shape)
        weight, loss = quantized_tensor(
            self._inputs, f"{name}.weight", shape=shape, read=lambda rows: values[rows], measure=self._inputs.measure
        )
        bias_values = bias_tensor(self._inputs, name, size=shape[0], present=bias)
        return LinearWeights(weight, self._activation, bias_values, loss=loss)

    def cache(self, attention: str, *, heads: AttentionShape) -> CacheScheme:
        return read_cache_scales(self._inputs.source, attention, heads=heads, required=False)
