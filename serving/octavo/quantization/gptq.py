"""Writing a float weight as int8 so that its product keeps its value: nearest rounding, and GPTQ's rounding.

GPTQ rounds a weight column by column and lets the columns that are left make up for the error, as far as the inputs
seen in calibration allow. Pure arithmetic on one weight: knows nothing of models, layers or files.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.quantization.scheme import QuantizedTensor, dequantize, row_slices

DAMPING = 0.01  # of the mean of the Hessian's diagonal
BLOCK_COLUMNS = 128
WIDE_COLUMNS = 512  # of a Hessian that are worked on in float64 at once
ROUNDED_VALUES = 1 << 22  # of a weight that are rounded at once: its rows do not know of each other


def int8_scale(weight: Tensor, *, group_size: int | None = None) -> Tensor:
    """absmax / 127.5 of each row, or of each group of columns in it: [N, 1] or [N, K / group_size] float32."""
    groups = 1 if group_size is None else weight.shape[1] // group_size
    absmax = weight.float().unflatten(1, (groups, -1)).abs().amax(dim=2)  # [N, groups]
    return torch.where(absmax == 0, torch.ones_like(absmax), absmax / 127.5).clamp_min(torch.finfo(torch.float32).tiny)


def round_nearest(weight: Tensor, *, group_size: int | None = None) -> QuantizedTensor:
    """A weight [N, K] to the nearest levels."""
    scale = int8_scale(weight, group_size=group_size)
    grouped = weight.float().unflatten(1, (scale.shape[1], -1))  # [N, groups, columns]
    return QuantizedTensor(_levels(grouped, scale[..., None]).to(torch.int8).flatten(1), scale)


@dataclass(frozen=True)
class Compensated:
    """A weight rounded both ways, and Σ over the inputs of the squared error of each row: [N] float64."""

    nearest_errors: Tensor
    chosen: QuantizedTensor  # row by row the better one
    errors: Tensor


def round_gptq(
    weight: Tensor, hessian: Tensor, *, group_size: int | None = None, act_order: bool = True
) -> Compensated:
    """A weight [N, K] to levels that keep x · Wᵀ for the inputs behind `hessian` = Σ xᵀx, [K, K].

    act_order: columns with large inputs go first. Rows that nearest rounding serves better keep it, so the error on
    those inputs is never above that of `round_nearest`.
    """
    nearest = round_nearest(weight, group_size=group_size)
    before = row_errors(weight, nearest, hessian)
    inverse_root = _inverse_root(hessian, order := _order(hessian, act_order=act_order))
    if inverse_root is None:
        return Compensated(before, nearest, before)
    group = weight.shape[1] // nearest.scale.shape[1]
    q = torch.empty_like(nearest.q)
    for rows in row_slices(tuple(weight.shape), values=ROUNDED_VALUES):
        wide = nearest.scale[rows].repeat_interleave(group, dim=1)[:, order]
        rounded = _round_columns(weight[rows].float()[:, order], wide, inverse_root)
        q[rows, order] = rounded.to(torch.int8)
    del inverse_root
    after = row_errors(weight, QuantizedTensor(q, nearest.scale), hessian)
    worse = after > before
    chosen = QuantizedTensor(torch.where(worse[:, None], nearest.q, q), nearest.scale)
    return Compensated(before, chosen, torch.where(worse, before, after))


def row_errors(weight: Tensor, rounded: QuantizedTensor, hessian: Tensor) -> Tensor:
    """Σ over the inputs of (x · (w − ŵ))² for each row: [N] float64."""
    found = torch.zeros(weight.shape[0], dtype=torch.float64)
    for rows in row_slices(tuple(weight.shape)):
        part = QuantizedTensor(rounded.q[rows], rounded.scale[rows])
        found[rows] = row_energies(weight[rows].float() - dequantize(part), hessian)
    return found


def row_energies(weight: Tensor, hessian: Tensor) -> Tensor:
    """Σ over the inputs of (x · w)² for each row: [N] float64."""
    found = torch.zeros(weight.shape[0], dtype=torch.float64)
    for rows in row_slices(tuple(weight.shape)):
        part = weight[rows].float()
        found[rows] = ((part @ hessian) * part).sum(dim=1, dtype=torch.float64)
    return found


def _order(hessian: Tensor, *, act_order: bool) -> Tensor:
    diagonal = hessian.diagonal()
    return diagonal.argsort(descending=True) if act_order else torch.arange(diagonal.numel())


def _inverse_root(hessian: Tensor, order: Tensor) -> Tensor | None:
    """The upper factor R of the damped inverse RᵀR, [K, K] float32; None if there is nothing to go by.

    With the columns backwards the Hessian is L · Lᵀ, and R is the inverse of L read backwards again: one factor, no
    inverse of the whole. One float64 matrix [K, K] is in memory, which is more than most layers are.
    """
    size, backwards = order.numel(), order.flip(0)
    lower = torch.empty((size, size), dtype=torch.float64)
    for rows in row_slices((size,), values=WIDE_COLUMNS):
        lower[rows] = hessian[backwards[rows]][:, backwards].double()
    diagonal = lower.diagonal()
    mean = float(diagonal.mean())
    if not 0 < mean < float("inf"):
        return None
    diagonal += DAMPING * mean
    if not _cholesky(lower):
        return None
    root = torch.zeros((size, size))
    for low in range(0, size, WIDE_COLUMNS):
        high = min(low + WIDE_COLUMNS, size)
        root[: size - low, size - high : size - low] = _inverse_columns(lower, low, high).flip(0, 1).float()
    return root


def _inverse_columns(lower: Tensor, low: int, high: int) -> Tensor:
    """Columns low to high of the inverse of a lower factor, from row `low` on: zeros are above. [K − low, columns].

    Block by block: the library's own would copy the factor.
    """
    found = torch.eye(lower.shape[0] - low, high - low, dtype=torch.float64)
    for top in range(low, lower.shape[0], WIDE_COLUMNS):
        bottom = min(top + WIDE_COLUMNS, lower.shape[0])
        here = found[top - low : bottom - low]
        here -= lower[top:bottom, low:top] @ found[: top - low]
        here.copy_(torch.linalg.solve_triangular(lower[top:bottom, top:bottom], here, upper=False))
    return found


def _cholesky(matrix: Tensor) -> bool:
    """Write the lower factor of a float64 matrix [K, K] over its lower half, or say that there is none.

    The library's own takes a second matrix for it.
    """
    size = matrix.shape[0]
    for low in range(0, size, WIDE_COLUMNS):
        high = min(low + WIDE_COLUMNS, size)
        factor, failed = torch.linalg.cholesky_ex(matrix[low:high, low:high])
        if int(failed):
            return False
        matrix[low:high, low:high] = factor
        below = matrix[high:, low:high]  # [K − high, columns]
        below.copy_(torch.linalg.solve_triangular(factor, below.T, upper=False).T)
        for left in range(high, size, WIDE_COLUMNS):
            right = min(left + WIDE_COLUMNS, size)
            matrix[left:, left:right].addmm_(below[left - high :], below[left - high : right - high].T, alpha=-1)
    return True


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
    return (weight / scale).round_().clamp_(-128, 127)
