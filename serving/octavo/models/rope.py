"""The table of cosines and sines of a model's rotary embedding. Made once at load, on the host."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from octavo.models.rope_config import RopeConfig

_PART = 4096  # positions at a time


def cos_sin_table(rope: RopeConfig, *, num_positions: int) -> Tensor:
    """[num_positions, rotary_dim] float32: cosines in the first half, sines in the second.

    Angles are float32, as everywhere; their cosines are rounded from float64, by numpy: each process has this table.
    """
    frequencies = inverse_frequencies(rope).numpy()
    width = len(frequencies)
    table = np.empty((num_positions, 2 * width), dtype=np.float32)
    for start in range(0, num_positions, _PART):
        part = table[start : start + _PART]
        positions = np.arange(start, start + len(part), dtype=np.float32)
        angles = (positions[:, None] * frequencies).astype(np.float64)
        part[:, :width], part[:, width:] = np.cos(angles), np.sin(angles)
    return torch.from_numpy(table) * attention_factor(rope)


def inverse_frequencies(rope: RopeConfig) -> Tensor:
    """Radians per position, [rotary_dim / 2] float32."""
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim
    plain = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    if rope.kind == "yarn":
        return _yarn(plain, rope)
    return plain


def attention_factor(rope: RopeConfig) -> float:
    """What yarn multiplies cosines and sines by; 1 elsewhere."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _llama3(plain: Tensor, rope: RopeConfig) -> Tensor:
    """Frequencies that turn often in the old context are kept, rare ones divided by `factor`, a blend between."""
    turns = rope.original_context * plain / (2 * math.pi)
    keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return plain * keep + plain / rope.factor * (1 - keep)


def _yarn(plain: Tensor, rope: RopeConfig) -> Tensor:
    """Dimensions above beta_fast turns in the old context are kept, those below beta_slow stretched, a ramp between."""
    low, high = _yarn_dimension(rope, rope.beta_fast), _yarn_dimension(rope, rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    width = high - low if high != low else 0.001
    stretch = ((torch.arange(rope.rotary_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return plain / rope.factor * stretch + plain * (1 - stretch)


def _yarn_dimension(rope: RopeConfig, turns: float) -> float:
    """The (fractional) dimension that turns so many times in the old context."""
    return rope.rotary_dim * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
