"""Sampling of one token per row of logits, in plain torch and in the words of the interface.

Probabilities are float64 throughout; random numbers come from (seed, position) alone. Row by row, so rows cannot meet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.interface import SamplingRows

MASK64 = (1 << 64) - 1


class ReferenceSampling:
    """The sampling half of the reference backend."""

    def sample(self, logits: Tensor, rows: SamplingRows) -> Tensor:
        """See the interface. [B, V] float32 → [B] int64.

        NaN counts as -inf. A row whose largest logit is not finite (all banned, or +inf) takes the argmax.
        """
        return torch.tensor([_sample_row(z.clone(), rows, i) for i, z in enumerate(logits)], dtype=torch.int64)

    def logprobs(self, logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See the interface. Ranks and ids are int64, logprobs float32; the sum is float64."""
        z = logits.double()
        logs = ((z - z.amax(dim=1, keepdim=True)) - _log_sum(z)).float()  # [R, V]
        order = torch.sort(logits, dim=1, descending=True, stable=True).indices
        rank = (order == token_ids[:, None]).int().argmax(dim=1) + 1
        top = order[:, :num_top]
        return logs.gather(1, token_ids[:, None].long())[:, 0], rank, top, logs.gather(1, top)


def splitmix64(x: int) -> int:
    """The mixing function of that name, on unsigned 64-bit integers."""
    z = (x + 0x9E3779B97F4A7C15) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from (seed, position)."""
    return (splitmix64((seed + splitmix64(position & MASK64)) & MASK64) >> 11) * 2.0**-53


def _log_sum(z: Tensor) -> Tensor:
    return torch.log(torch.exp(z - z.amax(dim=1, keepdim=True)).sum(dim=1, keepdim=True))


def _sample_row(z: Tensor, rows: SamplingRows, i: int) -> int:
    """One row z [V] float32, free to change."""
    _penalize(z, rows, i)
    z[torch.isnan(z)] = -torch.inf
    best = int((z == z.max()).nonzero()[0])
    temperature = rows.temperature[i]
    if temperature <= 0:
        return best
    z = z / temperature
    if not torch.isfinite(z.max()):
        return best
    keep = torch.sort(z, descending=True, stable=True).indices  # ties: lower ids first
    keep = keep[: int(rows.top_k[i])] if rows.top_k[i] > 0 else keep
    e = torch.exp(z.double() - z.max().double())  # [V] float64; p = e / Σ e, and the largest e is 1
    keep = keep[: _prefix(e[keep], float(rows.top_p[i]))]
    keep = keep[e[keep] >= float(rows.min_p[i])]
    return _inverse_cdf(e, keep.sort().values, uniform(int(rows.seed[i]) & MASK64, int(rows.position[i])))


def _penalize(z: Tensor, rows: SamplingRows, i: int) -> None:
    """Apply penalties to what was seen, then biases, in place."""
    seen = slice(int(rows.seen_start[i]), int(rows.seen_start[i + 1]))
    known = rows.seen_ids[seen] >= 0
    ids, counts = rows.seen_ids[seen][known].long(), rows.seen_counts[seen][known].float()
    x, repetition = z[ids], rows.repetition_penalty[i]
    x = torch.where(x > 0, x / repetition, x * repetition)
    x = x - rows.frequency_penalty[i] * counts
    z[ids] = torch.where(counts > 0, x - rows.presence_penalty[i], x)
    for j in range(int(rows.bias_start[i]), int(rows.bias_start[i + 1])):
        z[int(rows.bias_ids[j])] += rows.bias_values[j]


def _prefix(e: Tensor, top_p: float) -> int:
    """Length of the shortest prefix of e (descending) whose sum reaches top_p of the whole, at least one."""
    if top_p >= 1.0:
        return len(e)
    sums = torch.cumsum(e, dim=0)
    return max(1, int((sums < top_p * sums[-1]).sum()) + 1)


def _inverse_cdf(e: Tensor, ids: Tensor, u: float) -> int:
    """The first of ids (ascending) at which the running sum of e exceeds u of the whole."""
    sums = torch.cumsum(e[ids], dim=0)
    return int(ids[int((sums <= u * sums[-1]).sum())])
