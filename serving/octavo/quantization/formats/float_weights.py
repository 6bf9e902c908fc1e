"""Checkpoints with float weights: kept, or written as int8 per channel while they load (WEIGHT_QUANT)."""

from __future__ import annotations

from torch import Tensor

from octavo.quantization.formats.cache_scales import read_cache_scales
from octavo.quantization.formats.reader import (
    FLOAT_DTYPES,
    AttentionShape,
    Reader,
    ReaderInputs,
    bias_tensor,
    float_linear,
    float_tensor,
    quantized_tensor,
    type_name,
)
from octavo.quantization.scheme import A8, A16, FLOAT_ACTIVATION, ActivationScheme, CacheScheme, LinearWeights

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
        bias_values = bias_tensor(self._inputs, name, size=shape[0], present=bias)
        return written_anew(self._inputs, name, values, activation=self._activation, bias=bias_values)

    def cache(self, attention: str, *, heads: AttentionShape) -> CacheScheme:
        return read_cache_scales(self._inputs.source, attention, heads=heads, required=False)


def read_head(
    reader: Reader, inputs: ReaderInputs, name: str, *, shape: tuple[int, int], tied: Tensor | None
) -> LinearWeights:
    """The head, in 8 bits if HEAD_QUANT says so and it is float. tied: the embedding [V, H] that it shares.

    Raises CheckpointError.
    """
    activation = ACTIVATIONS.get(inputs.head_quant)
    if tied is not None:
        if activation is None:
            return LinearWeights(tied, FLOAT_ACTIVATION)
        return written_anew(inputs, name, tied.cpu(), activation=activation)  # beside the embedding, which stays float
    is_float = inputs.source.dtype(f"{name}.weight") in FLOAT_DTYPES and f"{name}.weight_scale" not in inputs.source
    if activation is None or not is_float:
        return reader.linear(name, shape=shape, bias=False, keep_float=True)
    values = float_tensor(inputs, f"{name}.weight", shape)
    return written_anew(inputs, name, values, activation=activation)


def written_anew(
    inputs: ReaderInputs, name: str, values: Tensor, *, activation: ActivationScheme, bias: Tensor | None = None
) -> LinearWeights:
    """A float weight [N, K] as int8 per channel."""
    shape = (values.shape[0], values.shape[1])
    weight, loss = quantized_tensor(
        inputs, f"{name}.weight", shape=shape, read=lambda rows: values[rows], measure=inputs.measure
    )
    return LinearWeights(weight, activation, bias, loss=loss)
