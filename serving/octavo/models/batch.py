"""One step as tensors: what the runner builds from a `StepPlan` and a model's forward takes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from octavo.kernels.interface import BatchLayout


@dataclass(frozen=True)
class ForwardBatch:
    """Rows of a step. `logits_rows` names the rows whose logits are wanted, in order."""

    token_ids: Tensor  # [M] int64
    layout: BatchLayout
    logits_rows: Tensor  # [R] int64
