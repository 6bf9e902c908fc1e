"""Writes the finished model: int8 weights in compressed-tensors form, calibrated cache scales, config, tokenizer.

The folder is put together beside its place and then moved there, so a reader never sees half of it. Runs offline.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from demo.corpus import Corpus
from demo.corpus.build import EpochDrawer
from demo.encoding import Encoder, make_batches
from demo.quantised import CacheScales, HookedCache, projections, quantise_weight
from demo.tokenizer import write_json
from demo.train import ROPE_THETA

CALIBRATION_EPOCH = 1000  # drawn like a training epoch, but never trained on in this order
CALIBRATION_BATCHES = 24
MARGIN = 1.05  # over the largest value seen
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
KEPT_FILES = ("README.md", "evaluation.json")  # written by later stages


def quantization_config() -> dict[str, object]:
    """The config.json entry; parsed by compressed-tensors before it is written."""
    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**eight_bits, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight_bits, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    entry: dict[str, object] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": {**eight_bits, "strategy": "tensor", "dynamic": False},
    }
    QuantizationConfig.model_validate(entry)
    return entry


def config_json(config: LlamaConfig) -> dict[str, object]:
    """config.json with the classic field names, which old and new readers know."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": ROPE_THETA,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": "bfloat16",
        "quantization_config": quantization_config(),
    }


@torch.inference_mode()
def calibrate_cache(model: LlamaForCausalLM, corpus: Corpus, tokenizer: Tokenizer) -> CacheScales:
    """Static scales of K and V: the largest value on training text, with a margin, over 127.5.

    For K the largest length of a rotated pair counts, so that the scale holds at every position.
    """
    encoder, rng = Encoder(tokenizer), random.Random(0)
    layers = model.config.num_hidden_layers
    largest = {"k": torch.zeros(layers), "v": torch.zeros(layers)}

    def observe(kind: str, layer: int, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        seen = (first.square() + second.square()).sqrt() if kind == "k" else x.abs()
        largest[kind][layer] = torch.maximum(largest[kind][layer], seen.max())
        return x

    encoded = [encoder.example(item, rng) for item in EpochDrawer(corpus, seed=0).draw(CALIBRATION_EPOCH)]
    batches = make_batches(encoded, tokens_per_batch=4096, pad=encoder.pad, rng=rng)
    for ids, _ in batches[:CALIBRATION_BATCHES]:
        model.model(input_ids=ids, past_key_values=HookedCache(observe), use_cache=True)
    return {kind: values * MARGIN / 127.5 for kind, values in largest.items()}


def export_tensors(model: LlamaForCausalLM, scales: CacheScales) -> dict[str, torch.Tensor]:
    """All tensors of model.safetensors; the tied head is not stored."""
    tensors = {}
    for name, layer in projections(model):
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = quantise_weight(layer.weight)
    for name, value in model.state_dict().items():
        if name not in tensors and name != "lm_head.weight":
            tensors[name] = value.detach().to(torch.bfloat16).contiguous()
    for kind, values in scales.items():
        for index, value in enumerate(values):
            tensors[f"model.layers.{index}.self_attn.{kind}_scale"] = value.reshape(1).clone()  # [1] float32
    return tensors


def export_model(model: LlamaForCausalLM, corpus: Corpus, *, tokenizer_folder: Path, out: Path) -> None:
    """Quantises the model and puts the folder in place of an older one."""
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tensors = export_tensors(model.eval(), calibrate_cache(model.eval(), corpus, tokenizer))
    fresh, old = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
    for folder in (fresh, old):
        shutil.rmtree(folder, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file(tensors, fresh / "model.safetensors", metadata={"format": "pt"})
    (fresh / "model.safetensors").chmod(0o644)
    write_json(fresh / "config.json", config_json(model.config))
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer_folder / name, fresh / name)
    for name in KEPT_FILES:
        if (out / name).exists():
            shutil.copyfile(out / name, fresh / name)
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)
