"""Writing a safetensors file one tensor at a time, or copying tensors into one without reading them.

The library's own writer takes all of a file's tensors at once. Offline tools only; knows nothing of models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from octavo.quantization.formats.source import DTYPES
from octavo.quantization.scheme import row_slices

NAMES = {dtype: name for name, dtype in DTYPES.items()}
COPIED_BYTES = 1 << 20  # at once


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


def write_safetensors(path: Path, entries: Sequence[Entry], read: Callable[[str], Tensor]) -> None:
    """Write the tensors that `read` gives. Raises ValueError if one differs from its entry."""
    ordered = sorted(entries, key=_order)
    with path.open("wb") as file:
        _write_header(file, ordered)
        for entry in ordered:
            tensor = read(entry.name)
            if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
                raise ValueError(f"{entry.name}: is {tensor.dtype} {list(tensor.shape)}, not what was announced")
            for part in (tensor[rows] for rows in row_slices(entry.shape)) if tensor.dim() else [tensor.reshape(1)]:
                file.write(memoryview(part.contiguous().view(torch.uint8).numpy()).cast("B"))
    path.chmod(0o644)


def copy_safetensors(path: Path, entries: Sequence[Entry], where: Mapping[str, Path]) -> None:
    """Copy tensors, byte by byte, from the files that they are in."""
    ordered = sorted(entries, key=_order)
    offsets = {source: _offsets(source) for source in dict.fromkeys(where[entry.name] for entry in ordered)}
    with path.open("wb") as file:
        _write_header(file, ordered)
        for entry in ordered:
            source = where[entry.name]
            with source.open("rb") as opened:
                opened.seek(offsets[source][entry.name])
                _copy(opened, file, entry.num_bytes)
    path.chmod(0o644)


def _order(entry: Entry) -> tuple[int, str]:
    """Wide types first, so that every value is aligned."""
    return -entry.dtype.itemsize, entry.name


def _write_header(file: BinaryIO, ordered: Sequence[Entry]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in ordered:
        ends = [offset, offset + entry.num_bytes]
        header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": ends}
        offset = ends[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def _offsets(path: Path) -> dict[str, int]:
    """Where in a file, which the library has opened before, each tensor begins."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {name: 8 + size + item["data_offsets"][0] for name, item in header.items() if name != "__metadata__"}


def _copy(source: BinaryIO, target: BinaryIO, num_bytes: int) -> None:
    """Raises OSError if the source ends before."""
    while num_bytes:
        part = source.read(min(num_bytes, COPIED_BYTES))
        if not part:
            raise OSError("a safetensors file ends within a tensor")
        target.write(part)
        num_bytes -= len(part)
