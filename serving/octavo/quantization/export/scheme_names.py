"""What `--scheme` can say, and the entry of config.json that other tools read it from. Knows nothing of weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from octavo.quantization.errors import CheckpointError

NAMES = "a8w8c8, a8w8, a8w8c8-static, a8w8-static, w8a16, w8a16-g128 (any group size from 16)"
STATIC = "-static"
GROUPED = re.compile(r"w8a16-g(\d{2,4})")
EIGHT_BITS = {"num_bits": 8, "type": "int", "symmetric": True}


@dataclass(frozen=True)
class Scheme:
    """Weights are always int8. static_inputs: a calibrated scale per product's input, not one per token."""

    name: str
    eight_bit_inputs: bool
    eight_bit_cache: bool
    group_size: int | None = None
    static_inputs: bool = False

    @property
    def packed(self) -> bool:
        """Weight-only checkpoints are read as pack-quantized by other tools, the others as int-quantized."""
        return not self.eight_bit_inputs


def parse_scheme(name: str) -> Scheme:
    """Raises CheckpointError for a name that is not known."""
    known = {
        "a8w8c8": Scheme("a8w8c8", eight_bit_inputs=True, eight_bit_cache=True),
        "a8w8": Scheme("a8w8", eight_bit_inputs=True, eight_bit_cache=False),
        "w8a16": Scheme("w8a16", eight_bit_inputs=False, eight_bit_cache=False),
    }
    base = name.removesuffix(STATIC)
    if base in known and (base == name or known[base].eight_bit_inputs):
        return replace(known[base], name=name, static_inputs=base != name)
    grouped = GROUPED.fullmatch(name)
    if grouped is None or not 16 <= int(grouped[1]) <= 1024:
        raise CheckpointError(f"--scheme {name!r} is not known (known: {NAMES})")
    return Scheme(name, eight_bit_inputs=False, eight_bit_cache=False, group_size=int(grouped[1]))


def quantization_config(scheme: Scheme, *, ignore: Sequence[str], cache_per_head: bool = False) -> dict[str, object]:
    """`quantization_config` as compressed-tensors defines it."""
    weights: dict[str, object] = {**EIGHT_BITS, "strategy": "channel", "dynamic": False}
    if scheme.group_size is not None:
        weights = {**EIGHT_BITS, "strategy": "group", "group_size": scheme.group_size, "dynamic": False}
    inputs: dict[str, object] = {**EIGHT_BITS, "strategy": "token", "dynamic": True}
    if scheme.static_inputs:
        inputs = {**EIGHT_BITS, "strategy": "tensor", "dynamic": False}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs if scheme.eight_bit_inputs else None,
        "output_activations": None,
    }
    cache = {**EIGHT_BITS, "strategy": "attn_head" if cache_per_head else "tensor", "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if scheme.packed else "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "kv_cache_scheme": cache if scheme.eight_bit_cache else None,
    }
