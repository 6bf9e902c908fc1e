"""Calibrated static activations: made, stored as compressed-tensors has them, read back and used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from compressed_tensors.quantization import QuantizationConfig

from models.harness import load_harness
from models.tiny_checkpoints import edit_tensors, family_configs, make_model, reference_logits, write_internlm2
from octavo.models.config import load_config
from octavo.models.rope import cos_sin_table
from octavo.quantization.errors import CheckpointError
from octavo.quantization.export.layer_forward import Rows, run_layer
from octavo.quantization.export.layer_weights import expand, layer_products, read_layer
from octavo.quantization.export.recipe import Ingredients, make_layer
from octavo.quantization.export.scheme_names import parse_scheme
from octavo.quantization.export.statistics import Recorder
from octavo.quantization.formats.source import TensorSource
from octavo.quantization.smooth import search_clip
from quantize.making import HELD_TEXT, make, relative, report, tensors, with_tokenizer, write_float

# relative error of all logits against the float model; one scale for all tokens of random models is coarse
BOUNDS = {"llama2": 0.12, "qwen3": 0.1, "mixtral": 0.2, "internlm2": 0.08}


@pytest.mark.parametrize("family", BOUNDS)
def test_static_scales_are_made_read_back_and_used(tmp_path: Path, family: str) -> None:
    folder = tmp_path / "float"
    if family == "internlm2":
        model = with_tokenizer(folder, write_internlm2(folder))
    else:
        model = write_float(folder, family=family)
    made = make(folder, "--no-ablation", scheme="a8w8c8-static")
    served, exact = load_harness(made), reference_logits(model, HELD_TEXT)
    logits = served.prefill(HELD_TEXT, chunk=64)
    assert relative(logits, exact) < BOUNDS[family]
    products = {name for name in tensors(made) if name.endswith(".weight_scale")}
    stored = {name: tensor for name, tensor in tensors(made).items() if name.endswith(".input_scale")}
    assert {name.replace("input_scale", "weight_scale") for name in stored} == products
    assert all(scale.shape == (1,) and scale.item() > 0 for scale in stored.values())
    qkv = served.model.layers[0].attention.qkv.format
    assert any(qkv.static_scale == pytest.approx(scale.item()) for name, scale in stored.items() if "layers.0." in name)
    edit_tensors(made, lambda held: [held[name].mul_(40) for name in stored])  # steps 40 times as wide
    assert relative(load_harness(made).prefill(HELD_TEXT, chunk=64), exact) > 2 * relative(logits, exact)


@pytest.mark.parametrize("family", ["llama2", "qwen3"])
def test_transformers_agrees_on_static_inputs(tmp_path: Path, family: str) -> None:
    write_float(tmp_path / "float", family=family)
    made = make(tmp_path / "float", "--no-ablation", scheme="a8w8-static")
    entry = json.loads((made / "config.json").read_text())["quantization_config"]
    inputs = QuantizationConfig.model_validate(entry).config_groups["group_0"].input_activations
    assert (inputs.dynamic, inputs.strategy, inputs.symmetric) == (False, "tensor", True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32).eval()
    ours = load_harness(made, int8_cache=False).prefill(HELD_TEXT, chunk=64)
    assert relative(ours, reference_logits(theirs, HELD_TEXT)) < 0.03


def test_products_of_one_input_share_its_scale(tmp_path: Path) -> None:
    write_float(tmp_path / "float", family="mixtral")
    stored = tensors(make(tmp_path / "float", "--no-ablation", scheme="a8w8-static"))
    layer = "model.layers.0."
    attention = [stored[f"{layer}self_attn.{x}_proj.input_scale"] for x in "qkv"]
    assert attention[0].equal(attention[1])
    assert attention[0].equal(attention[2])
    experts = [
        value
        for name, value in stored.items()
        if name.startswith(layer) and name.endswith(("w1.input_scale", "w3.input_scale"))
    ]
    assert len(experts) == 8
    assert all(value.equal(experts[0]) for value in experts)


def test_an_expert_that_no_token_reached_gets_the_widest_scale(tmp_path: Path) -> None:
    write_float(tmp_path / "float", family="mixtral")
    config, source = load_config(tmp_path / "float"), TensorSource(tmp_path / "float")
    weights, seen = read_layer(source, config, 0), Recorder(config.rope.rotary_dim)
    x = torch.randn(40, config.hidden_size, generator=torch.Generator().manual_seed(0))
    run_layer(weights, x, Rows([40], cos_sin_table(config.rope, num_positions=40)), config=config, index=0, hooks=seen)
    for site in ("experts.3.mlp", "experts.3.down"):
        seen.sites.pop(site, None)
    made = make_layer(
        weights, expand(layer_products(config, 0), config), seen,
        config=config, scheme=parse_scheme("a8w8-static"), ingredients=Ingredients("all"),
    )  # fmt: skip
    scales = made.rounding.input_scales
    assert scales["experts.3.mlp"].equal(scales["experts.0.mlp"])
    assert scales["experts.3.down"] == max(scales[f"experts.{index}.down"] for index in range(3))


def test_smoothing_and_clipping_are_worth_their_rows_with_outlier_channels(tmp_path: Path) -> None:
    model = make_model(family_configs()["llama2"])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[[3, 40]] *= 30
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(layer.self_attn, name).weight[:, [3, 40]] /= 30
    write_float(tmp_path / "float", model=model)
    ablation = report(make(tmp_path / "float", scheme="a8w8-static"))["ablation"]
    assert list(ablation) == ["plain", "+ smoothing", "+ gptq", "+ clipping"]
    assert ablation["+ smoothing"]["kl"] < 0.3 * ablation["plain"]["kl"]
    assert ablation["+ clipping"]["kl"] < 0.3 * ablation["plain"]["kl"]


def test_sensitive_products_stay_float_and_need_no_scale(tmp_path: Path) -> None:
    write_float(tmp_path / "float")
    made = make(tmp_path / "float", "--no-ablation", "--keep-float", "30", scheme="a8w8-static")
    stored = tensors(made)
    assert report(made)["kept_float"]
    assert {name.removesuffix("input_scale") for name in stored if name.endswith("input_scale")} == {
        name.removesuffix("weight_scale") for name in stored if name.endswith("weight_scale")
    }
    assert load_harness(made).prefill(HELD_TEXT, chunk=64).isfinite().all()


def clip_of(sample: torch.Tensor, extremes: torch.Tensor, *, share: float) -> float:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    maxima = torch.cat((sample, extremes)).abs().amax(dim=0)
    return search_clip(sample, extremes, maxima, [(weight, weight)], share=share)


def test_rare_outliers_are_cut_and_frequent_ones_are_held() -> None:
    sample = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    outliers = sample[:4].clone()
    outliers[:, 9] = 12.0
    assert clip_of(sample, outliers, share=1e-5) < 0.6
    assert clip_of(sample, outliers, share=0.5) == 1.0
    assert clip_of(sample.sign(), sample[:4].sign(), share=0.1) == 1.0


@pytest.mark.parametrize("name", ["w8a16-static", "w8a16-g128-static", "a8w8-statics"])
def test_inputs_of_16_bits_have_no_scales_to_calibrate(name: str) -> None:
    with pytest.raises(CheckpointError, match="is not known"):
        parse_scheme(name)
