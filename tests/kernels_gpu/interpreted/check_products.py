"""Run by test_interpreter.py under TRITON_INTERPRET=1: products against the reference, bit for bit where integer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.kernels.choose import self_test
from octavo.kernels.gpu import products
from octavo.kernels.gpu.backend import GpuKernels
from octavo.kernels.gpu.device import DeviceLimits
from octavo.kernels.gpu.tiles import Tile
from octavo.kernels.interface import ActivationFormat, Kernels
from octavo.kernels.reference import ReferenceKernels

DYNAMIC = ActivationFormat(1)
TWO_LIMBS = ActivationFormat(2)
STATIC = ActivationFormat(1, static_scale=0.037, zero_point=-11)
GPU = GpuKernels(torch.device("cpu"))
REFERENCE = ReferenceKernels()


def product(
    kernels: Kernels, x: Tensor, weight: Tensor, *, groups: int, format: ActivationFormat, zero: bool
) -> Tensor:
    """One product with everything that its epilogue can have; weights and scales come from fixed seeds."""
    generator = torch.Generator().manual_seed(7)
    outputs = len(weight)
    scale = torch.rand(outputs, groups, generator=generator)
    zero_point = torch.randint(-128, 128, (outputs, groups), generator=generator) if zero else None
    bias, residual = torch.randn(outputs, generator=generator), torch.randn(len(x), outputs, generator=generator)
    packed = kernels.pack_int8(weight, scale, format=format, zero_point=zero_point, bias=bias)
    return kernels.linear(kernels.quantize(x, format), packed, residual=residual)


@pytest.mark.parametrize("format", [DYNAMIC, TWO_LIMBS, STATIC])
@pytest.mark.parametrize(
    ("inputs", "groups", "zero"),
    [(70, 1, True), (300, 1, False), (128, 2, True), (96, 3, False), (72, 2, True), (1024, 2, False)],
)
def test_integer_products_equal_the_reference(format: ActivationFormat, inputs: int, groups: int, zero: bool) -> None:
    x, weight = torch.randn(5, inputs), torch.randint(-128, 128, (37, inputs), dtype=torch.int8)
    x[1] = 0.0
    x[2, 0] = 3000.0
    weight[0] = -128
    ours = product(GPU, x, weight, groups=groups, format=format, zero=zero)
    assert torch.equal(ours, product(REFERENCE, x, weight, groups=groups, format=format, zero=zero))


@pytest.mark.parametrize("limbs", [1, 2])
def test_tiles_change_no_bit(limbs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(70, 256), torch.randint(-128, 128, (150, 256), dtype=torch.int8)
    expected = product(REFERENCE, x, weight, groups=1, format=ActivationFormat(limbs), zero=False)
    for tile in (Tile(16, 32, 256, 4, 4), Tile(64, 64, 128, 4, 4), Tile(128, 128, 64, 8, 3)):
        monkeypatch.setattr(products, "int8_tile", lambda *_, tile=tile, **__: tile)
        assert torch.equal(product(GPU, x, weight, groups=1, format=ActivationFormat(limbs), zero=False), expected)


def test_tiles_fit_the_card_and_the_group() -> None:
    small = DeviceLimits((8, 6), 101376)
    for rows in (1, 17, 40, 500):
        for group in (0, 32, 96, 128, 4096):
            for limbs in (1, 2):
                tile = products.int8_tile(rows, 4096, 4096, limbs=limbs, group=group, residual=True, limits=small)
                assert tile.shared_bytes(limbs) <= small.shared_bytes
                assert (group or 4096) % tile.block_k == 0
                assert tile.block_k >= 32


def test_the_self_test_passes() -> None:
    assert self_test(GPU, widths=(4, 60, 1024)) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inputs"), [(1, 64), (19, 133)])
def test_float_products_stay_near_float64(dtype: torch.dtype, rows: int, inputs: int) -> None:
    x, weight = torch.randn(rows, inputs), torch.randn(70, inputs).to(dtype)
    bias, residual = torch.randn(70), torch.randn(rows, 70)
    y = GPU.linear(x, GPU.pack_float(weight, bias=bias), residual=residual)
    exact = x.double() @ weight.double().T + bias.double() + residual.double()
    bound = x.double().abs() @ weight.double().abs().T + bias.double().abs() + residual.double().abs()
    assert ((y.double() - exact).abs() <= bound * (inputs / 16 + 8) * 2**-24).all()


def test_wrong_formats_and_shapes_are_refused() -> None:
    packed = GPU.pack_int8(torch.ones(5, 8, dtype=torch.int8), torch.ones(1), format=DYNAMIC)
    with pytest.raises(ValueError, match="multiplies"):
        GPU.linear(GPU.quantize(torch.ones(1, 8), TWO_LIMBS), packed)
    with pytest.raises(ValueError, match="multiplies"):
        GPU.linear(torch.ones(1, 8), packed)
    assert GPU.linear(GPU.quantize(torch.empty(0, 8), DYNAMIC), packed).shape == (0, 5)
