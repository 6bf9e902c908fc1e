"""QuantizedTensor: rounding within half a step, the same products however rows are joined or taken."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.quantization.scheme import (
    A8,
    A16,
    FLOAT_ACTIVATION,
    LinearWeights,
    QuantizedTensor,
    concatenate,
    dequantize,
    quantize_per_channel,
)


def _weight(rows: int, columns: int, *, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_no_weight_moves_by_more_than_half_a_step() -> None:
    weight = _weight(40, 64)
    weight[3] = 0.0
    weight[4, 0], weight[4, 1] = 9.0, -9.0  # both extremes
    quantized = quantize_per_channel(weight)
    step = weight.abs().amax(1, keepdim=True) / 127.5
    assert bool(((dequantize(quantized) - weight).abs() <= step / 2 * (1 + 1e-4)).all())
    assert torch.equal(dequantize(quantized)[3], weight[3])


def test_dequantize_spreads_groups_and_zero_points() -> None:
    q = torch.tensor([[10, 20, 30, 40], [-1, -2, -3, -4]], dtype=torch.int8)
    scale = torch.tensor([[1.0, 2.0], [0.5, 4.0]])
    zero_point = torch.tensor([[0, 10], [1, 0]], dtype=torch.int8)
    tensor = QuantizedTensor(q, scale, zero_point)
    assert dequantize(tensor).tolist() == [[10, 20, 40, 60], [-1, -1.5, -12, -16]]
    assert tensor.group_size == 2
    assert dequantize(QuantizedTensor(q, torch.tensor([2.0]))).tolist() == [[20, 40, 60, 80], [-2, -4, -6, -8]]


def test_joined_products_keep_every_row() -> None:
    parts = [quantize_per_channel(_weight(rows, 32, seed=rows)) for rows in (8, 4)]
    per_tensor = QuantizedTensor(parts[1].q, torch.tensor([0.5]))
    fused = concatenate([LinearWeights(parts[0], A8), LinearWeights(per_tensor, A8)])
    assert fused is not None
    assert isinstance(fused.weight, QuantizedTensor)
    assert torch.equal(dequantize(fused.weight), torch.cat([dequantize(parts[0]), dequantize(per_tensor)]))


def test_products_of_different_schemes_are_not_joined() -> None:
    weight = quantize_per_channel(_weight(4, 32))
    grouped = QuantizedTensor(weight.q, weight.scale.expand(4, 2))
    shifted = QuantizedTensor(weight.q, weight.scale, torch.ones(4, 1, dtype=torch.int8))
    first = LinearWeights(weight, A8)
    floats = LinearWeights(_weight(4, 32), FLOAT_ACTIVATION)
    others = [
        LinearWeights(weight, A16),
        LinearWeights(weight, A8, torch.zeros(4)),
        LinearWeights(grouped, A8),
        LinearWeights(shifted, A8),
        floats,
    ]
    assert [concatenate([first, other]) for other in others] == [None] * 5
    assert concatenate([floats, LinearWeights(_weight(4, 32).bfloat16(), FLOAT_ACTIVATION)]) is None


def test_taken_rows_carry_scales_and_biases() -> None:
    weight = quantize_per_channel(_weight(6, 32))
    rows = torch.tensor([5, 0, 2])
    taken = LinearWeights(weight, A16, torch.arange(6.0)).take_rows(rows)
    assert isinstance(taken.weight, QuantizedTensor)
    assert taken.bias is not None
    assert torch.equal(dequantize(taken.weight), dequantize(weight)[rows])
    assert taken.bias.tolist() == [5, 0, 2]
