"""Rounding and smoothing on single weights."""

from __future__ import annotations

import pytest
import torch

from octavo.quantization.export.statistics import pair_lengths
from octavo.quantization.gptq import round_gptq, round_nearest, row_errors
from octavo.quantization.scheme import dequantize
from octavo.quantization.smooth import powers_of_two, search_channels, search_keys


def correlated(rows: int, columns: int, *, seed: int = 0) -> torch.Tensor:
    """Inputs whose columns depend on each other, as those of models do."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(columns // 4, columns, generator=generator)
    noise = torch.randn(rows, columns, generator=generator) * 0.1
    return torch.randn(rows, columns // 4, generator=generator) @ basis + noise


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_loses_less_than_nearest_rounding(group_size: int | None, act_order: bool) -> None:
    x, weight = correlated(600, 256), torch.randn(48, 256, generator=torch.Generator().manual_seed(1))
    nearest = round_nearest(weight, group_size=group_size)
    made = round_gptq(weight, x.T @ x, group_size=group_size, act_order=act_order).chosen
    lost = [float((x @ (weight - dequantize(one)).T).square().sum()) for one in (nearest, made)]
    assert lost[1] < 0.5 * lost[0]
    torch.testing.assert_close(made.scale, nearest.scale, rtol=0, atol=0)


def test_gptq_is_never_worse_in_any_row() -> None:
    x, weight = correlated(40, 64, seed=3), torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
    hessian = x.T @ x
    found = round_gptq(weight, hessian)
    made, nearest = (row_errors(weight, one, hessian) for one in (found.chosen, round_nearest(weight)))
    assert bool((made <= nearest).all())
    assert torch.equal(found.errors, made)
    assert torch.equal(found.nearest_errors, nearest)


def test_gptq_without_inputs_rounds_to_nearest() -> None:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(round_gptq(weight, torch.zeros(16, 16)).chosen.q, round_nearest(weight).q)


def test_nearest_rounding_is_within_half_a_step() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    rounded = round_nearest(weight, group_size=16)
    steps = rounded.scale.repeat_interleave(16, dim=1)
    assert bool(((weight - dequantize(rounded)).abs() <= steps * 0.5001).all())


def test_smoothing_rescues_a_product_with_outlier_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(200, 64, generator=generator), torch.randn(32, 64, generator=generator)
    x[:, 5] *= 300
    found = search_channels(x, x.abs().amax(dim=0), [weight], eight_bit_inputs=True)
    assert found.strength > 0
    assert found.error_after < 0.35 * found.error_before
    assert torch.equal(found.factors, powers_of_two(found.factors))
    assert found.factors[5] == found.factors.max()


def test_channels_of_a_group_share_a_factor() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(100, 16, generator=generator), torch.randn(8, 16, generator=generator)
    x[:, 3] *= 100
    groups = torch.arange(8).repeat(2)
    found = search_channels(x, x.abs().amax(dim=0), [weight], groups=groups, eight_bit_inputs=True)
    assert found.factors[3] == found.factors[11] > 1
    assert torch.equal(found.factors[:8], found.factors[8:])


def test_key_factors_are_equal_within_a_rotary_pair() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(50, 2, 3, 16, generator=generator), torch.randn(50, 2, 16, generator=generator)
    k[:, 0, 2] += 500
    maxima = pair_lengths(k, rotary_dim=12).amax(dim=0)
    found = search_keys(q, k, maxima, shared=False, per_head=False)
    assert torch.equal(found.factors[:, :6], found.factors[:, 6:12])
    # one channel of 32 keeps its coarse steps: what no factor can mend
    assert found.error_after < 1.5 * (1 / 32) ** 0.5 * found.error_before


def test_a_pairs_length_does_not_turn() -> None:
    k = torch.tensor([[3.0, 0.0, 4.0, 0.0, -7.0]])
    assert pair_lengths(k, rotary_dim=4).tolist() == [[5.0, 0.0, 5.0, 0.0, 7.0]]
