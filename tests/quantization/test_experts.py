"""Mixtures of experts in every format: each family's separate experts beside a router that stays float.

Weight-only formats: logits against the float model that the weights mean, 1e-3 of the largest logit, as for dense
models. Formats of 8-bit inputs: the same integers and scales written in compressed-tensors' form give the same bits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor

from models.harness import load_harness
from models.tiny_checkpoints import VOCAB, edit_config, edit_tensors, family_configs, make_model, save_model
from quantization.compressed_fixtures import COMPRESSORS, Variant, quantization_config, with_scales
from quantization.format_fixtures import (
    SMOOTH_QUANT,
    Writer,
    gptq_config,
    gptq_linear,
    smooth_quant_linear,
)

PROMPT = torch.randint(3, VOCAB, (40,), generator=torch.Generator().manual_seed(3)).tolist()
A16_BOUND = 1e-3
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")
IGNORE = ("lm_head", "re:.*\\.gate$", "re:.*shared_expert_gate$")
LARGEST_INPUT = 8.0


def is_quantised(name: str) -> bool:
    return name.endswith(".weight") and ("_proj." in name or ".experts." in name)


def write_experts(folder: Path, family: str, writer: Writer, quantization: dict[str, Any] | None) -> Path:
    """A tiny mixture whose products but routers, gates and head are written by `writer`."""
    save_model(make_model(family_configs()[family]), folder)

    def rewrite(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if is_quantised(name)]:
            base = name.removesuffix(".weight")
            stored, _ = writer(base, tensors.pop(name), LARGEST_INPUT)
            tensors.update({f"{base}.{suffix}": tensor.contiguous() for suffix, tensor in stored.items()})

    edit_tensors(folder, rewrite)
    if quantization is not None:
        edit_config(folder, lambda raw: raw.update(quantization_config=quantization))
    return folder


def meant(writer: Writer) -> Writer:
    """Writes the floats that the other writer's integers mean."""

    def write(name: str, weight: Tensor, largest: float) -> tuple[dict[str, Tensor], Tensor]:
        values = writer(name, weight, largest)[1]
        return {"weight": values}, values

    return write


def compressed(variant: Variant) -> Writer:
    """By the format's own library."""
    scheme = QuantizationScheme(targets=["Linear"], weights=variant.weights())
    compressor = COMPRESSORS[variant.format]

    def write(_name: str, weight: Tensor, largest: float) -> tuple[dict[str, Tensor], Tensor]:
        packed = compressor.compress(with_scales(weight, variant), scheme)
        extra = {"input_scale": torch.tensor([largest / 127])} if variant.activations == "static" else {}
        return {**packed, **extra}, compressor.decompress(packed, scheme)["weight"].float()

    return write


def logits(folder: Path) -> Tensor:
    return load_harness(folder, weight_quant="none", int8_cache=False).prefill(PROMPT, chunk=len(PROMPT))


WEIGHT_ONLY: dict[str, tuple[Writer, dict[str, Any]]] = {
    "gptq": (gptq_linear(group_size=16), gptq_config(group_size=16)),
    "gptq, asymmetric": (gptq_linear(group_size=-1, symmetric=False), gptq_config(group_size=-1)),
    **{
        f"{variant.format}, {variant.strategy}": (compressed(variant), quantization_config(variant))
        for variant in (
            Variant(ignore=IGNORE),
            Variant(ignore=IGNORE, strategy="group", group_size=16, symmetric=False),
            Variant(ignore=IGNORE, format="pack-quantized"),
            Variant(ignore=IGNORE, format="pack-quantized", strategy="group", group_size=16),
        )
    },
}


@pytest.mark.parametrize("case", WEIGHT_ONLY)
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_weight_only_formats(tmp_path: Path, family: str, case: str) -> None:
    writer, config = WEIGHT_ONLY[case]
    want = logits(write_experts(tmp_path / "floats", family, meant(writer), None))
    harness = load_harness(write_experts(tmp_path / "made", family, writer, config), int8_cache=False)
    assert harness.model.weight_scheme == "w8a16"
    got = harness.prefill(PROMPT, chunk=len(PROMPT))
    assert float((got - want).abs().max() / want.abs().max()) <= A16_BOUND


def as_compressed(writer: Writer, *, scale: str, input_scale: float | None = None) -> Writer:
    """The integers of another format in compressed-tensors' form."""

    def write(name: str, weight: Tensor, largest: float) -> tuple[dict[str, Tensor], Tensor]:
        stored, values = writer(name, weight, largest)
        extra = {} if input_scale is None else {"input_scale": torch.tensor([input_scale])}
        return {"weight": stored["weight"], "weight_scale": stored[scale], **extra}, values

    return write


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_smooth_quant(tmp_path: Path, family: str) -> None:
    same = as_compressed(smooth_quant_linear, scale="scale")
    config = quantization_config(Variant(ignore=IGNORE, activations="dynamic"))
    want = logits(write_experts(tmp_path / "compressed", family, same, config))
    made = load_harness(write_experts(tmp_path / "made", family, smooth_quant_linear, SMOOTH_QUANT), int8_cache=False)
    assert made.model.weight_scheme == "w8a8"
    assert torch.equal(made.prefill(PROMPT, chunk=len(PROMPT)), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_with_maxima_in_json(tmp_path: Path, family: str) -> None:
    weights: dict[str, list[float]] = {}

    def write(name: str, weight: Tensor, largest: float) -> tuple[dict[str, Tensor], Tensor]:
        stored, values = smooth_quant_linear(name, weight, largest)
        weights[f"{name}.weight_quanter"] = weight.abs().amax(1).tolist()
        return {"weight": stored["weight"]}, values

    same = as_compressed(smooth_quant_linear, scale="scale", input_scale=LARGEST_INPUT / 127)
    config = quantization_config(Variant(ignore=IGNORE, activations="static"))
    want = logits(write_experts(tmp_path / "compressed", family, same, config))
    folder = write_experts(tmp_path / "made", family, write, None)
    (folder / "weight_scales.json").write_text(json.dumps(weights))
    inputs = {name.replace("weight_quanter", "activation_quanter"): LARGEST_INPUT for name in weights}
    (folder / "act_scales.json").write_text(json.dumps(inputs))
    got = logits(folder)
    assert float((got - want).norm() / want.norm()) < 1e-5  # the scales went through decimal digits
