"""Writing a float weight as int8 so that its product keeps its value: nearest rounding, and GPTQ's rounding.

GPTQ rounds a weight column by column and lets the columns that are left make up for the error, as far as the inputs
seen in calibration allow. Pure arithmetic on one weight: knows nothing of models, layers or files.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.quantization.scheme import QuantizedTensor, dequantize

DAMPING = 0.01  # of the mean of the Hessian's diagonal
BLOCK_COLUMNS = 128


def int8_scale(weight: Tensor, *, group_size: int | None = None) -> Tensor:
    """absmax / 127.5 of each row, or of each group of columns in it: [N, 1] or [N, K / group_size] float32."""
    groups = 1 if group_size is None else weight.shape[1] // group_size
    absmax = weight.float().unflatten(1, (groups, -1)).abs().amax(dim=2)  # [N, groups]
    return torch.where(absmax == 0, torch.ones_like(absmax), absmax / 127.5).clamp_min(torch.finfo(torch.float32).tiny)


def round_nearest(weight: Tensor, *, group_size: int | None = None) -> QuantizedTensor:
    """A weight [N, K] to the nearest levels."""
    scale = int8_scale(weight, group_size=group_size)
    wide = scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    return QuantizedTensor(_levels(weight.float(), wide).to(torch.int8), scale)


def round_gptq(
    weight: Tensor, hessian: Tensor, *, group_size: int | None = None, act_order: bool = True
) -> QuantizedTensor:
    """A weight [N, K] to levels that keep x · Wᵀ for the inputs behind `hessian` = Σ xᵀx, [K, K].

    act_order: columns with large inputs go first. Rows that nearest rounding serves better keep it, so the error on
    those inputs is never above that of `round_nearest`.
    """
    nearest = round_nearest(weight, group_size=group_size)
    inverse_root = _inverse_root(hessian, order := _order(hessian, act_order=act_order))
    if inverse_root is None:
        return nearest
    columns = weight.shape[1]
    wide = nearest.scale.repeat_interleave(columns // nearest.scale.shape[1], dim=1)[:, order]
    rounded = _round_columns(weight.float()[:, order], wide, inverse_root)
    q = torch.empty_like(nearest.q)
    q[:, order] = rounded.to(torch.int8)
    compensated = QuantizedTensor(q, nearest.scale)
    worse = row_errors(weight, compensated, hessian) > row_errors(weight, nearest, hessian)
    return QuantizedTensor(torch.where(worse[:, None], nearest.q, q), nearest.scale)


def row_errors(weight: Tensor, rounded: QuantizedTensor, hessian: Tensor) -> Tensor:
    """Σ over the inputs of (x · (w − ŵ))² for each row: [N] float64."""
    difference = (weight.float() - dequantize(rounded)).double()
    return ((difference @ hessian.double()) * difference).sum(dim=1)


def _order(hessian: Tensor, *, act_order: bool) -> Tensor:
    diagonal = hessian.diagonal()
    return diagonal.argsort(descending=True) if act_order else torch.arange(diagonal.numel())


def _inverse_root(hessian: Tensor, order: Tensor) -> Tensor | None:
    """The upper Cholesky factor of the damped inverse, [K, K] float32; None if there is nothing to go by."""
    damped = hessian.double()[order][:, order].clone()
    diagonal = damped.diagonal()
    mean = float(diagonal.mean())
    if not 0 < mean < float("inf"):
        return None
    diagonal += DAMPING * mean
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        return None
    root, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if int(failed) else root.float()


def _round_columns(weight: Tensor, scale: Tensor, inverse_root: Tensor) -> Tensor:
    """Levels [N, K] float32 of a weight whose columns are in the order of rounding. Changes `weight`."""
    levels = torch.empty_like(weight)
    for low in range(0, weight.shape[1], BLOCK_COLUMNS):
        high = min(low + BLOCK_COLUMNS, weight.shape[1])
        errors = torch.empty_like(weight[:, low:high])
        for column in range(low, high):
            value = weight[:, column]
            levels[:, column] = _levels(value, scale[:, column])
            error = (value - levels[:, column] * scale[:, column]) / inverse_root[column, column]
            errors[:, column - low] = error
            weight[:, column + 1 : high] -= error[:, None] * inverse_root[column, column + 1 : high]
        weight[:, high:] -= errors @ inverse_root[low:high, high:]
    return levels


def _levels(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).round().clamp(-128, 127)
