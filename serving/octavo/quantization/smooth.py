"""Moving outliers from where 8 bits cannot hold them to where they can, without changing what a layer computes.

A factor per channel divides what one product puts out (a norm, v, up) and multiplies the columns of the product that
takes it in. For the K cache a factor per rotary pair divides k and multiplies q. Factors are powers of two: folding
them is exact in every float type. Strengths are searched by measured error. Pure arithmetic on tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.quantization.gptq import round_nearest
from octavo.quantization.scheme import dequantize, row_slices

STRENGTHS = (0.25, 0.4, 0.5, 0.6, 0.75, 1.0)
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # of the largest value: what a static scale holds
MAX_EXPONENT = 12  # of a factor: 2^-12 to 2^12
TINY = 1e-12


@dataclass(frozen=True)
class Smoothing:
    """What a search chose. strength 0: nothing is moved. Errors are relative, of outputs over the sample."""

    strength: float
    factors: Tensor  # [channels], powers of two
    error_before: float
    error_after: float


def round_activation(x: Tensor) -> Tensor:
    """[M, K] to what int8 per row can hold, still float."""
    scale = x.abs().amax(dim=-1, keepdim=True).clamp_min(TINY) / 127.0
    return (x / scale).round() * scale


def round_static(x: Tensor, scale: Tensor) -> Tensor:
    """x to what int8 with fixed scales can hold, still float."""
    return (x / scale).round().clamp(-128, 127) * scale


def powers_of_two(factors: Tensor) -> Tensor:
    """The nearest powers of two."""
    return torch.exp2(factors.log2().round().clamp(-MAX_EXPONENT, MAX_EXPONENT))


def channel_factors(inputs: Tensor, weights: Tensor, *, strength: float) -> Tensor:
    """[K] from the maxima of the inputs [K] and of the weight's columns [K]: a^s / w^(1 - s), mean about 1."""
    raw = inputs.clamp_min(TINY) ** strength / weights.clamp_min(TINY) ** (1 - strength)
    raw = torch.where((inputs <= TINY) | (weights <= TINY), torch.ones_like(raw), raw / _middle(raw))
    return powers_of_two(raw)


def search_channels(
    sample: Tensor,  # [M, K] inputs
    maxima: Tensor,  # [K] over all inputs
    weights: Sequence[Tensor],  # [N, K] each
    *,
    groups: Tensor | None = None,  # [K] int64: channels with the same number share a factor
    eight_bit_inputs: bool,
    static_inputs: bool = False,  # one scale for all of them, not one per row
    cached: bool = False,  # they also went through an int8 cache with one scale
    group_size: int | None = None,
) -> Smoothing:
    """The strength whose quantised product comes nearest to x · Wᵀ over the sample."""
    columns = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)  # [K]
    wanted = [sample @ weight.T for weight in weights]
    energy = sum(float(output.double().square().sum()) for output in wanted) or 1.0

    def error(factors: Tensor) -> float:
        x, largest = sample / factors, static_scale(maxima / factors)
        if cached:
            x = round_static(x, largest)
        if eight_bit_inputs:
            x = round_static(x, largest) if static_inputs else round_activation(x)
        lost = 0.0
        for weight, output in zip(weights, wanted):
            for rows in row_slices(tuple(weight.shape)):
                rounded = dequantize(round_nearest(weight[rows] * factors, group_size=group_size))
                lost += float((x @ rounded.T - output[:, rows]).double().square().sum())
        return math.sqrt(lost / energy)

    shared, counted = _over_groups(maxima, groups), _over_groups(columns, groups)
    none = torch.ones_like(maxima)
    tried = [(0.0, none), *((s, channel_factors(shared, counted, strength=s)) for s in STRENGTHS)]
    return _best(tried, [error(factors) for _, factors in tried])


def static_scale(maxima: Tensor) -> Tensor:
    """The scale [1] of int8 that holds every value seen."""
    return maxima.max().reshape(1).clamp_min(TINY) / 127.5


def search_clip(
    sample: Tensor,  # [m, K] inputs
    extremes: Tensor,  # [e, K] the inputs with the largest values
    maxima: Tensor,  # [K] over all inputs
    pairs: Sequence[tuple[Tensor, Tensor]],  # weights before and after rounding, [N, K] each
    *,
    share: float,  # of the extremes among all inputs
) -> float:
    """Which part of the largest value a static scale should hold: smaller steps for all, some values cut.

    The errors of the extremes count for their share, those of the sample for the rest.
    """

    def error(x: Tensor, scale: Tensor) -> float:
        rounded = round_static(x, scale)
        return sum(float((rounded @ after.T - x @ before.T).double().square().mean()) for before, after in pairs)

    largest = static_scale(maxima)
    costs = [share * error(extremes, largest * clip) + (1 - share) * error(sample, largest * clip) for clip in CLIPS]
    return CLIPS[min(range(len(CLIPS)), key=costs.__getitem__)]  # the first, widest, of equals


def pair_factors(maxima: Tensor, *, strength: float) -> Tensor:
    """Factors of K's channels from their maxima [heads, D], both channels of a rotary pair having the same maximum."""
    raw = (maxima.clamp_min(TINY) / maxima.amax(dim=-1, keepdim=True).clamp_min(TINY)) ** strength
    return powers_of_two(raw.clamp_min(2.0**-MAX_EXPONENT) / _middle(raw))


def search_keys(q: Tensor, k: Tensor, maxima: Tensor, *, shared: bool, per_head: bool) -> Smoothing:
    """Factors [kv_heads, D] for K, so that q · kᵀ survives an int8 cache with static scales.

    q: [M, kv_heads, group, D] and k: [M, kv_heads, D], both rotated; maxima: [kv_heads, D]. shared: all heads get the
    same factors (they are folded into a norm). A head's maxima are levelled within it, and between the heads too.
    """
    counted = maxima.amax(dim=0, keepdim=True).expand_as(maxima) if shared else maxima
    wanted = _centred(torch.einsum("mhgd,nhd->hgmn", q, k))
    energy = float(wanted.double().square().sum()) or 1.0

    def error(factors: Tensor) -> float:
        scale = key_scale(maxima / factors, per_head=per_head)
        rounded = round_static(k / factors, scale[:, None])
        scores = _centred(torch.einsum("mhgd,nhd->hgmn", q * factors[:, None], rounded))
        return math.sqrt(float((scores - wanted).double().square().sum()) / energy)

    flat = counted.reshape(1, -1)  # one maximum for all: heads are levelled too
    tried = [(0.0, torch.ones_like(maxima))]
    tried += [(s, pair_factors(flat, strength=s).view_as(maxima)) for s in STRENGTHS]
    return _best(tried, [error(factors) for _, factors in tried])


def key_scale(maxima: Tensor, *, per_head: bool) -> Tensor:
    """Static cache scales from maxima [kv_heads, D]: [kv_heads] if per head, else [1]."""
    found = maxima.amax(dim=-1) if per_head else maxima.max().reshape(1)
    return found.clamp_min(TINY) / 127.5


def _centred(scores: Tensor) -> Tensor:
    """Without what all keys share: a softmax does not see it, and a large bias would hide the rest."""
    return scores - scores.mean(dim=-1, keepdim=True)


def _middle(raw: Tensor) -> Tensor:
    """The geometric mean, by which factors are divided: those of a channel that matters little stay near 1."""
    return raw.clamp_min(TINY).log2().mean().exp2()


def _over_groups(values: Tensor, groups: Tensor | None) -> Tensor:
    """The largest value of each group, at every member."""
    if groups is None:
        return values
    largest = torch.zeros(int(groups.max()) + 1).scatter_reduce(0, groups, values, "amax")
    return largest[groups]


def _best(tried: Sequence[tuple[float, Tensor]], errors: Sequence[float]) -> Smoothing:
    chosen = min(range(len(tried)), key=errors.__getitem__)  # the first, weakest, of equals
    strength, factors = tried[chosen]
    return Smoothing(strength, factors, errors[0], errors[chosen])
