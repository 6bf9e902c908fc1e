"""A checkpoint of some 300 MB of random numbers, and a process that loads it and says what it took.

Run as a program: `python peak_memory.py FOLDER` prints the peak and what stays, in bytes of resident memory.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from octavo.kernels.choose import choose
from octavo.models.config import load_config
from octavo.models.loader import LoadOptions, load_decoder
from octavo.parallel.group import make_group
from octavo.quantization.formats.reader import ReaderInputs
from octavo.quantization.formats.source import TensorSource

HIDDEN, INNER, LAYERS, VOCAB = 1024, 3072, 20, 8192
# a Linear's name, weight [N, K] and input maximum → its tensors by suffix, and the weight that they mean
Writer = Callable[[str, Tensor, float], tuple[dict[str, Tensor], Tensor]]


def write_large(
    folder: Path,
    writer: Writer,
    quantization: dict[str, Any] | None,
    *,
    num_layers: int = LAYERS,
    vocab: int = VOCAB,
) -> None:
    """A Llama of 270 million weights, or of other depth: 13.6 million a layer."""
    generator = torch.Generator().manual_seed(0)
    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    tensors = {"model.norm.weight": ones.clone()}
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = torch.randn(vocab, HIDDEN, generator=generator).bfloat16()
    shapes = {f"self_attn.{x}_proj": (HIDDEN, HIDDEN) for x in "qkvo"}
    shapes |= {"mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        tensors[f"{prefix}input_layernorm.weight"] = ones.clone()
        tensors[f"{prefix}post_attention_layernorm.weight"] = ones.clone()
        for name, shape in shapes.items():
            stored, _ = writer(prefix + name, torch.randn(shape, generator=generator) * 0.02, 1.0)
            tensors.update({f"{prefix}{name}.{suffix}": tensor.contiguous() for suffix, tensor in stored.items()})
    save_file(tensors, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 16,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "quantization_config": quantization,
    }
    (folder / "config.json").write_text(json.dumps(config))


def memory(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key}")


def measure(folder: Path) -> tuple[int, int]:
    """(peak, what stays) over what the process had before."""
    config = load_config(folder)
    kernels = choose("auto", device=torch.device("cpu"), num_threads=1)
    gc.collect()
    before = memory("VmRSS")
    with contextlib.suppress(OSError):  # where the mark cannot be reset, the peak is overstated, not understated
        Path("/proc/self/clear_refs").write_text("5")
    inputs = ReaderInputs(TensorSource(folder), config.quantization)
    options = LoadOptions(max_positions=2048)
    decoder = load_decoder(
        config, inputs, kernels, make_group(1), options=options, progress=lambda stage, fraction: None
    )
    del inputs
    gc.collect()
    assert decoder.layers
    return memory("VmHWM") - before, memory("VmRSS") - before


if __name__ == "__main__":
    print(*measure(Path(sys.argv[1])))
