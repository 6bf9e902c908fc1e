"""Products: compiled kernels equal the reference bit for bit, and a row's bits depend on nothing but the row."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.backends import COMPILED, MakeKernels
from octavo.kernels.interface import FLOAT, ActivationFormat, Kernels, PackedLinear, Quantized

DYNAMIC = ActivationFormat(1)
TWO_LIMBS = ActivationFormat(2)
STATIC = ActivationFormat(1, static_scale=0.037, zero_point=-11)


@dataclass(frozen=True)
class Case:
    """Inputs of one product."""

    x: Tensor  # [M, K]
    weight: Tensor  # [N, K] int8
    scale: Tensor  # [N, G]
    zero_point: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    format: ActivationFormat

    def pack(self, kernels: Kernels) -> PackedLinear:
        return kernels.pack_int8(
            self.weight, self.scale, format=self.format, zero_point=self.zero_point, bias=self.bias
        )

    def product(self, kernels: Kernels) -> Tensor:
        x = kernels.quantize(self.x, self.format)
        return kernels.linear(x, self.pack(kernels), residual=self.residual)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any shape, any option; rows of zeros, rows of one extreme, outliers."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    rows, outputs = draw(st.integers(1, 50)), draw(st.integers(1, 140))
    inputs = draw(st.integers(1, 300)) if groups == 1 else groups * 4 * draw(st.integers(1, 20))
    x = torch.randn(rows, inputs, generator=generator) * draw(st.sampled_from([1e-30, 1.0, 1e6]))
    weight = torch.randint(-128, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    kind = draw(st.sampled_from(["plain", "zero row", "extreme", "outlier"]))
    if kind == "zero row":
        x[0] = 0.0
    elif kind == "extreme":
        x[0], weight[0] = -x.abs().max(), -128
    elif kind == "outlier":
        x[:, 0] *= 3000
    zero_point = torch.randint(-128, 128, (outputs, groups), generator=generator)
    return Case(
        x=x,
        weight=weight,
        scale=torch.rand(outputs, groups, generator=generator),
        zero_point=zero_point if draw(st.booleans()) else None,
        bias=torch.randn(outputs, generator=generator) if draw(st.booleans()) else None,
        residual=torch.randn(rows, outputs, generator=generator) if draw(st.booleans()) else None,
        format=draw(st.sampled_from([DYNAMIC, TWO_LIMBS, STATIC])),
    )


@settings(max_examples=120, deadline=None, derandomize=True)
@given(case=cases())
def test_integer_products_equal_the_reference_bit_for_bit(fast: Kernels, reference: Kernels, case: Case) -> None:
    assert torch.equal(case.product(fast), case.product(reference))


@pytest.mark.parametrize("limbs", [1, 2])
@pytest.mark.parametrize("inputs", [4, 100, 2048, 8192, 32768])
def test_sums_of_extreme_integers_are_exact(every: Kernels, limbs: int, inputs: int) -> None:
    format = ActivationFormat(limbs)
    x = torch.full((3, inputs), 1.0)
    x[1] = -1.0
    weight = torch.full((2, inputs), -128, dtype=torch.int8)
    weight[1] = 127
    packed = every.pack_int8(weight, torch.ones(1), format=format)
    y = every.linear(every.quantize(x, format), packed)
    exact = x.double() @ weight.double().T
    # q · scale is ±1 but for the rounding of the scale; sums stay below 2^24 times a power of two.
    torch.testing.assert_close(y.double(), exact, rtol=3e-7, atol=0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=cases())
def test_a_row_of_an_integer_product_has_the_same_bits_alone(every: Kernels, case: Case) -> None:
    batch = case.product(every)
    packed = case.pack(every)
    for row in range(len(case.x)):
        one = slice(row, row + 1)
        residual = None if case.residual is None else case.residual[one]
        alone = every.linear(every.quantize(case.x[one], case.format), packed, residual=residual)
        assert torch.equal(alone, batch[one])


@pytest.mark.parametrize("variant", COMPILED)
@pytest.mark.parametrize("format", [DYNAMIC, TWO_LIMBS, STATIC, FLOAT])
def test_the_number_of_threads_changes_no_bit(
    make_kernels: MakeKernels, variant: str, format: ActivationFormat
) -> None:
    x = torch.randn(300, 516)
    weight = torch.randint(-128, 128, (333, 516), dtype=torch.int8)
    results = []
    for num_threads in (1, 2, 5):
        kernels = make_kernels(variant, num_threads)
        if format.limbs == 0:
            packed = kernels.pack_float(weight.float() / 100)
        else:
            packed = kernels.pack_int8(weight, torch.full((333, 3), 0.01), format=format)
        results.append(kernels.linear(kernels.quantize(x, format), packed))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_both_compiled_variants_give_the_same_bits(make_kernels: MakeKernels) -> None:
    x, weight = torch.randn(7, 333), torch.randn(45, 333).bfloat16()
    results = [
        kernels.linear(x, kernels.pack_float(weight))
        for kernels in (make_kernels("avx512", 2), make_kernels("avx2", 2))
    ]
    assert torch.equal(*results)


def test_two_limbs_stay_within_five_parts_in_ten_thousand_beside_an_outlier(every: Kernels) -> None:
    x = torch.randn(6, 1024)
    x[:, 17] = 3000.0
    weight = torch.randint(-127, 128, (64, 1024), dtype=torch.int8)
    exact = x.double() @ weight.double().T
    errors = {}
    for format in (DYNAMIC, TWO_LIMBS):
        y = every.linear(every.quantize(x, format), every.pack_int8(weight, torch.ones(1), format=format))
        errors[format.limbs] = float((y.double() - exact).norm() / exact.norm())
    assert errors[2] <= 5e-4
    assert errors[1] > 1e-2  # what one limb loses here: the second limb is what keeps the bound


def test_weight_only_products_are_as_exact_as_bfloat16_activations(every: Kernels) -> None:
    x = torch.randn(8, 512)
    weight = torch.randint(-127, 128, (96, 512), dtype=torch.int8)
    exact = x.double() @ weight.double().T
    y = every.linear(every.quantize(x, TWO_LIMBS), every.pack_int8(weight, torch.ones(1), format=TWO_LIMBS))
    rounded = x.bfloat16().double() @ weight.double().T
    assert (y - exact).abs().max() < (rounded - exact).abs().max() / 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 1, 1), (3, 16, 5), (9, 133, 70), (33, 2049, 37)])
def test_float_products_stay_near_float64(
    every: Kernels, dtype: torch.dtype, rows: int, inputs: int, outputs: int
) -> None:
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs).to(dtype)
    bias, residual = torch.randn(outputs), torch.randn(rows, outputs)
    y = every.linear(x, every.pack_float(weight, bias=bias), residual=residual)
    exact = x.double() @ weight.double().T + bias.double() + residual.double()
    bound = x.double().abs() @ weight.double().abs().T + bias.double().abs() + residual.double().abs()
    # Sixteen lanes add K / 16 terms each: at most K / 16 + 8 roundings of 2^-24.
    assert ((y.double() - exact).abs() <= bound * (inputs / 16 + 8) * 2**-24).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_of_a_float_product_has_the_same_bits_alone(every: Kernels, dtype: torch.dtype) -> None:
    x, packed = torch.randn(19, 261), every.pack_float(torch.randn(77, 261).to(dtype))
    batch = every.linear(x, packed)
    for row in range(len(x)):
        assert torch.equal(every.linear(x[row : row + 1].clone(), packed)[0], batch[row])


def test_many_rows_and_wide_inputs_cross_every_block_boundary(fast: Kernels, reference: Kernels) -> None:
    x = torch.randn(300, 4100)
    weight = torch.randint(-128, 128, (70, 4100), dtype=torch.int8)
    case = Case(x, weight, torch.rand(70, 1), None, None, None, TWO_LIMBS)
    assert torch.equal(case.product(fast), case.product(reference))


def test_no_rows_give_no_rows(every: Kernels) -> None:
    packed = every.pack_int8(torch.ones(5, 8, dtype=torch.int8), torch.ones(1), format=DYNAMIC)
    x = every.quantize(torch.empty(0, 8), DYNAMIC)
    assert isinstance(x, Quantized)
    assert every.linear(x, packed).shape == (0, 5)
    assert every.linear(torch.empty(0, 8), every.pack_float(torch.ones(5, 8))).shape == (0, 5)


def test_scales_may_be_one_number_or_one_per_output(every: Kernels) -> None:
    x, weight = torch.randn(2, 40), torch.randint(-128, 128, (6, 40), dtype=torch.int8)
    shapes: list[tuple[int, ...]] = [(1,), (6,), (6, 1)]
    results = [
        every.linear(every.quantize(x, DYNAMIC), every.pack_int8(weight, torch.full(shape, 0.5), format=DYNAMIC))
        for shape in shapes
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_product_refuses_rows_of_another_format_or_width(every: Kernels) -> None:
    packed = every.pack_int8(torch.ones(5, 8, dtype=torch.int8), torch.ones(1), format=DYNAMIC)
    with pytest.raises(ValueError, match="multiplies"):
        every.linear(every.quantize(torch.ones(1, 8), TWO_LIMBS), packed)
    with pytest.raises(ValueError, match="multiplies"):
        every.linear(torch.ones(1, 8), packed)
    with pytest.raises(ValueError, match=r"multiplies|must be"):
        every.linear(every.quantize(torch.ones(1, 9), DYNAMIC), packed)


@pytest.mark.parametrize(
    ("scale", "format"),
    [
        (torch.ones(4, 1), DYNAMIC),  # 5 outputs
        (torch.ones(5, 3), DYNAMIC),  # 8 inputs
        (torch.ones(5, 4), DYNAMIC),  # groups of 2
        (torch.ones(1), FLOAT),
        (torch.ones(1), ActivationFormat(2, static_scale=0.1)),
        (torch.ones(1), ActivationFormat(1, static_scale=0.0)),
    ],
)
def test_packing_refuses_what_has_no_product(every: Kernels, scale: Tensor, format: ActivationFormat) -> None:
    with pytest.raises(ValueError, match=r"fit|group|product|static"):
        every.pack_int8(torch.ones(5, 8, dtype=torch.int8), scale, format=format)


def test_packed_weights_know_their_size(every: Kernels) -> None:
    packed = every.pack_int8(torch.ones(64, 128, dtype=torch.int8), torch.ones(64, 1), format=DYNAMIC)
    assert (packed.out_features, packed.in_features) == (64, 128)
    assert 64 * 128 + 64 * 4 <= packed.nbytes <= 64 * 128 + 64 * 12
    table = torch.ones(10, 6, dtype=torch.bfloat16)
    assert every.pack_float(table).nbytes == 120
