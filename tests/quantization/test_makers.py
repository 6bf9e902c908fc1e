"""Checkpoints made by the tools that users make them with: served logits equal the dequantised float model.

Runs where OCTAVO_LLMCOMPRESSOR_PYTHON and OCTAVO_GPTQMODEL_PYTHON name a Python that has the tool. Bounds as for the
same formats from our own writers.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file
from torch import Tensor

from models.harness import load_harness
from models.tiny_checkpoints import VOCAB, reference_logits
from quantization import gptqmodel_maker, llmcompressor_maker
from quantization.format_fixtures import linears, logits_with_rounded_cache, round_per_token
from quantization.test_kept_fp8 import Fp8Kernels, round_fp8_per_token, round_fp8_static
from quantize.making import write_float

LLMCOMPRESSOR = os.environ.get("OCTAVO_LLMCOMPRESSOR_PYTHON")
GPTQMODEL = os.environ.get("OCTAVO_GPTQMODEL_PYTHON")
# short ones: an input next to the middle of two numbers goes either way, and all later tokens of its prompt hear of it
PROMPTS = torch.randint(3, VOCAB, (8, 12), generator=torch.Generator().manual_seed(3)).tolist()
A16_BOUND, EXACT_BOUND, TIE_BOUND, CONVERTED_MEAN, FP8_MEDIAN, FP8_BOUND = 1e-3, 1e-5, 0.05, 0.03, 1e-3, 1e-2
pytestmark = pytest.mark.slow
needs_llmcompressor = pytest.mark.skipif(LLMCOMPRESSOR is None, reason="no Python with llmcompressor is named")
needs_gptqmodel = pytest.mark.skipif(GPTQMODEL is None, reason="no Python with gptqmodel is named")


def made_by(python: str | None, maker: Any, tmp_path: Path, *arguments: str) -> tuple[Any, Path]:
    """The float model and the folder that the tool made of it."""
    assert python is not None
    model = write_float(tmp_path / "float")
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environ |= {"CUDA_VISIBLE_DEVICES": "", "GPTQMODEL_CPU_WORKERS": "2"}  # of two cores gptqmodel takes one and fails
    command = [python, maker.__file__, str(tmp_path / "float"), str(tmp_path / "made"), *arguments]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    return model, tmp_path / "made"


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found.update(load_file(path))
    return found


def fill(model: Any, folder: Path, weight: Callable[[dict[str, Tensor], str], Tensor]) -> Any:
    """The float model with what the folder means: norms may have taken a smoothing in."""
    stored = stored_tensors(folder)
    for name, parameter in model.named_parameters():
        if name in stored and stored[name].is_floating_point() and stored[name].dtype.itemsize > 1:
            parameter.data = stored[name].float()
    for name, module in linears(model):
        module.weight.data = weight(stored, name)
    return model


def scaled(stored: dict[str, Tensor], name: str) -> Tensor:
    return stored[f"{name}.weight"].float() * stored[f"{name}.weight_scale"].float()


def unpacked(stored: dict[str, Tensor], name: str) -> Tensor:
    """By the format's own library."""
    groups = stored[f"{name}.weight_scale"].shape[1]
    size = None if groups == 1 else int(stored[f"{name}.weight_shape"][1]) // groups
    args = QuantizationArgs(strategy="channel" if size is None else "group", group_size=size)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    parts = {key: stored[f"{name}.{key}"] for key in ("weight_packed", "weight_scale", "weight_shape")}
    return PackedQuantizationCompressor.decompress(parts, scheme)["weight"].float()


def add_rounding(model: Any, rounding: Callable[[str, Tensor], Tensor]) -> None:
    for name, module in linears(model):
        module.register_forward_pre_hook(lambda _module, inputs, name=name: (rounding(name, inputs[0]),))


def errors(folder: Path, model: Any, *, kernels: Any = "reference") -> Tensor:
    """[T] the largest logit error of each row, relative to the largest logit."""
    harness = load_harness(folder, int8_cache=False, kernels=kernels, dtype="float32")
    want = torch.cat([reference_logits(model, prompt) for prompt in PROMPTS])
    got = torch.cat([harness.prefill(prompt, chunk=len(prompt)) for prompt in PROMPTS])
    return (got - want).abs().amax(dim=1) / want.abs().max()


@needs_llmcompressor
@pytest.mark.parametrize("recipe", ["w8a8", "smoothed"])
def test_w8a8_of_llmcompressor(tmp_path: Path, recipe: str) -> None:
    model, made = made_by(LLMCOMPRESSOR, llmcompressor_maker, tmp_path, recipe)
    add_rounding(fill(model, made, scaled), lambda _name, x: round_per_token(x, 0.0))
    found = errors(made, model)
    assert float(found.median()) <= EXACT_BOUND
    assert float(found.max()) <= TIE_BOUND


@needs_llmcompressor
@pytest.mark.parametrize("strategy", ["channel", "group"])
def test_w8a16_of_llmcompressor(tmp_path: Path, strategy: str) -> None:
    model, made = made_by(LLMCOMPRESSOR, llmcompressor_maker, tmp_path, f"w8a16-{strategy}")
    assert float(errors(made, fill(model, made, unpacked)).max()) <= A16_BOUND


@needs_llmcompressor
def test_an_int8_cache_of_llmcompressor(tmp_path: Path) -> None:
    model, made = made_by(LLMCOMPRESSOR, llmcompressor_maker, tmp_path, "w8a8c8")
    add_rounding(fill(model, made, scaled), lambda _name, x: round_per_token(x, 0.0))
    harness = load_harness(made)
    schemes = harness.model.cache_schemes
    assert all(scheme.static for scheme in schemes)
    stored = stored_tensors(made)
    assert float(schemes[1].k_scale) == float(stored["model.layers.1.self_attn.k_scale"])  # type: ignore[arg-type]
    scales = [(scheme.k_scale, scheme.v_scale) for scheme in schemes]
    prompt = [token for part in PROMPTS for token in part]
    want = logits_with_rounded_cache(model, prompt, scales)  # type: ignore[arg-type]
    found = (harness.prefill(prompt, chunk=len(prompt)) - want).abs().amax(dim=1) / want.abs().max()
    assert float(found[0]) <= EXACT_BOUND
    assert float(found.max()) <= TIE_BOUND


@needs_llmcompressor
@pytest.mark.parametrize("recipe", ["fp8", "fp8-dynamic"])
def test_fp8_of_llmcompressor_kept_and_converted(tmp_path: Path, recipe: str) -> None:
    model, made = made_by(LLMCOMPRESSOR, llmcompressor_maker, tmp_path, recipe)
    fill(model, made, scaled)
    assert float(errors(made, model).mean()) <= CONVERTED_MEAN
    stored = stored_tensors(made)

    def rounding(name: str, x: Tensor) -> Tensor:
        if recipe == "fp8-dynamic":
            return round_fp8_per_token(x, 0.0)
        return round_fp8_static(x, float(stored[f"{name}.input_scale"]) * 448.0)

    add_rounding(model, rounding)
    found = errors(made, model, kernels=Fp8Kernels())
    assert float(found.median()) <= FP8_MEDIAN
    assert float(found.max()) <= FP8_BOUND


def gptq_weight(stored: dict[str, Tensor], name: str) -> Tensor:
    """By the layout: four values in a word, along the inputs for weights, along the outputs for zero points."""
    q = stored[f"{name}.qweight"].contiguous().view(torch.uint8)  # [K / 4, 4 N] bytes of each word together
    words, outputs = stored[f"{name}.qweight"].shape
    q = q.view(words, outputs, 4).permute(0, 2, 1).reshape(4 * words, outputs).float()
    zeros = (stored[f"{name}.qzeros"].contiguous().view(torch.uint8).float() + 1) % 256  # [groups, N]
    group = stored[f"{name}.g_idx"].long()
    return ((q - zeros[group]) * stored[f"{name}.scales"].float()[group]).T


@needs_gptqmodel
@pytest.mark.parametrize(
    ("group_size", "desc_act", "sym"), [("32", "0", "1"), ("-1", "0", "1"), ("32", "0", "0"), ("-1", "1", "1")]
)
def test_gptq_of_gptqmodel(tmp_path: Path, group_size: str, desc_act: str, sym: str) -> None:
    model, made = made_by(GPTQMODEL, gptqmodel_maker, tmp_path, group_size, desc_act, sym)
    assert float(errors(made, fill(model, made, gptq_weight)).max()) <= A16_BOUND
