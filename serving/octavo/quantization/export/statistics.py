"""What calibration text says about a layer's inputs, and hooks that round as the served model will.

Both are hooks of `layer_forward`. Statistics are taken with the layer's float weights.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

import torch
from torch import Tensor

from octavo.quantization.export.layer_forward import Hooks
from octavo.quantization.smooth import round_activation, round_static

EXTREME_ROWS = 8
SAMPLE_ROWS = 384  # of an input kept for searches
SAMPLE_KEYS = 256


@dataclass
class InputStatistics:
    """One site's input."""

    maxima: Tensor  # [K]
    sample: Tensor  # [m, K]
    hessian: Tensor  # [K, K] Σ xᵀx
    extremes: Tensor  # [e, K] the rows with the largest values, rarest but what a static scale must hold or cut
    num_rows: int


@dataclass
class Recorder(Hooks):
    """Collects; changes nothing."""

    rotary_dim: int
    sites: dict[str, InputStatistics] = field(default_factory=dict)
    q: Tensor | None = None  # [m, heads, D] sample
    k: Tensor | None = None  # [m, kv_heads, D]
    k_maxima: Tensor | None = None  # [kv_heads, D]; of a rotary pair its length, which no position changes
    v_maxima: Tensor | None = None  # [kv_heads, D]

    def input(self, site: str, x: Tensor) -> Tensor:
        largest = x.abs().amax(dim=1).topk(min(EXTREME_ROWS, x.shape[0])).indices
        maxima, sample = x.abs().amax(dim=0), _sample(x, SAMPLE_ROWS)
        self.sites[site] = InputStatistics(maxima, sample, x.T @ x, x[largest], x.shape[0])
        return x

    def heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.q, self.k = _sample(q, SAMPLE_KEYS), _sample(k, SAMPLE_KEYS)
        self.k_maxima = pair_lengths(k, rotary_dim=self.rotary_dim).amax(dim=0)
        self.v_maxima = v.abs().amax(dim=0)
        return k, v


@dataclass
class Rounding(Hooks):
    """Rounds inputs to int8 per row, or by their site's static scale, and the cache to its static scales.

    Units that stay float are left alone.
    """

    eight_bit_inputs: bool
    float_units: Container[str] = ()
    k_scale: Tensor | None = None  # [1] or [kv_heads]
    v_scale: Tensor | None = None
    input_scales: dict[str, Tensor] = field(default_factory=dict)  # by site, [1]; empty: dynamic

    def input(self, site: str, x: Tensor) -> Tensor:
        unit = site.rpartition(".")[2]
        if not self.eight_bit_inputs or unit == "router" or unit in self.float_units:
            return x
        scale = self.input_scales.get(site)
        return round_activation(x) if scale is None else round_static(x, scale)

    def heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.k_scale is None or self.v_scale is None:
            return k, v
        return round_static(k, self.k_scale[:, None]), round_static(v, self.v_scale[:, None])


def pair_lengths(k: Tensor, *, rotary_dim: int) -> Tensor:
    """[..., D] → the length of each rotary pair at both of its channels; other channels' absolute values."""
    half = rotary_dim // 2
    length = torch.hypot(k[..., :half], k[..., half:rotary_dim])
    return torch.cat((length, length, k[..., rotary_dim:].abs()), dim=-1)


def _sample(x: Tensor, count: int) -> Tensor:
    """`count` rows, evenly spread."""
    if x.shape[0] <= count:
        return x.clone()
    return x[torch.linspace(0, x.shape[0] - 1, count).long()]
