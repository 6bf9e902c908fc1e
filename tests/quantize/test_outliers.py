"""Models made to break naive 8 bits, and what the recipe makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models.harness import load_harness
from models.tiny_checkpoints import family_configs, make_model, reference_logits
from octavo.models.config import load_config
from octavo.quantization.formats.source import TensorSource
from quantize.making import HELD_TEXT, make, relative, report, tensors, write_float

PLAIN = ("--no-smoothing", "--no-gptq", "--no-kv-smoothing", "--no-ablation")


def big_key_bias(*, size: float) -> Any:
    """A Qwen2 whose key bias dwarfs the keys in some slow rotary pairs, while its queries are small there.

    Trained models have it so: were the queries not small, the bias alone would decide every softmax.
    """
    model = make_model(family_configs()["qwen2"])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias[torch.tensor([7, 15, 22])] = torch.tensor([size, -size, 0.7 * size])
            for parameter in layer.self_attn.q_proj.parameters():
                parameter.view(4, 16, -1)[:, [6, 7, 14, 15]] *= 0.02
    return model


@pytest.mark.parametrize("scales", ["tensor", "head"])
def test_a_large_key_bias_breaks_naive_keys_and_not_ours(tmp_path: Path, scales: str) -> None:
    model = write_float(tmp_path / "float", model=big_key_bias(size=400.0))
    exact = reference_logits(model, HELD_TEXT)
    flags = ("--kv-scales", scales)
    naive = make(tmp_path / "float", *PLAIN, *flags, out="naive")
    smoothed = make(tmp_path / "float", *PLAIN[:2], PLAIN[3], *flags, out="smoothed")
    broken = relative(load_harness(naive).prefill(HELD_TEXT, chunk=64), exact)
    healed = relative(load_harness(smoothed).prefill(HELD_TEXT, chunk=64), exact)
    assert broken > 0.2
    assert healed < 0.06
    assert report(smoothed)["made"]["kl"] < 0.1 * report(naive)["made"]["kl"]
    assert tensors(smoothed)["model.layers.0.self_attn.k_scale"].numel() == (1 if scales == "tensor" else 2)


def test_the_ablation_shows_what_the_cache_costs(tmp_path: Path) -> None:
    write_float(tmp_path / "float", model=big_key_bias(size=400.0))
    naive = report(make(tmp_path / "float", "--no-smoothing", "--no-gptq", "--no-kv-smoothing"))
    assert list(naive["ablation"]) == ["plain"]
    assert naive["float_cache"]["kl"] < 0.1 * naive["made"]["kl"]


def test_moved_keys_leave_the_float_model_as_it_was(tmp_path: Path) -> None:
    write_float(tmp_path / "float", model=big_key_bias(size=400.0))
    made = tensors(make(tmp_path / "float", *PLAIN[:2], PLAIN[3]))
    before = tensors(tmp_path / "float")
    q, k = (made[f"model.layers.0.self_attn.{x}_proj.bias"].view(-1, 16) for x in "qk")
    q0, k0 = (before[f"model.layers.0.self_attn.{x}_proj.bias"].view(-1, 16) for x in "qk")
    products, wanted = q * k.repeat_interleave(2, 0), q0 * k0.repeat_interleave(2, 0)
    assert not torch.equal(k, k0)
    assert torch.equal(products, wanted)  # factors are powers of two: nothing is rounded


def test_smoothing_helps_a_model_with_outlier_channels(tmp_path: Path) -> None:
    model = make_model(family_configs()["llama2"])
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[[3, 40]] *= 60
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(layer.self_attn, name).weight[:, [3, 40]] /= 60
            for name in ("gate_proj", "up_proj"):
                getattr(layer.mlp, name).weight[:, [3, 40]] /= 60
    write_float(tmp_path / "float", model=model)
    ablation = report(make(tmp_path / "float", scheme="a8w8"))["ablation"]
    assert ablation["+ smoothing"]["kl"] < 0.2 * ablation["plain"]["kl"]


def test_the_most_sensitive_products_stay_float_within_the_budget(tmp_path: Path) -> None:
    write_float(tmp_path / "float")
    made = make(tmp_path / "float", "--keep-float", "30")
    kept = report(made)["kept_float"]
    stored = tensors(made)
    linears = {name: tensor for name, tensor in stored.items() if "_proj.weight" in name and "scale" not in name}
    floats = sum(tensor.numel() for tensor in linears.values() if tensor.is_floating_point())
    assert kept
    assert 0 < floats <= 0.3 * sum(tensor.numel() for tensor in linears.values())
    assert load_harness(made).prefill(HELD_TEXT, chunk=64).isfinite().all()
    plain = make(tmp_path / "float", out="plain")
    assert report(made)["made"]["kl"] < report(plain)["made"]["kl"]


def test_nothing_is_left_over_in_the_folder(tmp_path: Path) -> None:
    write_float(tmp_path / "float", family="qwen2_moe")
    made = make(tmp_path / "float", "--no-ablation")
    config, source = load_config(made), TensorSource(made)
    assert not (tmp_path / "made.partial").exists()
    assert all("experts" not in name or not name.endswith("bias") for name in source.names())
    assert config.quantization is not None
    load_harness(made)  # refuses tensors that nothing uses
