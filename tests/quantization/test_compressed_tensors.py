"""Compressed-tensors checkpoints: each variant's logits against the dequantised model, and cache scales."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.harness import load_harness
from models.tiny_checkpoints import (
    VOCAB,
    edit_config,
    edit_tensors,
    family_configs,
    make_model,
    reference_logits,
    save_model,
)
from octavo.quantization.errors import CheckpointError
from octavo.quantization.scheme import dequantize, quantize_per_channel
from quantization.compressed_fixtures import Variant, quantization_config, write_compressed

PROMPT = torch.randint(3, VOCAB, (90,), generator=torch.Generator().manual_seed(3)).tolist()
# relative to the largest logit: what rounding inputs to 15 bits may move
A16_BOUND = 1e-3
# inputs rounded to 8 bits on both sides leave only float32 rounding, but for the few rows in which that turns a tie
EXACT_BOUND, TIE_BOUND = 1e-5, 0.05
W8A16 = [
    Variant(),
    Variant(strategy="tensor"),
    Variant(strategy="group", group_size=32),
    Variant(symmetric=False),
    Variant(strategy="tensor", symmetric=False),
    Variant(strategy="group", group_size=16, symmetric=False),
    Variant(format="pack-quantized"),
    Variant(format="pack-quantized", strategy="group", group_size=32),
    Variant(format="pack-quantized", symmetric=False),
    Variant(format="pack-quantized", strategy="group", group_size=32, symmetric=False),
    Variant(format="pack-quantized", strategy="tensor", symmetric=False),
]
W8A8 = [
    Variant(activations="dynamic"),
    Variant(activations="dynamic", symmetric=False),
    Variant(activations="dynamic", strategy="group", group_size=32),
    Variant(activations="static"),
    Variant(activations="static_asymmetric"),
]


def _logits(folder: Path, *, int8_cache: bool = False) -> Tensor:
    return load_harness(folder, int8_cache=int8_cache).prefill(PROMPT, chunk=len(PROMPT))


def _row_errors(got: Tensor, want: Tensor) -> Tensor:
    """[T] the largest logit error of each row, relative to the largest logit."""
    return (got - want).abs().amax(dim=1) / want.abs().max()


@pytest.mark.parametrize("variant", W8A16, ids=str)
def test_w8a16_equals_the_dequantised_model_but_for_rounding(tmp_path: Path, variant: Variant) -> None:
    want = reference_logits(write_compressed(tmp_path, variant), PROMPT)
    assert float(_row_errors(_logits(tmp_path), want).max()) <= A16_BOUND


@pytest.mark.parametrize("variant", W8A8, ids=str)
def test_w8a8_equals_the_dequantised_model_with_rounded_inputs(tmp_path: Path, variant: Variant) -> None:
    want = reference_logits(write_compressed(tmp_path, variant), PROMPT)
    errors = _row_errors(_logits(tmp_path), want)
    assert float(errors.median()) <= EXACT_BOUND
    assert float(errors.max()) <= TIE_BOUND


@pytest.mark.parametrize("int8_cache", [False, True])
def test_w8a16_is_closer_than_w8a8(tmp_path: Path, int8_cache: bool) -> None:
    want = reference_logits(write_compressed(tmp_path / "a16", Variant()), PROMPT)
    write_compressed(tmp_path / "a8", Variant(activations="dynamic"))
    a16, a8 = (_row_errors(_logits(tmp_path / name, int8_cache=int8_cache), want).mean() for name in ("a16", "a8"))
    assert float(a16) < float(a8) / (1.2 if int8_cache else 10)  # an int8 cache's rounding is in both


def test_quantised_experts_are_read_beside_a_float_router(tmp_path: Path) -> None:
    model = make_model(family_configs()["mixtral"])
    floats, ints = save_model(model, tmp_path / "floats"), save_model(model, tmp_path / "ints")
    edit_tensors(floats, lambda tensors: _quantise_linears(tensors, keep_float=True))
    want = load_harness(floats, weight_quant="none", int8_cache=False).prefill(PROMPT, chunk=len(PROMPT))
    edit_tensors(ints, lambda tensors: _quantise_linears(tensors, keep_float=False))
    config = quantization_config(Variant(ignore=("lm_head", "re:.*block_sparse_moe.gate$")))
    edit_config(ints, lambda raw: raw.update(quantization_config=config))
    got = load_harness(ints, int8_cache=False).prefill(PROMPT, chunk=len(PROMPT))
    assert float((got - want).abs().max() / want.abs().max()) <= A16_BOUND


def _quantise_linears(tensors: dict[str, Tensor], *, keep_float: bool) -> None:
    """Attention and experts as int8, or as floats that an int8 weight can hold exactly."""
    for name in [name for name in tensors if "_proj" in name or ".experts." in name]:
        weight = quantize_per_channel(tensors[name])
        if keep_float:
            tensors[name] = dequantize(weight)
        else:
            tensors[name] = weight.q
            tensors[f"{name}_scale"] = weight.scale


def test_ignored_patterns_stay_float(tmp_path: Path) -> None:
    write_compressed(tmp_path, Variant(activations="dynamic"))
    edit_config(tmp_path, lambda raw: raw["quantization_config"].update(ignore=["re:.*"]))
    with pytest.raises(CheckpointError, match="is int8, a float type is needed"):
        load_harness(tmp_path)


@pytest.mark.parametrize(
    "spelling",
    ["{m}.{x}_scale", "{m}.{x}_proj.output_scale", "{m}.{x}_proj.{x}_scale", "{m}.{x}_cache.scale", "{m}.kv_scale"],
)
@pytest.mark.parametrize("shape", [(1,), (2, 1, 1)])
def test_static_cache_scales_are_found(tmp_path: Path, spelling: str, shape: tuple[int, ...]) -> None:
    dequantised = write_compressed(tmp_path, Variant())
    scale = torch.full(shape, 0.05)
    _add_cache_scales(tmp_path, spelling, scale)
    harness = load_harness(tmp_path)
    stored = harness.model.cache_schemes[1].k_scale
    assert stored is not None
    assert torch.equal(stored, scale.reshape(-1))
    want = reference_logits(dequantised, PROMPT)
    got = harness.prefill(PROMPT, chunk=len(PROMPT))
    assert float((got - want).abs().max() / want.abs().max()) <= 0.1


def _add_cache_scales(folder: Path, spelling: str, scale: torch.Tensor) -> None:
    names = [spelling.format(m=f"model.layers.{layer}.self_attn", x=x) for layer in range(2) for x in "kv"]
    edit_tensors(folder, lambda tensors: tensors.update({name: scale.clone() for name in names}))
    scheme = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}
    edit_config(folder, lambda raw: raw["quantization_config"].update(kv_cache_scheme=scheme))


def test_cache_scales_are_passed_over_for_a_float_cache(tmp_path: Path) -> None:
    write_compressed(tmp_path, Variant())
    _add_cache_scales(tmp_path, "{m}.{x}_scale", torch.ones(1))
    assert not load_harness(tmp_path, int8_cache=False).model.cache_schemes[0].static


def test_promised_cache_scales_must_be_there(tmp_path: Path) -> None:
    write_compressed(tmp_path, Variant())
    scheme = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}
    edit_config(tmp_path, lambda raw: raw["quantization_config"].update(kv_cache_scheme=scheme))
    with pytest.raises(CheckpointError, match=r"no cache scale model\.layers\.0\.self_attn\.k_scale"):
        load_harness(tmp_path)


def test_cache_scales_per_channel_make_it_dynamic_and_the_report_says_so(tmp_path: Path) -> None:
    write_compressed(tmp_path, Variant())
    _add_cache_scales(tmp_path, "{m}.{x}_scale", torch.ones(32))
    scheme = load_harness(tmp_path).model.cache_schemes[0]
    assert not scheme.static
    assert "per channel" in scheme.note
