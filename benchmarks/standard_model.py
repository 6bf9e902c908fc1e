"""The standard 1B model of the CPU benchmarks: a Llama of random weights by a seed, int8, about 1.2 GB on disk."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCAB = 2048, 16, 32, 8, 64, 8192, 32000
# int8 operations of one token in all products, and the bytes of weights that a step reads
WEIGHTS = LAYERS * HIDDEN * (HEADS * HEAD_DIM * 2 + KV_HEADS * HEAD_DIM * 2 + 3 * INTERMEDIATE)
HEAD_WEIGHTS = HIDDEN * VOCAB
CACHE_BYTES = LAYERS * KV_HEADS * 2 * (HEAD_DIM + 4)  # of one token: K, V, and their scales


def linears() -> dict[str, tuple[int, int]]:
    """Shapes [N, K] of every product of the standard model, the head included."""
    shapes = {}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, size in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            shapes[f"{prefix}self_attn.{name}_proj"] = (size * HEAD_DIM, HIDDEN)
        shapes[f"{prefix}self_attn.o_proj"] = (HIDDEN, HEADS * HEAD_DIM)
        shapes[f"{prefix}mlp.gate_proj"] = shapes[f"{prefix}mlp.up_proj"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{prefix}mlp.down_proj"] = (HIDDEN, INTERMEDIATE)
    shapes["lm_head"] = (VOCAB, HIDDEN)
    return shapes


def make_model(folder: Path) -> None:
    """Write the int8 checkpoint (compressed-tensors, one scale per output) unless it is there."""
    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(20261121)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in linears().items():
        noise = torch.randint(-7, 8, (4, *shape), generator=generator, dtype=torch.int8)  # their sum is bell-shaped
        tensors[f"{name}.weight"] = noise.sum(dim=0, dtype=torch.int8) * 4
        tensors[f"{name}.weight_scale"] = torch.full((shape[0], 1), 0.02 / 35, dtype=torch.bfloat16)
    table = torch.randn(VOCAB, HIDDEN, generator=generator) * 0.02
    tensors["model.embed_tokens.weight"] = table.to(torch.bfloat16)
    for name in [f"layers.{i}.{part}_layernorm" for i in range(LAYERS) for part in ("input", "post_attention")]:
        tensors[f"model.{name}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    for scheme in ("w8a16", "w8a8"):
        (folder / f"{scheme}.json").write_text(json.dumps(model_config(scheme), indent=1))
    (folder / "config.json").write_text(json.dumps(model_config("w8a8"), indent=1))


def make_float_model(folder: Path, *, num_layers: int = LAYERS) -> None:
    """Write a bfloat16 checkpoint of the same shape, about 2.3 GB, with a tokenizer of the words t0, t1, …, once."""
    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(20261128)
    shapes = {name: shape for name, shape in linears().items() if _layer(name) < num_layers}
    shapes["model.embed_tokens"] = (VOCAB, HIDDEN)
    tensors = {f"{name}.weight": _noise(shape, generator) for name, shape in shapes.items()}
    for name in [f"layers.{i}.{part}_layernorm" for i in range(num_layers) for part in ("input", "post_attention")]:
        tensors[f"model.{name}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    words = Tokenizer(models.WordLevel({f"t{index}": index for index in range(VOCAB)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "t1", "eos_token": "t2"}))
    config = {**model_config("w8a16"), "num_hidden_layers": num_layers}
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _layer(name: str) -> int:
    """The layer of a product; -1 for the head."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else -1


def _noise(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return (torch.randn(shape, generator=generator) * 0.02).bfloat16()


def model_config(scheme: str) -> dict[str, object]:
    """config.json; the schemes differ in what they say of activations."""
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs if scheme == "w8a8" else None}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "config_groups": {"group_0": group},
            "ignore": [],
            "kv_cache_scheme": None,
        },
    }
