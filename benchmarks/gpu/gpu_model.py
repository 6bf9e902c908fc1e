"""A random int8 checkpoint of a Llama-3-8B shape, made on the device and written once, so that it loads as any other.

compressed-tensors, one scale per output, bell-shaped weights: real data, which runs slower than zeros would.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """A Llama."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of int8 that a decode step reads: the products of all layers, and the head."""
        layer = sum(outputs * inputs for outputs, inputs in linears(self).values())
        return self.layers * layer + self.vocab * self.hidden


LLAMA_8B = Shape(4096, 32, 32, 8, 128, 14336, 128256)
TINY = Shape(512, 2, 8, 2, 64, 1280, 1024)
TOY = Shape(64, 2, 4, 2, 16, 96, 600)  # for dry runs


def make_model(folder: Path, shape: Shape, *, scheme: str = "w8a8", device: str = "cuda", seed: int = 0) -> Path:
    """Write one file a layer unless the folder is complete. scheme: w8a8 or w8a16."""
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator(device).manual_seed(seed)
        places: dict[str, str] = {}
        for name, tensors in _files(shape, generator, torch.device(device)):
            save_file({key: tensor.cpu() for key, tensor in tensors.items()}, folder / name)
            places |= dict.fromkeys(tensors, name)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps(_config(shape, scheme), indent=1))
    return folder


def _files(shape: Shape, generator: torch.Generator, device: torch.device) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Names and tensors of all files, one after the other."""
    norm = torch.ones(shape.hidden, dtype=torch.bfloat16)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        tensors = {f"{prefix}{part}_layernorm.weight": norm.clone() for part in ("input", "post_attention")}
        for name, (outputs, inputs) in linears(shape).items():
            tensors |= _int8(f"{prefix}{name}", outputs, inputs, generator, device)
        yield f"layer-{layer:03}.safetensors", tensors
    table = torch.randn(shape.vocab, shape.hidden, generator=generator, device=device) * 0.02
    rest = {"model.norm.weight": norm, "model.embed_tokens.weight": table.to(torch.bfloat16)}
    yield "rest.safetensors", rest | _int8("lm_head", shape.vocab, shape.hidden, generator, device)


def linears(shape: Shape) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a layer's products."""
    width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "self_attn.q_proj": (width, shape.hidden),
        "self_attn.k_proj": (kv_width, shape.hidden),
        "self_attn.v_proj": (kv_width, shape.hidden),
        "self_attn.o_proj": (shape.hidden, width),
        "mlp.gate_proj": (shape.intermediate, shape.hidden),
        "mlp.up_proj": (shape.intermediate, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.intermediate),
    }


def _int8(name: str, outputs: int, inputs: int, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    noise = torch.randn(outputs, inputs, generator=generator, device=device) * 32
    weight = noise.round().clamp(-127, 127).to(torch.int8)
    scale = torch.full((outputs, 1), 0.02 / 32 * (4096 / inputs) ** 0.5, dtype=torch.bfloat16)
    return {f"{name}.weight": weight, f"{name}.weight_scale": scale}


def _config(shape: Shape, scheme: str) -> dict[str, object]:
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs if scheme == "w8a8" else None}
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "vocab_size": shape.vocab, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "bfloat16", "bos_token_id": 1,
        "eos_token_id": 2,
        "quantization_config": {
            "quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": group},
            "ignore": [], "kv_cache_scheme": None,
        },
    }  # fmt: skip
