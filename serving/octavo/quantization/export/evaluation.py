"""How far a made model is from its float original on held-out text: perplexity, agreement, divergence.

The head goes by in parts of its vocabulary, so neither it nor the logits of all tokens are ever in memory as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.quantization.export.layer_forward import rms_norm
from octavo.quantization.export.streams import Stream

ROWS = 1024  # positions looked at while the vocabulary goes by once


@dataclass(frozen=True)
class Measured:
    """Of the next-token distributions at every held-out position."""

    perplexity: float
    top1_agreement: float  # share of positions whose most probable token is the float model's
    kl: float  # mean KL(float ‖ made), nats


@dataclass(frozen=True)
class Head:
    """From the residual stream to logits."""

    norm: Tensor  # [H]
    eps: float
    parts: Callable[[], Iterable[Tensor]]  # the weight [V, H] as float32, some rows after the other


def measure(
    head: Head, streams: Mapping[str, Stream], sequences: Sequence[Sequence[int]], *, exact: str
) -> dict[str, Measured]:
    """streams: what is behind the last layer, rows [M, H] of the sequences' tokens; `exact` is the float model's."""
    targets = torch.tensor([token for ids in sequences for token in (*ids[1:], -1)])  # [M]; -1: nothing follows
    tallies: dict[str, list[_Tally]] = {name: [] for name in streams}
    for low in range(0, targets.numel(), ROWS):
        rows = slice(low, min(low + ROWS, targets.numel()))
        kept = targets[rows] >= 0
        inputs = {name: rms_norm(stream.read(rows)[kept], head.norm, head.eps) for name, stream in streams.items()}
        block = {name: _Tally(targets[rows][kept]) for name in streams}
        for part in head.parts():
            logits = inputs[exact] @ part.T  # [m, v]
            for name, tally in block.items():
                tally.add(logits, logits if name == exact else inputs[name] @ part.T)
        for name, tally in block.items():
            tallies[name].append(tally)
    return {name: _summary(found) for name, found in tallies.items()}


class _Online:
    """The largest logit of each row, where it is, and the sum of all exponentials relative to it."""

    def __init__(self, num_rows: int) -> None:
        self.largest = torch.full((num_rows,), -math.inf, dtype=torch.float64)
        self.best = torch.zeros(num_rows, dtype=torch.int64)
        self.total = torch.zeros(num_rows, dtype=torch.float64)

    def add(self, logits: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """logits: [m, v] of the tokens from `first` on; gives their exponentials and what the older ones shrink by."""
        largest, best = logits.max(dim=1)
        self.best = torch.where(largest > self.largest, best + first, self.best)
        raised = torch.maximum(self.largest, largest.double())
        exponentials, shrunk = (logits - raised.float()[:, None]).exp(), (self.largest - raised).exp()
        self.total = self.total * shrunk + exponentials.sum(dim=1, dtype=torch.float64)
        self.largest = raised
        return exponentials, shrunk

    def log_sum(self) -> Tensor:
        return self.largest + self.total.log()


class _Tally:
    """Some positions of one made model beside the float one, while their vocabulary goes by."""

    def __init__(self, targets: Tensor) -> None:
        self._targets = targets  # [m]
        self._exact, self._made = _Online(targets.numel()), _Online(targets.numel())
        self._apart = torch.zeros(targets.numel(), dtype=torch.float64)  # Σ exp(exact) · (exact − made), likewise
        self._hit = torch.zeros(targets.numel(), dtype=torch.float64)  # the logit of the target
        self._first = 0

    def add(self, exact: Tensor, made: Tensor) -> None:
        """[m, v] logits of the next tokens of the vocabulary."""
        exponentials, shrunk = self._exact.add(exact, self._first)
        self._made.add(made, self._first)
        self._apart = self._apart * shrunk + (exponentials * (exact - made)).sum(dim=1, dtype=torch.float64)
        place = (self._targets - self._first).clamp(0, made.shape[1] - 1)
        here = (self._targets >= self._first) & (self._targets < self._first + made.shape[1])
        self._hit = torch.where(here, made.gather(1, place[:, None])[:, 0].double(), self._hit)
        self._first += made.shape[1]

    def sums(self) -> tuple[float, float, float, float]:
        """Positions, and over them: −log p of the targets, agreements, divergence."""
        loss = self._made.log_sum() - self._hit
        divergence = self._apart / self._exact.total - self._exact.log_sum() + self._made.log_sum()
        agreed = self._made.best == self._exact.best
        return self._targets.numel(), float(loss.sum()), float(agreed.sum()), float(divergence.sum())


def _summary(tallies: Iterable[_Tally]) -> Measured:
    positions, loss, agreed, divergence = (sum(column) for column in zip(*(tally.sums() for tally in tallies)))
    count = max(positions, 1.0)
    return Measured(math.exp(min(loss / count, 700)), agreed / count, max(divergence / count, 0.0))
