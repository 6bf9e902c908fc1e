"""Mixture of experts: routing picks the right experts in the right order, and sums keep theirs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.kernels.interface import Kernels

ERROR_OF_EXP = 1e-6  # relative, of a weight


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 40),
    experts=st.integers(1, 130),
    step=st.sampled_from([0.0, 0.5, 2.0]),  # logits rounded to steps have ties
    renormalize=st.booleans(),
    data=st.data(),
)
def test_routes_equal_the_reference(
    fast: Kernels,
    reference: Kernels,
    seed: int,
    rows: int,
    experts: int,
    step: float,
    renormalize: bool,
    data: st.DataObject,
) -> None:
    top_k = data.draw(st.integers(1, min(experts, 9)))
    logits = torch.randn(rows, experts, generator=torch.Generator().manual_seed(seed)) * 3
    logits = (logits / step).round() * step if step else logits
    ids, weights = fast.moe_route(logits, top_k, renormalize=renormalize)
    expected_ids, expected = reference.moe_route(logits, top_k, renormalize=renormalize)
    assert torch.equal(ids, expected_ids)
    assert ((weights - expected).abs() <= expected * ERROR_OF_EXP).all()


def test_weights_are_probabilities(every: Kernels) -> None:
    logits = torch.randn(30, 64) * 4
    ids, weights = every.moe_route(logits, 6, renormalize=False)
    assert ((weights - logits.double().softmax(-1).gather(1, ids)).abs() < 1e-6).all()
    same_ids, shares = every.moe_route(logits, 6, renormalize=True)
    assert torch.equal(ids, same_ids)
    assert (shares.sum(-1) - 1).abs().max() < 1e-6
    assert ids.dtype == torch.int64
    assert weights.dtype == torch.float32


def test_ties_go_to_the_lower_expert(every: Kernels) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    ids, weights = every.moe_route(logits, 3, renormalize=True)
    assert ids.tolist() == [[1, 2, 3], [0, 1, 2]]
    assert (weights - 1 / 3).abs().max() < 1e-6


def test_all_experts_may_be_chosen(every: Kernels) -> None:
    ids, weights = every.moe_route(torch.tensor([[0.5, -1.0, 2.0]]), 3, renormalize=False)
    assert ids.tolist() == [[2, 0, 1]]
    assert abs(float(weights.sum()) - 1) < 1e-6


@pytest.mark.parametrize("top_k", [0, 5])
def test_an_impossible_top_k_is_refused(every: Kernels, top_k: int) -> None:
    with pytest.raises(ValueError, match="top_k"):
        every.moe_route(torch.zeros(1, 4), top_k, renormalize=False)


@pytest.mark.parametrize(("rows", "top_k", "hidden"), [(1, 1, 1), (3, 2, 17), (50, 8, 100)])
def test_combining_equals_the_reference(fast: Kernels, reference: Kernels, rows: int, top_k: int, hidden: int) -> None:
    y, weights = torch.randn(rows, top_k, hidden) * 100, torch.rand(rows, top_k)
    assert torch.equal(fast.moe_combine(y, weights), reference.moe_combine(y, weights))


def test_combining_adds_in_order(every: Kernels) -> None:
    y = torch.tensor([[[1e8], [1.0], [-1e8]]])  # float32 loses the 1 in this order only
    assert every.moe_combine(y, torch.ones(1, 3)).tolist() == [[0.0]]
    assert every.moe_combine(y[:, [0, 2, 1]], torch.ones(1, 3)).tolist() == [[1.0]]


def test_a_row_does_not_depend_on_the_others(every: Kernels) -> None:
    logits, y, weights = torch.randn(40, 60), torch.randn(40, 4, 33), torch.rand(40, 4)
    ids, shares = every.moe_route(logits, 4, renormalize=True)
    out = every.moe_combine(y, weights)
    for i in range(0, 40, 7):
        one_ids, one_shares = every.moe_route(logits[i : i + 1], 4, renormalize=True)
        assert torch.equal(one_ids[0], ids[i])
        assert torch.equal(one_shares[0], shares[i])
        assert torch.equal(every.moe_combine(y[i : i + 1], weights[i : i + 1])[0], out[i])
