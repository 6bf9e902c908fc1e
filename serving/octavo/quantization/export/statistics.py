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
SAMPLE_ROWS = 512  # at most, of an input kept for searches
SAMPLE_KEYS = 256


class Sample:
    """Rows evenly spread over all that were seen: between half of `most` and `most` of them, as soon as there are."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._stride = 1
        self._num_seen = 0
        self._parts: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """[m, …] more rows."""
        self._parts.append(x[-self._num_seen % self._stride :: self._stride].clone())
        self._num_seen += x.shape[0]
        while sum(part.shape[0] for part in self._parts) > self._most:
            self._parts = [torch.cat(self._parts)[::2].clone()]
            self._stride *= 2

    def rows(self) -> Tensor:
        self._parts = [torch.cat(self._parts)]
        return self._parts[0]


class InputStatistics:
    """One site's input, which comes in blocks of rows."""

    def __init__(self, width: int) -> None:
        self.maxima = torch.zeros(width)  # [K]
        self.hessian = torch.zeros((width, width))  # [K, K] Σ xᵀx
        self.extremes = torch.zeros((0, width))  # [e, K] rows with the largest values, rare, but to be held or cut
        self.num_rows = 0
        self._sample = Sample(SAMPLE_ROWS)

    @property
    def sample(self) -> Tensor:
        """[m, K]."""
        return self._sample.rows()

    def add(self, x: Tensor) -> None:
        """[m, K] more rows."""
        self.maxima = torch.maximum(self.maxima, x.abs().amax(dim=0))
        self.hessian.addmm_(x.T, x)
        candidates = torch.cat((self.extremes, x))
        largest = candidates.abs().amax(dim=1).topk(min(EXTREME_ROWS, candidates.shape[0])).indices
        self.extremes = candidates[largest]
        self.num_rows += x.shape[0]
        self._sample.add(x)

    def divide(self, factors: Tensor) -> None:
        """The inputs are divided by `factors` [K] from now on."""
        self.maxima = self.maxima / factors
        self.extremes = self.extremes / factors
        self.sample.div_(factors)
        self.hessian.div_(factors[:, None]).div_(factors)


class Recorder(Hooks):
    """Collects over the blocks of a layer's inputs; changes nothing."""

    def __init__(self, rotary_dim: int) -> None:
        self.sites: dict[str, InputStatistics] = {}
        self.k_maxima: Tensor | None = None  # [kv_heads, D]; of a rotary pair its length, which no position changes
        self.v_maxima: Tensor | None = None  # [kv_heads, D]
        self._rotary_dim = rotary_dim
        self._queries, self._keys = Sample(SAMPLE_KEYS), Sample(SAMPLE_KEYS)

    @property
    def q(self) -> Tensor:
        """[m, heads, D]."""
        return self._queries.rows()

    @property
    def k(self) -> Tensor:
        """[m, kv_heads, D], at the positions of `q`."""
        return self._keys.rows()

    def input(self, site: str, x: Tensor) -> Tensor:
        if site not in self.sites:
            self.sites[site] = InputStatistics(x.shape[1])
        self.sites[site].add(x)
        return x

    def heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self._queries.add(q)
        self._keys.add(k)
        self.k_maxima = _larger(self.k_maxima, pair_lengths(k, rotary_dim=self._rotary_dim).amax(dim=0))
        self.v_maxima = _larger(self.v_maxima, v.abs().amax(dim=0))
        return k, v


def _larger(known: Tensor | None, found: Tensor) -> Tensor:
    return found if known is None else torch.maximum(known, found)


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
