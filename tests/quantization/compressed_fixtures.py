"""Compressed-tensors checkpoints of a tiny Llama, made with the format's own library, and the dequantised model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from torch import Tensor

from models.tiny_checkpoints import VOCAB, edit_config, family_configs, make_model, save_model

COMPRESSORS = {"int-quantized": IntQuantizationCompressor, "pack-quantized": PackedQuantizationCompressor}


@dataclass(frozen=True)
class Variant:
    """One way to quantise: weights' strategy, activations (None: 16 bit)."""

    strategy: str = "channel"
    symmetric: bool = True
    activations: str | None = None  # None, dynamic, static, static_asymmetric
    format: str = "int-quantized"
    group_size: int | None = None
    ignore: tuple[str, ...] = ("lm_head",)

    def weights(self) -> QuantizationArgs:
        return QuantizationArgs(strategy=self.strategy, symmetric=self.symmetric, group_size=self.group_size)

    def inputs(self) -> QuantizationArgs | None:
        if self.activations is None:
            return None
        if self.activations == "dynamic":
            return QuantizationArgs(strategy="token", dynamic=True)
        return QuantizationArgs(strategy="tensor", symmetric=self.activations == "static")


def write_compressed(folder: Path, variant: Variant, *, family: str = "llama2") -> Any:
    """Write the checkpoint; returns the model with dequantised weights, its inputs rounded if they are 8 bits."""
    model = make_model(family_configs()[family])
    save_model(model, folder)
    tensors, dequantised = _compress(model, variant)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    edit_config(folder, lambda raw: raw.update(quantization_config=quantization_config(variant)))
    return dequantised


def quantization_config(variant: Variant) -> dict[str, Any]:
    inputs = variant.inputs()
    group = {
        "targets": ["Linear"],
        "weights": variant.weights().model_dump(mode="json"),
        "input_activations": inputs.model_dump(mode="json") if inputs else None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": variant.format,
        "config_groups": {"group_0": group},
        "ignore": list(variant.ignore),
        "kv_cache_scheme": None,
    }


def _compress(model: Any, variant: Variant) -> tuple[dict[str, Tensor], Any]:
    scheme = QuantizationScheme(targets=["Linear"], weights=variant.weights(), input_activations=variant.inputs())
    compressor = COMPRESSORS[variant.format]
    tensors, dequantised = dict(model.state_dict()), copy.deepcopy(model)
    extremes = _input_extremes(model)
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        packed = compressor.compress(with_scales(module.weight.detach(), variant), scheme)
        dequantised.get_submodule(name).weight.data = compressor.decompress(packed, scheme)["weight"].float()
        del tensors[f"{name}.weight"]
        tensors.update({f"{name}.{key}": value for key, value in packed.items()})
        scales = _input_scales(name, extremes[name], variant)
        tensors.update(scales)
        if variant.activations is not None:
            dequantised.get_submodule(name).register_forward_pre_hook(_rounding(list(scales.values())))
    return tensors, dequantised


def _rounding(scales: list[Tensor]) -> Any:
    """A hook that rounds a Linear's input to 8 bits: with a static scale (and zero point), or with one per row."""

    def hook(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        (x,) = inputs
        scale = scales[0] if scales else x.abs().amax(-1, keepdim=True) / 127
        zero_point = scales[1].float() if len(scales) > 1 else torch.zeros(1)
        return (((x / scale).round().add(zero_point).clamp(-128, 127) - zero_point) * scale,)

    return hook


def with_scales(weight: Tensor, variant: Variant) -> dict[str, Tensor]:
    grouped = {
        "tensor": weight.reshape(1, 1, -1),
        "channel": weight[:, None, :],
        "group": weight.unflatten(1, (-1, variant.group_size or weight.shape[1])),
    }[variant.strategy]
    scale, zero_point = calculate_qparams(grouped.amin(-1), grouped.amax(-1), variant.weights())
    if variant.strategy == "tensor":
        scale, zero_point = scale.reshape(1), zero_point.reshape(1)
    return {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point.to(torch.int8)}


def _input_extremes(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Least and largest input of each Linear over some random text."""
    extremes: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str) -> Any:
        def hook(_module: Any, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            extremes[name] = (inputs[0].amin(), inputs[0].amax())

        return hook

    handles = [
        module.register_forward_hook(note(name))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.inference_mode():
        model(torch.randint(3, VOCAB, (4, 200), generator=torch.Generator().manual_seed(77)))
    for handle in handles:
        handle.remove()
    return extremes


def _input_scales(name: str, extremes: tuple[Tensor, Tensor], variant: Variant) -> dict[str, Tensor]:
    args = variant.inputs()
    if args is None or args.dynamic:
        return {}
    scale, zero_point = calculate_qparams(*extremes, args)
    found = {f"{name}.input_scale": scale.clone()}
    if not args.symmetric:
        found[f"{name}.input_zero_point"] = zero_point.to(torch.int8)
    return found
