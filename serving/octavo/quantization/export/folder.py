"""The finished checkpoint: shards, index, config.json, and the files that come along from the original."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

COPIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*",
    "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
INDEX = "model.safetensors.index.json"


def write_shards(folder: Path, sources: Sequence[Path], *, max_bytes: int) -> None:
    """The tensors of all files in one file, or in shards of at most `max_bytes` with an index."""
    sizes = [[(name, _num_bytes(tensor)) for name, tensor in _tensors(path)] for path in sources]
    shards: list[list[tuple[Path, str]]] = [[]]
    used = 0
    for path, listed in zip(sources, sizes):
        for name, size in listed:
            if shards[-1] and used + size > max_bytes:
                shards.append([])
                used = 0
            shards[-1].append((path, name))
            used += size
    total = sum(size for listed in sizes for _, size in listed)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / name, shard)
        weight_map.update({tensor: name for _, tensor in shard})
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_config(folder: Path, raw: dict[str, Any], quantization: dict[str, object]) -> None:
    write_json(folder / "config.json", {**raw, "quantization_config": quantization})


def copy_companions(model: Path, folder: Path) -> None:
    """Tokenizer, generation settings, licence."""
    for pattern in COPIED:
        for path in sorted(model.glob(pattern)):
            if path.is_file() and not path.name.endswith((".safetensors", ".bin", ".pt", ".pth")):
                shutil.copyfile(path, folder / path.name)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118  (no mapping: only `keys` lists)
            yield name, opened.get_tensor(name)


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _write_shard(path: Path, shard: list[tuple[Path, str]]) -> None:
    tensors: dict[str, Tensor] = {}
    for source in dict.fromkeys(source for source, _ in shard):
        with safe_open(source, framework="pt") as opened:
            tensors.update({name: opened.get_tensor(name) for origin, name in shard if origin == source})
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)
