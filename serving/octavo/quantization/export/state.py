"""The folder of an unfinished run: finished layers, the streams behind the last of them, and what was measured.

A file is written beside its place and then moved there; the notes, which say how far the run came, come last.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.quantization.export.streams import Stream
from octavo.quantization.safetensors_file import Entry, write_safetensors

NOTES = "notes.json"


def fingerprint(asked: dict[str, object], model: Path, sequences: object) -> str:
    """Of everything that a resumed run must share with the one before."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(model.glob("*.safetensors"))]
    config = (model / "config.json").read_text(encoding="utf-8")
    text = json.dumps([asked, files, config, sequences], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class State:
    """Notes of a run. next_layer: the first that is not finished; num_bytes: of the streams before it, by name.

    num_threads: of torch. Sums are split by it, so a run that goes on takes as many as it had.
    """

    folder: Path
    fingerprint: str
    next_layer: int = 0
    layers: list[dict[str, Any]] = field(default_factory=list)
    float_units: dict[str, list[str]] | None = None  # layer → units; None: not chosen yet
    num_bytes: dict[str, int] = field(default_factory=dict)
    num_threads: int = field(default_factory=torch.get_num_threads)

    @classmethod
    def open(cls, folder: Path, fingerprint: str) -> State:
        """Go on where a run with the same fingerprint was cut off, or start anew."""
        try:
            notes = json.loads((folder / NOTES).read_text(encoding="utf-8"))
            state = cls(folder, **notes)
            if state.fingerprint == fingerprint and state._is_whole():
                return state
        except (OSError, ValueError, TypeError):
            pass
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return cls(folder, fingerprint)

    def stream(self, name: str, *, width: int, layer: int | None = None) -> Stream:
        """The rows before a layer, by default the next one, of one variant."""
        index = self.next_layer if layer is None else layer
        return Stream(self.folder / f"stream-{index:05}-{name.replace(' ', '-')}.f32", width)

    def layer_file(self, index: int) -> Path:
        return self.folder / f"layer-{index:05}.safetensors"

    def kept_float(self, index: int) -> list[str]:
        """The units of a layer that stay float."""
        return (self.float_units or {}).get(str(index), [])

    def finish_layer(self, tensors: dict[str, Tensor], streams: list[str], notes: dict[str, Any]) -> None:
        """Keep a layer and what was measured; the streams behind it are written."""
        index = self.next_layer
        _save(tensors, self.layer_file(index))
        self.layers.append(notes)
        self.next_layer += 1
        self.num_bytes = {name: self.stream(name, width=1).path.stat().st_size for name in streams}
        self.save_notes()
        for path in self.folder.glob(f"stream-{index:05}-*"):
            path.unlink()

    def save_notes(self) -> None:
        notes = {key: value for key, value in vars(self).items() if key != "folder"}
        fresh = self.folder / f"{NOTES}.new"
        fresh.write_text(json.dumps(notes), encoding="utf-8")
        fresh.replace(self.folder / NOTES)

    def _is_whole(self) -> bool:
        """Whether all files that the notes speak of are there."""
        has_layers = all(self.layer_file(index).is_file() for index in range(self.next_layer))
        sizes = {name: self.stream(name, width=1).path.stat().st_size for name in self.num_bytes}
        return has_layers and sizes == self.num_bytes and bool(sizes) == bool(self.next_layer)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    fresh = path.with_name(path.name + ".new")
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_safetensors(fresh, entries, tensors.__getitem__)
    fresh.replace(path)
