"""Checkpoints of fp8 where the device multiplies fp8: weights and input scales as they are.

The reference kernels stand in for such a device. Bound: the dequantised float model with inputs rounded to e4m3 adds up
in another order, so now and then an input next to the middle of two e4m3 numbers goes to the other one: 1 % of the
largest logit at most, 0.1 % in half of the rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.harness import load_harness
from models.tiny_checkpoints import VOCAB, edit_config, edit_tensors, reference_logits
from octavo.kernels.reference import ReferenceKernels
from octavo.models.config import load_config
from octavo.models.loader import LoadOptions, load_decoder
from octavo.parallel.group import make_group
from octavo.quantization.errors import CheckpointError
from octavo.quantization.formats.reader import ReaderInputs
from octavo.quantization.formats.source import TensorSource
from octavo.quantization.load_report import LoadReport
from quantization.format_fixtures import (
    FP8_MAX,
    SMOOTH_QUANT,
    fp8_config,
    fp8_linear,
    write_compressed_fp8,
    write_model,
)
from quantization.test_formats import FP8, experts_in_fp8

PROMPT = torch.randint(3, VOCAB, (90,), generator=torch.Generator().manual_seed(3)).tolist()
MEDIAN_BOUND, BOUND = 1e-3, 1e-2
Q = "model.layers.0.self_attn.q_proj"


class Fp8Kernels(ReferenceKernels):
    """The reference as a device with products of fp8."""

    multiplies_fp8 = True


def round_fp8_per_token(x: Tensor, _largest: float) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / FP8_MAX
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def round_fp8_static(x: Tensor, largest: float) -> Tensor:
    scale = largest / FP8_MAX
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * scale


ROUNDING = {"dynamic": round_fp8_per_token, "static": round_fp8_static}


def assert_agrees(folder: Path, model: Any) -> None:
    want = reference_logits(model, PROMPT)
    got = load_harness(folder, int8_cache=False, kernels=Fp8Kernels()).prefill(PROMPT, chunk=len(PROMPT))
    errors = (got - want).abs().amax(dim=1) / want.abs().max()
    assert float(errors.median()) <= MEDIAN_BOUND
    assert float(errors.max()) <= BOUND


def kept_report(folder: Path) -> LoadReport:
    """What the log of a start on such a device says."""
    config, report = load_config(folder), LoadReport()
    inputs = ReaderInputs(TensorSource(folder), config.quantization, keep_fp8=True)
    options = LoadOptions(max_positions=1)
    load_decoder(
        config, inputs, Fp8Kernels(), make_group(1), options=options, progress=lambda stage, done: None, report=report
    )
    return report


@pytest.mark.parametrize("case", FP8)
@pytest.mark.parametrize("family", ["llama2", "qwen2"])
def test_fp8_is_kept_and_multiplied(tmp_path: Path, case: str, family: str) -> None:
    scheme, writer = FP8[case]
    model = write_model(tmp_path, writer, fp8_config(scheme), family=family, rounding=ROUNDING[scheme])
    assert_agrees(tmp_path, model)
    report = kept_report(tmp_path)
    assert report.weight_scheme == "fp8"
    product = next(product for product in report.products if product.name == Q)
    assert product.weight == ("fp8 per channel" if "row" in case else "fp8 per tensor")
    assert product.activation == ("fp8 static" if scheme == "static" else "fp8 per token")
    assert product.loss is None
    assert not report.notes


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_fp8_of_compressed_tensors_is_kept(tmp_path: Path, strategy: str, activations: str) -> None:
    model = write_compressed_fp8(tmp_path, strategy=strategy, activations=activations, rounding=ROUNDING[activations])
    assert_agrees(tmp_path, model)


def test_fp8_of_smooth_quant_is_kept(tmp_path: Path) -> None:
    def write(name: str, weight: Tensor, largest: float) -> tuple[dict[str, Tensor], Tensor]:
        tensors, meant = fp8_linear(per_row=True, static=False)(name, weight, largest)
        return {"weight": tensors["weight"], "scale": tensors["weight_scale"]}, meant

    config = {**SMOOTH_QUANT, "quant_dtype": "float8_e4m3fn"}
    assert_agrees(tmp_path, write_model(tmp_path, write, config, rounding=round_fp8_per_token))


def test_fp8_weights_with_16_bit_inputs_are_converted_all_the_same(tmp_path: Path) -> None:
    write_compressed_fp8(tmp_path, strategy="channel", activations="dynamic")
    edit_config(
        tmp_path, lambda raw: raw["quantization_config"]["config_groups"]["group_0"].update(input_activations=None)
    )
    report = kept_report(tmp_path)
    assert report.weight_scheme == "w8a16 from fp8"
    product = next(product for product in report.products if product.name == Q)
    assert (product.weight, product.activation) == ("int8 per channel", "two int8 per token")
    assert product.loss


class NotingKernels(Fp8Kernels):
    """Remembers what it was given."""

    def __init__(self, given: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._given = given

    def pack_fp8(self, weight: Tensor, scale: Tensor, **rest: Any) -> Any:
        self._given.append((weight.view(torch.uint8).clone(), scale.clone()))
        return super().pack_fp8(weight, scale, **rest)


def test_experts_of_fp8_are_kept(tmp_path: Path) -> None:
    experts_in_fp8(tmp_path, keep_float=False)
    edit_config(tmp_path, lambda raw: raw.update(quantization_config=fp8_config("dynamic")))
    given: list[tuple[Tensor, Tensor]] = []
    harness = load_harness(tmp_path, int8_cache=False, kernels=NotingKernels(given))
    stored = load_file(tmp_path / "model.safetensors")
    for expert in range(4):
        base = f"model.layers.1.block_sparse_moe.experts.{expert}"
        for parts in (["w1", "w3"], ["w2"]):
            weight = torch.cat([stored[f"{base}.{part}.weight"].view(torch.uint8) for part in parts])
            scale = torch.cat([stored[f"{base}.{part}.weight_scale"] for part in parts])
            assert any(torch.equal(weight, one) and torch.equal(scale, other) for one, other in given)
    kept = harness.prefill(PROMPT, chunk=90)
    assert torch.equal(harness.prefill(PROMPT, chunk=7, slot=1), kept)
    products = {product.name: product for product in kept_report(tmp_path).products}
    assert products["model.layers.0.block_sparse_moe.experts.3.w2"].weight == "fp8 per channel"
    assert products["model.layers.0.block_sparse_moe.gate"].weight == "float32"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{Q}.weight", torch.full((64, 64), float("nan")).to(torch.float8_e4m3fn), "has values that are not finite"),
        (f"{Q}.weight_scale", torch.full((64, 1), float("nan")), "every scale must be finite"),
        (f"{Q}.input_scale", torch.ones(2), r"has shape \[2\]; a scale per tensor"),
        (f"{Q}.input_scale", torch.zeros(1), "every scale must be finite and above zero"),
    ],
)
def test_bad_fp8_is_refused_where_it_is_kept_too(tmp_path: Path, name: str, value: Tensor, message: str) -> None:
    write_model(tmp_path, fp8_linear(per_row=True, static=True), fp8_config("static"))
    edit_tensors(tmp_path, lambda tensors: tensors.update({name: value}))
    with pytest.raises(CheckpointError, match=message):
        kept_report(tmp_path)
