"""Every other format: logits against the dequantised model, cache scales, losses, what is not used.

Bounds, relative to the largest logit: two-limb inputs 1e-3; 8-bit inputs float32 rounding but for rows with a tie.
Weights written anew (fp8, act-order): 1e-3 against the model with int8 weights per channel, which is what is served,
and against the one that the checkpoint means what that rounding costs a tiny model: 0.03 on average, 0.1 at most.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
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
from quantization.format_fixtures import (
    SMOOTH_QUANT,
    Writer,
    fp8_config,
    fp8_linear,
    gptq_config,
    gptq_linear,
    linears,
    logits_with_rounded_cache,
    round_per_token,
    smooth_quant_linear,
    write_absmax,
    write_compressed_fp8,
    write_model,
)
from quantization.loading import load_report

PROMPT = torch.randint(3, VOCAB, (90,), generator=torch.Generator().manual_seed(3)).tolist()
A16_BOUND, EXACT_BOUND, TIE_BOUND, CONVERTED_MEAN, CONVERTED_MAX = 1e-3, 1e-5, 0.05, 0.03, 0.1


def _errors(folder: Path, model: Any, *, int8_cache: bool = False) -> Tensor:
    """[T] the largest logit error of each row, relative to the largest logit."""
    want = reference_logits(model, PROMPT)
    got = load_harness(folder, int8_cache=int8_cache).prefill(PROMPT, chunk=len(PROMPT))
    return (got - want).abs().amax(dim=1) / want.abs().max()


def _assert_a8(errors: Tensor) -> None:
    assert float(errors.median()) <= EXACT_BOUND
    assert float(errors.max()) <= TIE_BOUND


def _assert_static_cache(folder: Path, model: Any) -> None:
    """The same as a float attention over keys and values rounded with the stored scales: exact for the first token,
    later ones see the rounding of earlier ones turn ties.
    """
    harness = load_harness(folder)
    scales = [(scheme.k_scale, scheme.v_scale) for scheme in harness.model.cache_schemes]
    want = logits_with_rounded_cache(model, PROMPT, scales)  # type: ignore[arg-type]
    errors = (harness.prefill(PROMPT, chunk=len(PROMPT)) - want).abs().amax(dim=1) / want.abs().max()
    assert float(errors[0]) <= EXACT_BOUND
    assert float(errors.max()) <= TIE_BOUND


def _assert_converted(errors: Tensor) -> None:
    assert float(errors.mean()) <= CONVERTED_MEAN
    assert float(errors.max()) <= CONVERTED_MAX


def _requantised(model: Any) -> Any:
    """The model with its weights written as int8 per channel."""
    for _, module in linears(model):
        module.weight.data = dequantize(quantize_per_channel(module.weight.data))
    return model


@pytest.mark.parametrize("family", ["llama2", "qwen2"])
def test_smooth_quant_is_int8_weights_and_int8_tokens(tmp_path: Path, family: str) -> None:
    model = write_model(tmp_path, smooth_quant_linear, SMOOTH_QUANT, family=family, rounding=round_per_token)
    _assert_a8(_errors(tmp_path, model))


def test_smooth_quant_of_fp8_is_converted(tmp_path: Path) -> None:
    def write(name: str, weight: Tensor, largest: float) -> tuple[dict[str, Tensor], Tensor]:
        tensors, meant = fp8_linear(per_row=True, static=False)(name, weight, largest)
        return {"weight": tensors["weight"], "scale": tensors["weight_scale"]}, meant

    model = write_model(tmp_path, write, {**SMOOTH_QUANT, "quant_dtype": "float8_e4m3fn"})
    _assert_converted(_errors(tmp_path, model))


FP8 = {
    "static per tensor": ("static", fp8_linear(per_row=False, static=True)),
    "static per tensor, scalars": ("static", fp8_linear(per_row=False, static=True, scale_shape=())),
    "dynamic per row": ("dynamic", fp8_linear(per_row=True, static=False)),
    "static per row": ("static", fp8_linear(per_row=True, static=True)),
}


@pytest.mark.parametrize("case", FP8)
def test_fp8_is_converted_with_its_loss_stated(tmp_path: Path, case: str) -> None:
    scheme, writer = FP8[case]
    model = write_model(tmp_path, writer, fp8_config(scheme))
    _assert_converted(_errors(tmp_path, model))
    weights = {name: module.weight.data.clone() for name, module in linears(model)}
    assert float(_errors(tmp_path, _requantised(model)).max()) <= A16_BOUND
    report = load_report(tmp_path)
    for product in report.products:
        if product.name == "lm_head":
            assert product.loss is None
            continue
        w = weights[product.name]
        lost = (dequantize(quantize_per_channel(w)) - w).norm() / w.norm()
        assert product.loss == pytest.approx(float(lost), rel=1e-3)
        assert 0 < product.loss < 0.02
        assert ("input scale is not used" in product.note) == (scheme == "static")


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_compressed_tensors_fp8_is_converted(tmp_path: Path, strategy: str, activations: str) -> None:
    model = write_compressed_fp8(tmp_path, strategy=strategy, activations=activations)
    _assert_converted(_errors(tmp_path, model))
    assert float(_errors(tmp_path, _requantised(model)).max()) <= A16_BOUND


@pytest.mark.parametrize("ignored", ["model.layers.0.self_attn", "re:.*layers\\.0\\.self_attn.*", "self_attn.q_proj"])
def test_ignored_modules_stay_float_by_name_parent_or_pattern(tmp_path: Path, ignored: str) -> None:
    writer = fp8_linear(per_row=True, static=False)
    float_name = "model.layers.0.self_attn.q_proj"

    def write(name: str, weight: Tensor, largest: float) -> tuple[dict[str, Tensor], Tensor]:
        skip = name.endswith("q_proj") if ignored == "self_attn.q_proj" else "layers.0.self_attn" in name
        return ({"weight": weight}, weight) if skip else writer(name, weight, largest)

    config = {**fp8_config("dynamic"), "ignored_layers": ["lm_head", ignored]}
    model = write_model(tmp_path, write, config)
    _assert_converted(_errors(tmp_path, model))
    schemes = {product.name: product.weight for product in load_report(tmp_path).products}
    assert schemes[float_name] == "float32"
    assert schemes["model.layers.1.mlp.up_proj"] == "int8 per channel"


@pytest.mark.parametrize("spelling", ["{m}.{x}_scale", "{m}.{x}_proj.{x}_scale", "{m}.kv_scale", "{m}.{x}_cache.scale"])
def test_fp8_cache_scales_are_not_int8_scales(tmp_path: Path, spelling: str) -> None:
    write_model(tmp_path, fp8_linear(per_row=False, static=False), fp8_config("dynamic"))
    names = {spelling.format(m=f"model.layers.{layer}.self_attn", x=x) for layer in range(2) for x in "kv"}
    edit_tensors(tmp_path, lambda tensors: tensors.update({name: torch.ones(1) for name in names}))
    report = load_report(tmp_path)
    assert [cache.scheme for cache in report.caches] == ["int8 dynamic"] * 2
    assert "fp8 cache scales are not used" in report.summary()


GPTQ: dict[str, tuple[Writer, dict[str, Any]]] = {
    "groups": (gptq_linear(group_size=32), gptq_config(group_size=32)),
    "asymmetric": (gptq_linear(group_size=32, symmetric=False), gptq_config(group_size=32)),
    "version 2": (gptq_linear(group_size=32, symmetric=False, version=2), gptq_config(group_size=32, version=2)),
    "one group": (gptq_linear(group_size=-1, symmetric=False), gptq_config(group_size=-1)),
    "no g_idx": (gptq_linear(group_size=16, g_idx=False), gptq_config(group_size=16)),
    "one group, act-order": (gptq_linear(group_size=-1, act_order=True), gptq_config(group_size=-1, desc_act=True)),
}


@pytest.mark.parametrize("case", GPTQ)
def test_gptq_groups_are_kept_as_they_are(tmp_path: Path, case: str) -> None:
    writer, config = GPTQ[case]
    model = write_model(tmp_path, writer, config)
    assert float(_errors(tmp_path, model).max()) <= A16_BOUND
    assert all(product.loss is None for product in load_report(tmp_path).products)


def test_gptq_with_act_order_is_written_anew_per_channel(tmp_path: Path) -> None:
    config = gptq_config(group_size=32, desc_act=True)
    model = write_model(tmp_path, gptq_linear(group_size=32, symmetric=False, act_order=True), config)
    _assert_converted(_errors(tmp_path, model))
    assert float(_errors(tmp_path, _requantised(model)).max()) <= A16_BOUND
    report = load_report(tmp_path)
    assert all(0 < (product.loss or 0) < 0.02 for product in report.products if product.name != "lm_head")
    assert "act-order" in report.summary()


def test_gptq_in_its_old_folder_layout(tmp_path: Path) -> None:
    """The configuration in quantize_config.json, one file of another name, biases of zeros that the model lacks."""
    model = write_model(tmp_path, gptq_linear(group_size=32), None)
    config = {"bits": 8, "group_size": 32, "desc_act": False, "sym": True}
    (tmp_path / "quantize_config.json").write_text(json.dumps(config))
    zeros = {f"{name}.bias": torch.zeros(module.out_features) for name, module in linears(model)}
    edit_tensors(tmp_path, lambda tensors: tensors.update(zeros))
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-8bit-32g.safetensors")
    assert float(_errors(tmp_path, model).max()) <= A16_BOUND


@pytest.mark.parametrize("store_int8", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_absmax_files_give_static_activations(tmp_path: Path, store_int8: bool, fused: bool) -> None:
    model = write_absmax(tmp_path, store_int8=store_int8, fused=fused)
    _assert_a8(_errors(tmp_path, model))
    report = load_report(tmp_path)
    assert {product.activation for product in report.products if product.name != "lm_head"} == {"int8 static"}


@pytest.mark.parametrize("per_head", [True, False])
def test_absmax_cache_scales_are_maxima_of_query_heads(tmp_path: Path, per_head: bool) -> None:
    model = write_absmax(tmp_path, store_int8=True, per_head=per_head)
    raw = json.loads((tmp_path / "cachekv_scales.json").read_text())
    maxima = torch.tensor(raw["llama.layers.1.self_attn.cachev_matmul.activation_quanter"])
    scheme = load_harness(tmp_path).model.cache_schemes[1]
    assert scheme.v_scale is not None
    # query heads 0, 1 share the first K/V head, 2, 3 the second
    assert torch.equal(scheme.v_scale, (maxima[::2] if per_head else maxima.reshape(1)) / 127)
    _assert_static_cache(tmp_path, model)


def test_absmax_numbers_that_nobody_uses_are_an_error(tmp_path: Path) -> None:
    write_absmax(tmp_path, store_int8=True)
    path = tmp_path / "act_scales.json"
    raw = {**json.loads(path.read_text()), "llama.layers.7.self_attn.q_proj.activation_quanter": 1.0}
    path.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"act_scales\.json:layers\.7\.self_attn\.q_proj\.activation_quanter"):
        load_harness(tmp_path)


def test_cache_scales_in_a_file_of_their_own(tmp_path: Path) -> None:
    model = write_model(tmp_path, smooth_quant_linear, SMOOTH_QUANT, rounding=round_per_token)
    names = [f"model.layers.{layer}.self_attn.{x}_cache.scale" for layer in range(2) for x in "kv"]
    save_file({name: torch.tensor([0.05, 0.06]) for name in names}, tmp_path / "kv_cache_scales.safetensors")
    _assert_static_cache(tmp_path, model)
    assert [cache.scheme for cache in load_report(tmp_path).caches] == ["int8 static per head"] * 2


def test_formats_serve_experts(tmp_path: Path) -> None:
    """Separate experts in fp8 beside a float router that no list names."""
    floats, quantised = tmp_path / "floats", tmp_path / "fp8"
    for folder, keep in ((floats, True), (quantised, False)):
        experts_in_fp8(folder, keep_float=keep)
    edit_config(quantised, lambda raw: raw.update(quantization_config=fp8_config("dynamic")))
    want = load_harness(floats, weight_quant="wint8", int8_cache=False).prefill(PROMPT, chunk=90)
    got = load_harness(quantised, int8_cache=False).prefill(PROMPT, chunk=90)
    assert torch.equal(got, want)  # both write the same values as int8


def experts_in_fp8(folder: Path, *, keep_float: bool) -> None:
    """A tiny Mixtral whose products but router and head are fp8, or the float numbers that those mean."""
    save_model(make_model(family_configs()["mixtral"]), folder)
    writer = fp8_linear(per_row=True, static=False)
    edit_tensors(folder, lambda tensors: _experts_as_fp8(tensors, writer, keep_float=keep_float))


def _experts_as_fp8(tensors: dict[str, Tensor], writer: Writer, *, keep_float: bool) -> None:
    for name in [name for name in tensors if "_proj" in name or ".experts." in name]:
        stored, meant = writer(name, tensors[name], 1.0)
        if keep_float:
            tensors[name] = meant
        else:
            tensors[name] = stored["weight"]
            tensors[name.replace(".weight", ".weight_scale")] = stored["weight_scale"]
