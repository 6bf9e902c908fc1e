"""Checkpoints of the other formats, of a tiny model, and the dequantised model beside each.

Compressed-tensors' fp8 is made by its own library; the rest by writers from each format's layout.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from torch import Tensor

from models.tiny_checkpoints import VOCAB, edit_config, family_configs, make_model, save_model

FP8_MAX = 448.0
# a Linear's name, weight [N, K] and input maximum → (its tensors by suffix, the weight that they mean)
Writer = Callable[[str, Tensor, float], tuple[dict[str, Tensor], Tensor]]


def write_model(
    folder: Path,
    writer: Writer,
    quantization: dict[str, Any] | None,
    *,
    family: str = "llama2",
    rounding: Callable[[Tensor, float], Tensor] | None = None,
    edit: Callable[[Any], None] | None = None,
) -> Any:
    """Write every Linear but the head with `writer`; returns the dequantised model, whose inputs go through `rounding`
    (x, the largest input seen).
    """
    model = make_model(family_configs()[family])
    if edit is not None:
        edit(model)
    save_model(model, folder)
    tensors, dequantised = dict(model.state_dict()), copy.deepcopy(model)
    maxima = input_maxima(model)
    for name, module in linears(model):
        del tensors[f"{name}.weight"]
        stored, meant = writer(name, module.weight.detach(), maxima[name])
        tensors.update({f"{name}.{suffix}": tensor for suffix, tensor in stored.items()})
        target = dequantised.get_submodule(name)
        target.weight.data = meant
        if rounding is not None:
            target.register_forward_pre_hook(_hook(rounding, maxima[name]))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    if quantization is not None:
        edit_config(folder, lambda raw: raw.update(quantization_config=quantization))
    return dequantised


def _hook(rounding: Callable[[Tensor, float], Tensor], largest: float) -> Any:
    return lambda _module, inputs: (rounding(inputs[0], largest),)


def linears(model: Any) -> list[tuple[str, Any]]:
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return [(name, module) for name, module in found if name != "lm_head"]


def input_maxima(model: Any) -> dict[str, float]:
    """The largest absolute input of each Linear over some random text."""
    maxima: dict[str, float] = {}
    handles = [module.register_forward_hook(_note(maxima, name)) for name, module in linears(model)]
    with torch.inference_mode():
        model(torch.randint(3, VOCAB, (4, 200), generator=torch.Generator().manual_seed(77)))
    for handle in handles:
        handle.remove()
    return maxima


def _note(maxima: dict[str, float], name: str) -> Any:
    def hook(_module: Any, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        maxima[name] = float(inputs[0].abs().max())

    return hook


def round_per_token(x: Tensor, _largest: float) -> Tensor:
    """8 bits, a scale per row."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def round_static(x: Tensor, largest: float) -> Tensor:
    """8 bits, the scale of a maximum."""
    scale = largest / 127
    return (x / scale).round().clamp(-128, 127) * scale


# ---- smooth_quant

SMOOTH_QUANT = {"quant_method": "smooth_quant", "quant_dtype": "int8"}


def smooth_quant_linear(_name: str, weight: Tensor, _largest: float) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    q = (weight / scale).round().clamp(-128, 127)
    return {"weight": q.to(torch.int8), "scale": scale}, q * scale


# ---- fp8


def fp8_config(scheme: str) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": scheme, "ignored_layers": ["lm_head"]}


def fp8_linear(*, per_row: bool, static: bool, scale_shape: tuple[int, ...] = (1,)) -> Writer:
    def write(_name: str, weight: Tensor, largest: float) -> tuple[dict[str, Tensor], Tensor]:
        absmax = weight.abs().amax(1, keepdim=True) if per_row else weight.abs().max().reshape(1, 1)
        scale = absmax / FP8_MAX  # [N, 1] or [1, 1]
        stored = (weight / scale).to(torch.float8_e4m3fn)
        tensors = {"weight": stored, "weight_scale": scale if per_row else scale.reshape(scale_shape)}
        if static:
            tensors["input_scale"] = torch.tensor(largest / FP8_MAX).reshape(scale_shape)
        return tensors, stored.float() * scale

    return write


def write_compressed_fp8(
    folder: Path, *, strategy: str, activations: str, rounding: Callable[[Tensor, float], Tensor] | None = None
) -> Any:
    """float-quantized by the format's own library."""
    weights = QuantizationArgs(type="float", strategy=strategy, symmetric=True)
    inputs = QuantizationArgs(
        type="float", strategy="token" if activations == "dynamic" else "tensor", dynamic=activations == "dynamic"
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)

    def write(_name: str, weight: Tensor, largest: float) -> tuple[dict[str, Tensor], Tensor]:
        rows = weight if strategy == "channel" else weight.reshape(1, -1)
        scale, _ = calculate_qparams(rows.amin(1, keepdim=True), rows.amax(1, keepdim=True), weights)
        scale = scale if strategy == "channel" else scale.reshape(1)
        packed = FloatQuantizationCompressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        meant = FloatQuantizationCompressor.decompress(packed, scheme)["weight"].float()
        extra = {"input_scale": torch.tensor([largest / FP8_MAX])} if activations == "static" else {}
        return {**packed, **extra}, meant

    group = {
        "targets": ["Linear"],
        "weights": weights.model_dump(mode="json"),
        "input_activations": inputs.model_dump(mode="json"),
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    return write_model(folder, write, config, rounding=rounding)


# ---- GPTQ


def gptq_config(*, group_size: int, desc_act: bool = False, version: int = 1) -> dict[str, Any]:
    form = {1: "gptq", 2: "gptq_v2"}[version]
    return {
        "quant_method": "gptq",
        "bits": 8,
        "group_size": group_size,
        "desc_act": desc_act,
        "checkpoint_format": form,
    }


def gptq_linear(
    *, group_size: int, symmetric: bool = True, act_order: bool = False, version: int = 1, g_idx: bool = True
) -> Writer:
    """Round to nearest in GPTQ's layout; act-order deals the columns to groups in a random order."""

    def write(_name: str, weight: Tensor, _largest: float) -> tuple[dict[str, Tensor], Tensor]:
        columns = weight.shape[1]
        size = columns if group_size == -1 else group_size
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(5)) if act_order else None
        group_of = torch.empty(columns, dtype=torch.int64)
        group_of[torch.arange(columns) if order is None else order] = torch.arange(columns) // size
        scale, zero = _gptq_parameters(weight, group_of, symmetric=symmetric)  # [N, G]
        q = ((weight / scale[:, group_of]).round() + zero[:, group_of]).clamp(0, 255)
        tensors = {
            "qweight": _pack_words(q.T.to(torch.int64), dim=0),
            "qzeros": _pack_words((zero.T.to(torch.int64) - (1 if version == 1 else 0)) % 256, dim=1),
            "scales": scale.T.half(),
        }
        if g_idx:
            tensors["g_idx"] = group_of.to(torch.int32)
        return tensors, (q - zero[:, group_of]) * scale[:, group_of]

    return write


def _gptq_parameters(weight: Tensor, group_of: Tensor, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales that float16 holds and zero points, [N, G] each."""
    groups = [weight[:, group_of == group] for group in range(int(group_of.max()) + 1)]
    low = torch.stack([group.amin(1).clamp(max=0) for group in groups], 1)
    high = torch.stack([group.amax(1).clamp(min=0) for group in groups], 1)
    if symmetric:
        scale = (2 * torch.maximum(-low, high) / 255).half().float()
        return scale, torch.full_like(scale, 128)
    scale = ((high - low) / 255).half().float()
    return scale, (-low / scale).round().clamp(0, 255)


def _pack_words(values: Tensor, *, dim: int) -> Tensor:
    """Four neighbours along `dim` as the bytes of an int32, the first lowest."""
    parts = values.unflatten(dim, (-1, 4)).unbind(dim + 1)
    words = sum(part << (8 * index) for index, part in enumerate(parts))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


# ---- the push-mode server's own A8W8C8


def write_absmax(folder: Path, *, store_int8: bool, fused: bool = False, per_head: bool = True) -> Any:
    """Weights in safetensors, maxima in three JSON files. Cache maxima per query head, or one per tensor."""
    weights: dict[str, Any] = {}
    inputs: dict[str, Any] = {}

    def write(name: str, weight: Tensor, largest: float) -> tuple[dict[str, Tensor], Tensor]:
        absmax = weight.abs().amax(1)
        key = name.replace("model.", "llama.")
        weights[f"{key}.weight_quanter"], inputs[f"{key}.activation_quanter"] = absmax.tolist(), largest
        scale = absmax[:, None] / 127
        q = (weight / scale).round()
        return {"weight": q.to(torch.int8) if store_int8 else weight}, q * scale

    dequantised = write_model(folder, write, None, rounding=round_static)
    if fused:
        weights, inputs = _fuse(weights), _fuse(inputs)
    (folder / "act_scales.json").write_text(json.dumps(inputs))
    (folder / "weight_scales.json").write_text(json.dumps(weights))
    cache = _cache_maxima(dequantised, per_head=per_head)
    (folder / "cachekv_scales.json").write_text(json.dumps(cache))
    return dequantised


def _cache_maxima(model: Any, *, per_head: bool) -> dict[str, Any]:
    """Of keys and values over some random text, repeated for the query heads as that tool's attention does."""
    tokens = torch.randint(3, VOCAB, (4, 200), generator=torch.Generator().manual_seed(78))
    with torch.inference_mode():
        layers = model(tokens, use_cache=True).past_key_values.layers
    found: dict[str, Any] = {}
    for index, layer in enumerate(layers):
        for x, values in (("k", layer.keys), ("v", layer.values)):  # [B, num_kv_heads, T, head_dim]
            maxima = values.abs().amax((0, 2, 3)).repeat_interleave(2)  # [num_heads]
            name = f"llama.layers.{index}.self_attn.cache{x}_matmul.activation_quanter"
            found[name] = maxima.tolist() if per_head else float(maxima.max())
    return found


class RoundedCache(transformers.DynamicCache):
    """A cache that rounds keys and values to 8 bits with static scales, per layer (k, v): [1] or [num_kv_heads]."""

    def __init__(self, scales: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._scales = scales

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
        k, v = (scale.reshape(1, -1, 1, 1) for scale in self._scales[layer_idx])
        rounded = [(x / scale).round().clamp(-128, 127) * scale for x, scale in ((keys, k), (values, v))]
        return super().update(*rounded, layer_idx, *rest, **named)


def logits_with_rounded_cache(model: Any, token_ids: list[int], scales: list[tuple[Tensor, Tensor]]) -> Tensor:
    """[T, V] by transformers."""
    with torch.inference_mode():
        cache = RoundedCache(scales)
        return model(torch.tensor([token_ids]), past_key_values=cache, use_cache=True).logits[0].float()


def _fuse(values: dict[str, Any]) -> dict[str, Any]:
    """q, k, v and gate, up under one name: lists joined, one of equal numbers."""
    fused: dict[str, Any] = {}
    for key, value in values.items():
        name = key
        for part in ("q_proj", "k_proj", "v_proj"):
            name = name.replace(f".{part}.", ".qkv_proj.")
        for part in ("gate_proj", "up_proj"):
            name = name.replace(f".{part}.", ".gate_up_fused_proj.")
        fused[name] = fused[name] + value if name in fused and isinstance(value, list) else value
    return fused
