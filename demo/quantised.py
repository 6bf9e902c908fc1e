"""The 8-bit arithmetic of the finished model, simulated in float with transformers as the runner.

Weights: int8 per output channel, scale = absmax / 127.5, values in [-128, 127]. Activations: int8 per token,
scale = absmax / 127. Cache: int8 with one static scale for K and one for V in each layer. Offline only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CacheScales = dict[str, torch.Tensor]  # "k" and "v": [num_layers] float32


def quantise_activation(x: torch.Tensor) -> torch.Tensor:
    """[..., K] to the nearest values that int8 per token can hold, still float."""
    scale = x.float().abs().amax(dim=-1, keepdim=True).clamp_min(1e-8) / 127.0  # [..., 1]
    return (torch.round(x.float() / scale).clamp(-127, 127) * scale).to(x.dtype)


def quantise_static(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x to the nearest values that int8 with one fixed scale can hold, still float."""
    return torch.round(x / scale).clamp(-128, 127) * scale


def projections(model: LlamaForCausalLM) -> Iterator[tuple[str, nn.Linear]]:
    """(name, layer) of every Linear that is quantised; the head is not one of them."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in PROJECTIONS:
            yield name, module


class HookedCache(DynamicCache):
    """A cache that passes K (after rope) and V, both [rows, kv_heads, length, head_dim], through a function first."""

    def __init__(self, change: Callable[[str, int, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.change = change

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the changed K and V; attention sees the changed values."""
        key_states = self.change("k", layer_idx, key_states)
        value_states = self.change("v", layer_idx, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def quantised_cache(scales: CacheScales) -> HookedCache:
    """A cache that holds what int8 with these static scales can hold."""
    return HookedCache(lambda kind, layer, x: quantise_static(x, scales[kind][layer].to(x.dtype)))


@contextmanager
def quantised_activations(model: LlamaForCausalLM) -> Iterator[None]:
    """Within the block, the input of every quantised Linear is rounded to int8 per token."""
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs: (quantise_activation(inputs[0]),))
        for _, layer in projections(model)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def load_dequantised(folder: Path) -> tuple[LlamaForCausalLM, CacheScales]:
    """The exported model as float32 with dequantised weights, and its cache scales. Raises on unknown tensors."""
    tensors = load_file(folder / "model.safetensors")
    config = LlamaConfig.from_pretrained(folder)
    del config.quantization_config  # weights are dequantised here, not by a library
    layers = range(config.num_hidden_layers)
    scales = {
        kind: torch.cat([tensors.pop(f"model.layers.{i}.self_attn.{kind}_scale") for i in layers])
        for kind in ("k", "v")
    }
    state = {}
    for name in [name for name in tensors if not name.endswith("_scale")]:
        scale = tensors.pop(f"{name}_scale", None)
        weight = tensors.pop(name).float()
        state[name] = weight if scale is None else weight * scale
    if tensors:
        raise ValueError(f"tensors that nobody used: {sorted(tensors)}")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.float().eval(), scales
