"""Writing a safetensors file one tensor at a time, so that no more than one of them is in memory.

The library's own writer takes all of a file's tensors at once. Offline tools only; knows nothing of models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from octavo.quantization.formats.source import DTYPES
from octavo.quantization.scheme import row_slices

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def list_entries(path: Path) -> list[Entry]:
    """What a safetensors file holds, without reading it."""
    with safe_open(path, framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
        return [Entry(name, DTYPES[part.get_dtype()], tuple(part.get_shape())) for name, part in slices.items()]


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a file."""
    with safe_open(path, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor


def write_safetensors(path: Path, entries: Sequence[Entry], read: Callable[[str], Tensor]) -> None:
    """Write the tensors that `read` gives. Raises ValueError if one differs from its entry."""
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))  # so that every value is aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in ordered:
        ends = [offset, offset + entry.num_bytes]
        header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": ends}
        offset = ends[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in ordered:
            tensor = read(entry.name)
            if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
                raise ValueError(f"{entry.name}: is {tensor.dtype} {list(tensor.shape)}, not what was announced")
            for part in (tensor[rows] for rows in row_slices(entry.shape)) if tensor.dim() else [tensor.reshape(1)]:
                file.write(memoryview(part.contiguous().view(torch.uint8).numpy()).cast("B"))
    path.chmod(0o644)
