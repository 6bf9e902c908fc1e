"""Checkpoints of `quant_method: fp8` (AngelSlim, AutoFP8, vLLM's own): e4m3 weights, static or dynamic activations.

Input scales count where the device multiplies fp8. They and cache scales are no int8 scales: elsewhere they are checked
and then not used.
"""

from __future__ import annotations

from octavo.quantization.errors import CheckpointError
from octavo.quantization.files import QUANTIZE_AGAIN
from octavo.quantization.formats.cache_scales import pass_over_cache_scales
from octavo.quantization.formats.fp8_weights import CACHE_UNUSED, fp8_linear, fp8_scheme
from octavo.quantization.formats.reader import (
    FLOAT_DTYPES,
    AttentionShape,
    ReaderInputs,
    float_linear,
    module_matches,
    texts,
)
from octavo.quantization.scheme import CacheScheme, LinearWeights

IGNORE_KEYS = ("ignored_layers", "ignore", "modules_to_not_convert")
BLOCKS = f"fp8 weights with a scale per block (weight_scale_inv) are not supported; {QUANTIZE_AGAIN}"


class Fp8Reader:
    """Reads by the stored type and the list of ignored modules. Raises CheckpointError for what is not served."""

    def __init__(self, inputs: ReaderInputs) -> None:
        config = inputs.quantization or {}
        activations = config.get("activation_scheme", "dynamic")
        if activations not in ("static", "dynamic"):
            raise CheckpointError(f"quantization_config.activation_scheme: must be static or dynamic: {activations!r}")
        if config.get("weight_block_size") is not None:
            raise CheckpointError(f"quantization_config.weight_block_size: {BLOCKS}")
        self._inputs = inputs
        self._static = activations == "static"
        self._ignored = [target for key in IGNORE_KEYS for target in texts(config.get(key), key)]

    @property
    def weight_scheme(self) -> str:
        return fp8_scheme(self._inputs)

    def linear(self, name: str, *, shape: tuple[int, int], bias: bool, keep_float: bool = False) -> LinearWeights:
        source = self._inputs.source
        if f"{name}.weight_scale_inv" in source:
            raise CheckpointError(f"{name}.weight_scale_inv: {BLOCKS}")
        plain = source.dtype(f"{name}.weight") in FLOAT_DTYPES and f"{name}.weight_scale" not in source
        if plain or any(module_matches(target, name) for target in self._ignored):
            return float_linear(self._inputs, name, shape=shape, bias=bias)
        return fp8_linear(self._inputs, name, shape=shape, bias=bias, static=self._static)

    def cache(self, attention: str, *, heads: AttentionShape) -> CacheScheme:
        return pass_over_cache_scales(self._inputs.source, attention, note=CACHE_UNUSED)
