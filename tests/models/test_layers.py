"""Layers on their own: products that cannot be fused, and a row-parallel product over two ranks."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from octavo.kernels.choose import choose
from octavo.kernels.interface import FLOAT
from octavo.models.layers import Projection, RowParallel, pack
from octavo.parallel.group import ParallelError, make_group
from octavo.quantization.scheme import (
    A8,
    A16,
    FLOAT_ACTIVATION,
    ActivationScheme,
    LinearWeights,
    QuantizedTensor,
    quantize_per_channel,
)

KERNELS = choose("reference", device=torch.device("cpu"))
CPU_ROWS, INPUTS = 5, 64


def _random(rows: int, columns: int, *, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


class TwoRanks:
    """One of two ranks in one process: they meet at a barrier and each adds up in rank order."""

    size = 2

    def __init__(self, rank: int, board: list[Tensor | None], barrier: threading.Barrier) -> None:
        self.rank = rank
        self._board = board
        self._barrier = barrier

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self._board[self.rank] = x
        self._barrier.wait(timeout=20)
        everything = [part.clone() for part in self._board if part is not None]
        self._barrier.wait(timeout=20)
        return everything

    def sum(self, x: Tensor) -> Tensor:
        first, second = self._exchange(x)
        return first + second

    def max(self, x: Tensor) -> Tensor:
        first, second = self._exchange(x)
        return torch.maximum(first, second)


@pytest.mark.parametrize("activation", [FLOAT_ACTIVATION, A8, A16])
def test_two_ranks_compute_what_one_does(activation: ActivationScheme) -> None:
    weight, x, residual = _random(24, INPUTS, seed=1), _random(CPU_ROWS, INPUTS, seed=2), _random(CPU_ROWS, 24, seed=3)
    bias = _random(1, 24, seed=4)[0]
    whole = quantize_per_channel(weight)

    def part(columns: slice) -> LinearWeights:
        mine = weight[:, columns] if activation.limbs == 0 else QuantizedTensor(whole.q[:, columns], whole.scale)
        return LinearWeights(mine, activation, bias)

    want = RowParallel(KERNELS, make_group(1), part(slice(0, INPUTS)))(x, residual=residual)
    board: list[Tensor | None] = [None, None]
    barrier = threading.Barrier(2)

    def run(rank: int) -> Tensor:
        columns = slice(0, 24) if rank == 0 else slice(24, INPUTS)
        product = RowParallel(KERNELS, TwoRanks(rank, board, barrier), part(columns))
        assert product.handoff == FLOAT  # the ranks agree on a row's maximum before it is rounded
        return product(x[:, columns].contiguous(), residual=residual)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, (0, 1))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, want, rtol=0, atol=2e-5)  # sums in another order, of values up to some tens


def test_products_of_different_formats_stand_side_by_side() -> None:
    parts = [
        LinearWeights(quantize_per_channel(_random(8, INPUTS, seed=1)), A8),
        LinearWeights(quantize_per_channel(_random(4, INPUTS, seed=2)), A16),
        LinearWeights(_random(6, INPUTS, seed=3), FLOAT_ACTIVATION),
    ]
    projection = Projection(KERNELS, parts)
    assert projection.format == FLOAT
    x = _random(CPU_ROWS, INPUTS, seed=4)
    each = [KERNELS.linear(KERNELS.quantize(x, packed.format), packed) for packed in (pack(KERNELS, p) for p in parts)]
    assert torch.equal(projection(x), torch.cat(each, dim=1))


def test_static_scales_that_differ_are_each_applied() -> None:
    weight = quantize_per_channel(_random(8, INPUTS, seed=1))
    schemes = [ActivationScheme(1, static_scale=scale) for scale in (0.01, 0.05)]
    projection = Projection(KERNELS, [LinearWeights(weight, scheme) for scheme in schemes])
    assert projection.format == FLOAT
    first, second = projection(_random(CPU_ROWS, INPUTS, seed=5)).split(8, dim=1)
    assert not torch.equal(first, second)
    alone = Projection(KERNELS, [LinearWeights(weight, schemes[1])])
    x = KERNELS.quantize(_random(CPU_ROWS, INPUTS, seed=5), alone.format)
    assert torch.equal(alone(x), second)


def test_more_ranks_are_refused_in_one_line() -> None:
    with pytest.raises(ParallelError, match="MP_NUM=4: tensor parallelism is not supported yet; set MP_NUM=1"):
        make_group(4)
