"""How far a made model is from its float original on held-out text: perplexity, agreement, divergence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.quantization.export.layer_forward import rms_norm

ROWS = 256  # logits made at once


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
    weight: Tensor  # [V, H]

    def log_probabilities(self, rows: Tensor) -> Tensor:
        """[m, H] → [m, V]."""
        return (rms_norm(rows, self.norm, self.eps) @ self.weight.float().T).log_softmax(dim=-1)


def measure(head: Head, exact: Tensor, made: Tensor, sequences: Sequence[Sequence[int]]) -> Measured:
    """exact, made: the streams behind the last layer [M, H]; sequences: the token ids of their rows."""
    targets = torch.tensor([token for ids in sequences for token in (*ids[1:], -1)])  # [M]; -1: nothing follows
    kept = (targets >= 0).nonzero().squeeze(1)
    loss = agreed = divergence = 0.0
    for part in kept.split(ROWS):
        p, q = head.log_probabilities(exact[part]), head.log_probabilities(made[part])
        loss -= float(q.gather(1, targets[part, None]).double().sum())
        agreed += float((p.argmax(dim=1) == q.argmax(dim=1)).sum())
        divergence += float((p.exp() * (p - q)).double().sum())
    count = max(kept.numel(), 1)
    return Measured(math.exp(min(loss / count, 700)), agreed / count, max(divergence / count, 0.0))
