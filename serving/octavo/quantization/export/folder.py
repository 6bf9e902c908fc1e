"""The finished checkpoint: shards, index, config.json, and the files that come along from the original."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.quantization.formats.source import INDEX
from octavo.quantization.safetensors_file import Entry, copy_safetensors, list_entries

COPIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*",
    "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip


def write_shards(folder: Path, where: Mapping[str, Path], *, max_bytes: int) -> None:
    """The named tensors, copied from the files that they are in: in one file, or in shards of at most `max_bytes` with
    an index.
    """
    sources = dict.fromkeys(where.values())
    listed = {source: {entry.name: entry for entry in list_entries(source)} for source in sources}
    shards: list[list[Entry]] = [[]]
    used = total = 0
    for name, source in where.items():
        entry = listed[source][name]
        if shards[-1] and used + entry.num_bytes > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(entry)
        used += entry.num_bytes
        total += entry.num_bytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        copy_safetensors(folder / file_name, shard, where)
        weight_map.update({entry.name: file_name for entry in shard})
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
