"""Row operations: integers equal the reference exactly, floats are within stated bounds, rows are independent."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.backends import MakeKernels
from octavo.kernels.interface import FLOAT, Activation, ActivationFormat, Kernels, Quantized

DYNAMIC = ActivationFormat(1)
TWO_LIMBS = ActivationFormat(2)
STATIC = ActivationFormat(1, static_scale=0.037, zero_point=-11)
FORMATS = [FLOAT, DYNAMIC, TWO_LIMBS, STATIC]


def integers(kernels: Kernels, x: Activation) -> Tensor:
    """[limbs, M, K] int64 of a backend's own storage."""
    assert isinstance(x, Quantized)
    if kernels.name == "reference":
        return x.q.long()
    rows, width = x.shape
    return x.q.view(rows, x.format.limbs, -1).permute(1, 0, 2)[:, :, :width].long() - 128


def values(kernels: Kernels, x: Activation) -> Tensor:
    """[M, K] float64 that the rows stand for."""
    if not isinstance(x, Quantized):
        return x.double()
    q = integers(kernels, x)
    whole = q[0] if len(q) == 1 else q[0] * 256 + q[1]
    return (whole - x.format.zero_point) * x.scale.double()[:, None]


def same(a: Activation, b: Activation) -> bool:
    """True if both hold the same bits in the same storage."""
    if isinstance(a, Quantized) and isinstance(b, Quantized):
        return torch.equal(a.q, b.q) and torch.equal(a.scale, b.scale)
    assert isinstance(a, Tensor)
    assert isinstance(b, Tensor)
    return torch.equal(a, b)


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 30).flatmap(
        lambda k: st.lists(st.lists(floats, min_size=k, max_size=k), min_size=1, max_size=5)
    ),
    format=st.sampled_from(FORMATS[1:]),
)
def test_quantised_integers_equal_the_reference(
    fast: Kernels, reference: Kernels, rows: list[list[float]], format: ActivationFormat
) -> None:
    x = torch.tensor(rows)
    ours, theirs = fast.quantize(x, format), reference.quantize(x, format)
    assert torch.equal(integers(fast, ours), integers(reference, theirs))
    assert isinstance(ours, Quantized)
    assert isinstance(theirs, Quantized)
    assert torch.equal(ours.scale, theirs.scale)


@pytest.mark.parametrize("format", [DYNAMIC, TWO_LIMBS])
@pytest.mark.parametrize("width", [1, 15, 64, 1000])
def test_dynamic_quantisation_is_within_half_a_step(every: Kernels, format: ActivationFormat, width: int) -> None:
    x = torch.randn(5, width) * torch.tensor([[1e-20], [1e-3], [1.0], [1e4], [1e30]])
    y = values(every, every.quantize(x, format))
    step = x.abs().amax(dim=1, keepdim=True).double() / (127 if format.limbs == 1 else 32512)
    # Half a step, and what three float32 roundings (inverse, product, scale) can add at the largest value.
    slack = x.abs().double() * 3 * 2**-24
    assert ((y - x.double()).abs() <= step / 2 + slack).all()


def test_a_row_of_zeros_has_scale_zero_and_does_not_disturb_others(every: Kernels) -> None:
    x = torch.randn(3, 70)
    x[1] = 0.0
    for format in (DYNAMIC, TWO_LIMBS):
        quantized = every.quantize(x, format)
        assert isinstance(quantized, Quantized)
        assert quantized.scale[1] == 0
        assert (integers(every, quantized)[:, 1] == 0).all()
        assert (values(every, quantized)[1] == 0).all()


def test_limbs_cover_their_whole_range(every: Kernels) -> None:
    x = torch.arange(-32512, 32513, 1.0)[None]  # [1, 65025]
    high, low = integers(every, every.quantize(x, TWO_LIMBS))
    assert torch.equal(high * 256 + low, x.long())
    assert (int(low.min()), int(low.max()), int(high.min()), int(high.max())) == (-128, 127, -127, 127)


def test_static_quantisation_saturates(every: Kernels) -> None:
    x = torch.tensor([[0.0, 1e30, -1e30, 0.037, 0.0555, 4.0, 6.0]])
    q = integers(every, every.quantize(x, STATIC))
    # 0.0555 / 0.037 is 1.5: half to even, then the zero point.
    assert q.tolist() == [[[-11, 127, -128, -10, -9, 97, 127]]]


def test_an_absolute_maximum_from_other_ranks_sets_the_scale(every: Kernels) -> None:
    x = torch.randn(4, 96)
    wider = every.absmax(x) * 3
    assert torch.equal(every.absmax(x), x.abs().amax(dim=1))
    quantized = every.quantize(x, DYNAMIC, absmax=wider)
    assert isinstance(quantized, Quantized)
    assert torch.equal(quantized.scale, wider / 127.0)
    assert integers(every, quantized).abs().max() <= 43


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embedding_gives_the_rows_of_the_table(every: Kernels, dtype: torch.dtype) -> None:
    table = torch.randn(50, 37).to(dtype)
    ids = torch.tensor([0, 49, 7, 7])
    assert torch.equal(every.embedding(ids, table), table[ids].float())
    with pytest.raises(IndexError):
        every.embedding(torch.tensor([50]), table)


def test_embedding_refuses_negative_ids(fast: Kernels) -> None:
    with pytest.raises(IndexError):
        fast.embedding(torch.tensor([-1]), torch.randn(4, 4))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("width", [1, 37, 512, 2048])
def test_the_norm_stays_near_float64(every: Kernels, format: ActivationFormat, width: int) -> None:
    x, add, weight = torch.randn(5, width) * 10, torch.randn(5, width), torch.rand(width) + 0.5
    y, r = every.rms_norm(x.clone(), weight, 1e-5, format, add=add)
    assert torch.equal(r, x + add)
    wide = r.double()
    exact = wide / torch.sqrt(wide.square().mean(dim=1, keepdim=True) + 1e-5) * weight
    half = torch.zeros(5, 1)
    if isinstance(y, Quantized):
        half = y.scale[:, None] / 2
        exact = exact.clamp(-117 * 0.037, 138 * 0.037) if format == STATIC else exact
    # Float32: the inverse and two products round once each, quantising three times more.
    assert ((values(every, y) - exact).abs() <= half + exact.abs() * 6 * 2**-24).all()


def test_the_norm_without_an_addend_leaves_its_input(every: Kernels) -> None:
    x = torch.randn(3, 48)
    before = x.clone()
    _, r = every.rms_norm(x, torch.ones(48), 1e-6, DYNAMIC)
    assert torch.equal(r, before)
    assert torch.equal(x, before)


def test_the_norm_of_a_row_of_zeros_is_zero(every: Kernels) -> None:
    y, _ = every.rms_norm(torch.zeros(2, 20), torch.ones(20), 1e-6, FLOAT)
    assert torch.equal(values(every, y), torch.zeros(2, 20, dtype=torch.float64))


def test_norms_of_the_compiled_kernels_equal_the_reference(fast: Kernels, reference: Kernels) -> None:
    x, weight = torch.randn(64, 1000), torch.rand(1000)
    ours, _ = fast.rms_norm(x.clone(), weight, 1e-5, FLOAT)
    theirs, _ = reference.rms_norm(x, weight, 1e-5, FLOAT)
    # Both sum in float64: the sums' last bits may differ, what they round to almost never does.
    torch.testing.assert_close(ours, theirs, rtol=2**-22, atol=0)
    assert (values(fast, ours) != values(reference, theirs)).float().mean() < 0.01


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("width", [1, 16, 37, 1000])
def test_silu_stays_near_float64(every: Kernels, format: ActivationFormat, width: int) -> None:
    gate_up = torch.randn(4, 2 * width) * 3
    y = every.silu_mul(gate_up, format)
    gate, up = gate_up.double().chunk(2, dim=1)
    exact = gate / (1 + torch.exp(-gate)) * up
    half = torch.zeros(4, 1)
    if isinstance(y, Quantized):
        half = y.scale[:, None] / 2
        exact = exact.clamp(-117 * 0.037, 138 * 0.037) if format == STATIC else exact
    # exp is off by at most 2 ulp; sum, quotient, product and quantising add roundings: 10 of 2^-24 cover them.
    assert ((values(every, y) - exact).abs() <= half + exact.abs() * 10 * 2**-24).all()


def test_silu_of_large_gates_neither_overflows_nor_loses_its_sign(every: Kernels) -> None:
    gate = torch.tensor([[-1e30, -200.0, -100.0, -88.0, 0.0, 88.0, 100.0, 200.0, 1e30]])
    y = values(every, every.silu_mul(torch.cat([gate, torch.ones_like(gate)], dim=1), FLOAT))[0]
    assert y[:3].abs().max() <= 1e-37
    assert y[3] == pytest.approx(-88.0 * 6.054601895401186e-39, rel=1e-3)
    assert y[4:].tolist() == gate[0, 4:].tolist()


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_has_the_same_bits_alone_and_with_any_number_of_threads(
    make_kernels: MakeKernels, every: Kernels, format: ActivationFormat
) -> None:
    x, add, weight = torch.randn(41, 1001), torch.randn(41, 1001), torch.rand(1001)
    gate_up = torch.randn(41, 2002)

    def results(kernels: Kernels, rows: slice) -> list[Activation]:
        normed, _ = kernels.rms_norm(x[rows].clone(), weight, 1e-5, format, add=add[rows])
        return [normed, kernels.silu_mul(gate_up[rows].clone(), format), kernels.quantize(x[rows].clone(), format)]

    whole = results(every, slice(0, 41))
    for other in (make_kernels(every.name, 1), make_kernels(every.name, 5)):
        assert all(same(a, b) for a, b in zip(results(other, slice(0, 41)), whole))
    for row in range(0, 41, 5):
        for alone, batch in zip(results(every, slice(row, row + 1)), whole):
            assert torch.equal(values(every, alone)[0], values(every, batch)[row])


@pytest.mark.parametrize("format", FORMATS)
def test_no_rows_give_no_rows(every: Kernels, format: ActivationFormat) -> None:
    y, r = every.rms_norm(torch.empty(0, 8), torch.ones(8), 1e-5, format)
    assert tuple(y.shape) == (0, 8)
    assert tuple(r.shape) == (0, 8)
    assert tuple(every.silu_mul(torch.empty(0, 16), format).shape) == (0, 8)
    assert every.embedding(torch.empty(0, dtype=torch.int64), torch.ones(3, 8)).shape == (0, 8)


def test_native_code_never_sees_wrong_types_or_shapes(fast: Kernels) -> None:
    with pytest.raises(ValueError, match="x must be"):
        fast.quantize(torch.ones(2, 8, dtype=torch.float64), DYNAMIC)
    with pytest.raises(ValueError, match="weight must be"):
        fast.rms_norm(torch.ones(2, 8), torch.ones(7), 1e-5, FLOAT)
    with pytest.raises(ValueError, match="add must be"):
        fast.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-5, FLOAT, add=torch.ones(1, 8))
    with pytest.raises(ValueError, match="absmax must be"):
        fast.quantize(torch.ones(2, 8), DYNAMIC, absmax=torch.ones(3))


def test_rows_that_are_not_contiguous_are_read_right(fast: Kernels, reference: Kernels) -> None:
    x = torch.randn(20, 6).T
    assert torch.equal(integers(fast, fast.quantize(x, DYNAMIC)), integers(reference, reference.quantize(x, DYNAMIC)))
