"""Tiny random checkpoints of every family, in folders as users have them, and the transformers model beside each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

VOCAB = 160
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.15,  # large, so that logits differ and mistakes show
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def family_configs() -> dict[str, transformers.PretrainedConfig]:
    """One small configuration for every family and every feature that changes arithmetic."""
    t = transformers
    return {
        "llama2": t.LlamaConfig(**BASE),
        "llama2_linear_rope": t.LlamaConfig(**BASE, rope_scaling={"rope_type": "linear", "factor": 4.0}),
        "llama3_tied": t.LlamaConfig(
            **{**BASE, "tie_word_embeddings": True}, rope_theta=500000.0, rope_scaling=LLAMA3_ROPE
        ),
        "llama_biases": t.LlamaConfig(**BASE, attention_bias=True, mlp_bias=True),
        "llama_yarn": t.LlamaConfig(
            **BASE, rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
        ),
        "llama_dynamic_rope": t.LlamaConfig(**BASE, rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        "mistral_window": t.MistralConfig(**BASE, sliding_window=24),
        "mistral_head_dim": t.MistralConfig(**BASE, sliding_window=None, head_dim=32),
        "qwen2": t.Qwen2Config(**BASE),
        "qwen2_window": t.Qwen2Config(**BASE, use_sliding_window=True, sliding_window=20, max_window_layers=1),
        "qwen3": t.Qwen3Config(**BASE, head_dim=32),
        "mixtral": t.MixtralConfig(**BASE, num_local_experts=4, num_experts_per_tok=2),
        "qwen2_moe": t.Qwen2MoeConfig(
            **BASE,
            moe_intermediate_size=48,
            shared_expert_intermediate_size=80,
            num_experts=6,
            num_experts_per_tok=2,
            norm_topk_prob=False,
        ),
        "qwen3_moe": t.Qwen3MoeConfig(
            **BASE,
            head_dim=32,
            moe_intermediate_size=48,
            num_experts=6,
            num_experts_per_tok=3,
            norm_topk_prob=True,
            mlp_only_layers=[0],
        ),
    }


def make_model(config: transformers.PretrainedConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A random transformers model; biases and norms are random too, since zeros and ones would hide them."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.to(dtype)


def save_model(model: Any, folder: Path, *, max_shard_size: str = "5GB") -> Path:
    """Write config.json and safetensors."""
    transformers.logging.disable_progress_bar()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def write_internlm2(folder: Path) -> Any:
    """A Llama under InternLM2's names with its queries, keys and values interleaved by K/V head. Returns the Llama."""
    config = transformers.LlamaConfig(**BASE, attention_bias=True)
    model = make_model(config)
    save_model(model, folder)
    tensors = load_file(folder / "model.safetensors")
    renamed = _internlm2_tensors(tensors, num_kv_heads=2, head_dim=16)
    save_file(renamed, folder / "model.safetensors")
    edit_config(folder, _internlm2_config)
    return model


def write_internlm3(folder: Path) -> Any:
    """A Llama with biases under InternLM3's configuration. Returns the Llama."""
    model = make_model(family_configs()["llama_biases"])
    save_model(model, folder)
    edit_config(folder, lambda raw: raw.update(architectures=["InternLM3ForCausalLM"], qkv_bias=True, bias=True))
    return model


def write_yi(folder: Path) -> Any:
    """A Llama under the names that Yi had at first. Returns the Llama."""
    model = make_model(family_configs()["llama2"])
    save_model(model, folder)
    names = {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            for old, new in names.items():
                if f".{old}." in name:
                    tensors[name.replace(old, new)] = tensors.pop(name)

    edit_tensors(folder, rename)
    edit_config(folder, lambda raw: raw.update(architectures=["YiForCausalLM"], model_type="Yi"))
    return model


def _internlm2_config(raw: dict[str, Any]) -> None:
    raw["architectures"] = ["InternLM2ForCausalLM"]
    raw["bias"] = raw.pop("attention_bias")
    raw["rope_theta"] = raw.pop("rope_parameters")["rope_theta"]
    raw["rope_scaling"] = {"type": "dynamic", "factor": 2.0}
    raw["torch_dtype"] = raw.pop("dtype")


def _internlm2_tensors(tensors: Mapping[str, Tensor], *, num_kv_heads: int, head_dim: int) -> dict[str, Tensor]:
    names = {
        "model.embed_tokens": "model.tok_embeddings",
        "lm_head": "output",
        "self_attn.o_proj": "attention.wo",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
    }
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if "q_proj" in name:
            q, k, v = (
                tensors[name.replace("q_proj", f"{x}_proj")].unflatten(0, (num_kv_heads, -1, head_dim)) for x in "qkv"
            )
            renamed[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat((q, k, v), dim=1).flatten(0, 2)
        elif "k_proj" not in name and "v_proj" not in name:
            for old, new in names.items():
                name = name.replace(old, new)
            renamed[name] = tensor
    return {name: tensor.contiguous() for name, tensor in renamed.items()}


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change config.json in place."""
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Change model.safetensors in place."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def reference_logits(model: Any, token_ids: list[int]) -> Tensor:
    """[len(token_ids), V] float32 by transformers."""
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0].float()
