"""The finished checkpoint: shards, index, config.json, and the files that come along from the original."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from octavo.quantization.formats.source import INDEX, TensorSource
from octavo.quantization.safetensors_file import Entry, list_entries, read_tensor, write_safetensors

COPIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*",
    "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip


def write_shards(folder: Path, sources: Sequence[Path], *, max_bytes: int) -> None:
    """The tensors of all files in one file, or in shards of at most `max_bytes` with an index."""
    where = {entry.name: path for path in sources for entry in list_entries(path)}
    shards: list[list[Entry]] = [[]]
    used = total = 0
    for entry in (entry for path in sources for entry in list_entries(path)):
        if shards[-1] and used + entry.num_bytes > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(entry)
        used += entry.num_bytes
        total += entry.num_bytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / name, shard, lambda tensor: read_tensor(where[tensor], tensor))
        weight_map.update({entry.name: name for entry in shard})
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def copy_tensors(source: TensorSource, names: Sequence[str], path: Path) -> None:
    """Some tensors of a checkpoint, as they are, in a file of their own."""
    entries = {name: source.take(name) for name in names}  # of mapped files: they take no memory yet
    write_safetensors(path, [Entry(name, x.dtype, tuple(x.shape)) for name, x in entries.items()], entries.__getitem__)


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
