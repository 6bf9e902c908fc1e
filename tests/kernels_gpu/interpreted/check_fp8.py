"""Run by test_interpreter.py under TRITON_INTERPRET=1: rows and products of e4m3 against the reference.

The interpreter of triton-lang 3.6 converts to 8-bit floats wrongly (31.9 becomes 16, subnormals lose bits) and
multiplies them by way of float16, which is exact. So torch's conversion takes the place of its own here. What the
tensor cores of a card do with their sums is left to a card.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from triton.runtime import interpreter

from octavo.kernels.gpu.backend import GpuKernels
from octavo.kernels.gpu.device import DeviceLimits
from octavo.kernels.interface import ActivationFormat, Kernels, Quantized
from octavo.kernels.reference import ReferenceKernels

REFERENCE = ReferenceKernels()
FP8 = ActivationFormat(1, fp8=True)
FORMATS = [FP8, ActivationFormat(1, 0.011, fp8=True)]


def card(capability: tuple[int, int]) -> GpuKernels:
    """The backend as such a card would have it."""
    kernels = GpuKernels(torch.device("cpu"))
    kernels._limits = DeviceLimits(capability, 101376)
    return kernels


GPU = card((9, 0))


@pytest.fixture(autouse=True)
def conversion_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 to e4m3 as hardware does it; every other conversion stays."""
    own = interpreter._convert_float

    def convert(x: NDArray[np.uint32], source: tl.dtype, target: tl.dtype, mode: object) -> NDArray[np.generic]:
        if (source, target) != (tl.float32, tl.float8e4nv):
            return own(x, source, target, mode)
        floats = torch.from_numpy(np.frombuffer(x.tobytes(), dtype=np.float32).copy())
        return floats.to(torch.float8_e4m3fn).view(torch.uint8).numpy().reshape(x.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def bytes_of(x: object) -> Tensor:
    """[M, stride] uint8 of rows in e4m3."""
    assert isinstance(x, Quantized)
    return x.q[0].view(torch.uint8)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_equal_the_reference(format: ActivationFormat) -> None:
    x = torch.randn(5, 200) * torch.tensor([[1e-30], [1.0], [1e4], [0.0], [1e38]])
    x[1, :50] = torch.linspace(-0.02, 0.02, 50)  # small beside the largest: subnormal
    ours, theirs = GPU.quantize(x, format), REFERENCE.quantize(x, format)
    assert isinstance(ours, Quantized)
    assert isinstance(theirs, Quantized)
    assert torch.equal(bytes_of(ours)[:, :200], bytes_of(theirs))
    assert not bytes_of(ours)[:, 200:].any()
    assert torch.equal(ours.scale, theirs.scale)


@pytest.mark.parametrize("format", FORMATS)
def test_norm_and_silu_stay_within_a_step_of_the_reference(format: ActivationFormat) -> None:
    x, weight, gate_up = torch.randn(3, 200), torch.rand(200) + 0.5, torch.randn(3, 400) * 3
    for kernels_parts in zip(*(parts(kernels, x, weight, gate_up, format) for kernels in (GPU, REFERENCE))):
        ours, theirs = (part.q[0, :, :200].float() for part in kernels_parts)
        assert ((ours - theirs).abs() <= theirs.abs() / 8 + 2**-9).all()
        assert (ours != theirs).float().mean() < 0.01  # only where a last bit decided


def parts(
    kernels: Kernels, x: Tensor, weight: Tensor, gate_up: Tensor, format: ActivationFormat
) -> tuple[Quantized, Quantized]:
    normed, activated = kernels.rms_norm(x.clone(), weight, 1e-6, format)[0], kernels.silu_mul(gate_up, format)
    assert isinstance(normed, Quantized)
    assert isinstance(activated, Quantized)
    return normed, activated


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "inputs"), [(1, 128), (5, 300), (70, 140)])
def test_products_stay_near_the_reference(
    rows: int, inputs: int, format: ActivationFormat, capability: tuple[int, int]
) -> None:
    x, weight = torch.randn(rows, inputs), (torch.randn(37, inputs) * 40).to(torch.float8_e4m3fn)
    x[0] = 0.0
    x[-1, 0] = 3000.0
    scale, bias, residual = torch.rand(37, 1) * 0.01, torch.randn(37), torch.randn(rows, 37)

    def product(kernels: GpuKernels | ReferenceKernels) -> tuple[Tensor, Tensor]:
        """The product, and what its terms add up to without their signs."""
        q = kernels.quantize(x, format)
        assert isinstance(q, Quantized)
        y = kernels.linear(q, kernels.pack_fp8(weight, scale, format=format, bias=bias), residual=residual)
        terms = (q.q[0, :, :inputs].float().abs() @ weight.float().abs().T) * scale.T * q.scale[:, None]
        return y, terms + bias.abs() + residual.abs()

    (ours, terms), (theirs, _) = product(card(capability)), product(REFERENCE)
    assert ((ours - theirs).abs() <= terms * (inputs / 16 + 8) * 2**-24).all()


def test_experts_together_equal_experts_one_by_one() -> None:
    def made(outputs: int, inputs: int) -> list[object]:
        weights = [(torch.randn(outputs, inputs) * 30).to(torch.float8_e4m3fn) for _ in range(3)]
        return [GPU.pack_fp8(weight, torch.rand(outputs, 1) * 0.01, format=FP8) for weight in weights]

    gate_up, down = made(80, 70), made(70, 40)
    stacked = [GPU.stack_experts(part) for part in (gate_up, down)]
    assert None not in stacked
    x, ids = torch.randn(6, 70), torch.tensor([[0, 2], [2, 0], [0, 1], [2, 1], [0, 2], [1, 0]])
    together = GPU.run_experts(GPU.quantize(x, FP8), ids, *stacked)
    for row in range(6):
        for choice, expert in enumerate(ids[row].tolist()):
            hidden = GPU.linear(GPU.quantize(x[row : row + 1], FP8), gate_up[expert])
            alone = GPU.linear(GPU.silu_mul(hidden, FP8), down[expert])
            torch.testing.assert_close(together[row, choice], alone[0], rtol=1e-5, atol=1e-5)


def test_a_card_without_fp8_says_so() -> None:
    old = card((8, 6))
    assert not old.multiplies_fp8
    assert GPU.multiplies_fp8
    with pytest.raises(ValueError, match=r"8\.6 has no fp8"):
        old.pack_fp8(torch.zeros(4, 4).to(torch.float8_e4m3fn), torch.ones(1), format=FP8)


def test_what_is_no_product_of_fp8_is_refused() -> None:
    weight = torch.zeros(4, 8).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        GPU.pack_fp8(weight.float(), torch.ones(1), format=FP8)
    with pytest.raises(ValueError, match="one scale a row"):
        GPU.pack_fp8(weight, torch.ones(4, 2), format=FP8)
    with pytest.raises(ValueError, match="no product"):
        GPU.pack_fp8(weight, torch.ones(1), format=ActivationFormat(1))
    with pytest.raises(ValueError, match="no product"):
        GPU.pack_int8(torch.zeros(4, 8, dtype=torch.int8), torch.ones(1), format=FP8)
    packed = GPU.pack_fp8(weight, torch.ones(1), format=FP8)
    with pytest.raises(ValueError, match="multiplies"):
        GPU.linear(GPU.quantize(torch.ones(1, 8), ActivationFormat(1)), packed)
