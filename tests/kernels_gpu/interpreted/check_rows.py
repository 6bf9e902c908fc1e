"""Run by test_interpreter.py under TRITON_INTERPRET=1: row operations and experts against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.kernels.gpu import rows
from octavo.kernels.gpu.backend import GpuKernels
from octavo.kernels.interface import FLOAT, Activation, ActivationFormat, Quantized
from octavo.kernels.reference import ReferenceKernels

DYNAMIC = ActivationFormat(1)
TWO_LIMBS = ActivationFormat(2)
STATIC = ActivationFormat(1, static_scale=0.037, zero_point=-11)
GPU = GpuKernels(torch.device("cpu"))
REFERENCE = ReferenceKernels()


def whole(x: Activation) -> Tensor:
    """[M, K]: integers of all limbs, or the floats."""
    if not isinstance(x, Quantized):
        return x
    q = x.q[:, :, : x.shape[1]].long()
    return q[0] if len(q) == 1 else q[0] * 256 + q[1]


@pytest.mark.parametrize("format", [DYNAMIC, TWO_LIMBS, STATIC])
@pytest.mark.parametrize("width", [1, 37, 300])
def test_quantised_integers_and_scales_equal_the_reference(format: ActivationFormat, width: int) -> None:
    x = torch.randn(8, width) * torch.tensor([[1e-38], [1e-30], [1e-3], [1.0], [1e4], [1e30], [0.0], [3e38]])
    x[3, 0] = 3000.0
    ours, theirs = GPU.quantize(x, format), REFERENCE.quantize(x, format)
    assert isinstance(ours, Quantized)
    assert isinstance(theirs, Quantized)
    assert torch.equal(whole(ours), whole(theirs))
    assert torch.equal(ours.scale, theirs.scale)
    assert (ours.q[:, :, width:] == 0).all()


def test_limbs_cover_their_whole_range() -> None:
    x = torch.arange(-32512, 32513, 13.0)[None]
    ours = GPU.quantize(x, TWO_LIMBS)
    assert isinstance(ours, Quantized)
    assert torch.equal(whole(ours), x.long())
    assert int(ours.q[0].min()) == -127


def test_an_absolute_maximum_from_other_ranks_sets_the_scale() -> None:
    x = torch.randn(3, 96)
    ours, theirs = (k.quantize(x, DYNAMIC, absmax=k.absmax(x) * 3) for k in (GPU, REFERENCE))
    assert torch.equal(whole(ours), whole(theirs))


@pytest.mark.parametrize("format", [FLOAT, DYNAMIC, TWO_LIMBS, STATIC])
@pytest.mark.parametrize("width", [37, 512])
def test_norms_equal_the_reference(format: ActivationFormat, width: int) -> None:
    x, add, weight = torch.randn(4, width) * 10, torch.randn(4, width), torch.rand(width)
    x[1], add[1] = 0.0, 0.0
    ours, r = GPU.rms_norm(x.clone(), weight, 1e-5, format, add=add)
    theirs, expected = REFERENCE.rms_norm(x, weight, 1e-5, format, add=add)
    assert torch.equal(r, expected)
    # Sums are float64 in another order: what they round to almost never differs, then by one unit in the last place.
    if format == FLOAT:
        torch.testing.assert_close(ours, theirs, rtol=2**-22, atol=0)
    else:
        assert (whole(ours) - whole(theirs)).abs().max() <= 1


@pytest.mark.parametrize("format", [FLOAT, DYNAMIC, TWO_LIMBS, STATIC])
def test_silu_stays_near_float64(format: ActivationFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    gate_up = torch.randn(3, 2 * 300) * 5
    gate, up = gate_up.double().chunk(2, dim=1)
    exact = gate / (1 + torch.exp(-gate)) * up
    for widest in (16384, 64):  # in one piece, and by way of floats
        monkeypatch.setattr(rows, "WIDEST", widest)
        y = GPU.silu_mul(gate_up, format)
        if isinstance(y, Quantized):
            value = (whole(y).double() - format.zero_point) * y.scale.double()[:, None]
            bound = y.scale.double()[:, None] / 2 + exact.abs() * 10 * 2**-24
            exact_here = exact.clamp(-117 * 0.037, 138 * 0.037) if format == STATIC else exact
            assert ((value - exact_here).abs() <= bound).all()
        else:
            assert ((y - exact).abs() <= exact.abs() * 10 * 2**-24).all()


def test_silu_of_large_gates_neither_overflows_nor_loses_its_sign() -> None:
    gate = torch.tensor([[-1e30, -200.0, -100.0, 0.0, 88.0, 100.0, 1e30]])
    y = whole(GPU.silu_mul(torch.cat([gate, torch.ones_like(gate)], dim=1), FLOAT))[0]
    assert y[:3].abs().max() <= 1e-37
    assert y[3:].tolist() == gate[0, 3:].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_embedding_gives_the_rows_of_the_table(dtype: torch.dtype) -> None:
    table = torch.randn(20, 37).to(dtype)
    ids = torch.tensor([0, 19, 7, 7])
    assert torch.equal(GPU.embedding(ids, table), table[ids].float())


def test_rows_do_not_depend_on_each_other() -> None:
    x, weight = torch.randn(4, 200), torch.rand(200)
    together = whole(GPU.rms_norm(x.clone(), weight, 1e-6, TWO_LIMBS)[0])
    for row in range(4):
        alone = whole(GPU.rms_norm(x[row : row + 1].clone(), weight, 1e-6, TWO_LIMBS)[0])
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("experts", [3, 13, 64])
def test_routes_equal_the_reference(experts: int, renormalize: bool) -> None:
    logits = (torch.randn(6, experts) * 4).round() / 2  # with ties
    logits[0] = 0.0
    logits[0, 1] = -0.0
    ids, weights = GPU.moe_route(logits, 3, renormalize=renormalize)
    expected_ids, expected = REFERENCE.moe_route(logits, 3, renormalize=renormalize)
    assert torch.equal(ids, expected_ids)
    assert ((weights - expected).abs() <= expected * 1e-6).all()


def test_mixing_equals_the_reference() -> None:
    outputs, weights = torch.randn(3, 4, 1100), torch.rand(3, 4)
    assert torch.equal(GPU.moe_combine(outputs, weights), REFERENCE.moe_combine(outputs, weights))
