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

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

NOTES = "notes.json"


def fingerprint(asked: dict[str, object], model: Path, sequences: object) -> str:
    """Of everything that a resumed run must share with the one before."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(model.glob("*.safetensors"))]
    config = (model / "config.json").read_text(encoding="utf-8")
    text = json.dumps([asked, files, config, sequences], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class State:
    """Notes of a run. next_layer: the first that is not finished."""

    folder: Path
    fingerprint: str
    next_layer: int = 0
    layers: list[dict[str, Any]] = field(default_factory=list)
    float_units: dict[str, list[str]] | None = None  # layer → units; None: not chosen yet

    @classmethod
    def open(cls, folder: Path, fingerprint: str) -> State:
        """Go on where a run with the same fingerprint was cut off, or start anew."""
        try:
            notes = json.loads((folder / NOTES).read_text(encoding="utf-8"))
            state = cls(folder, **notes)
            if state.fingerprint == fingerprint:
                state.streams()
                return state
        except (OSError, ValueError, TypeError, SafetensorError):
            pass
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return cls(folder, fingerprint)

    def streams(self) -> dict[str, Tensor]:
        """The rows behind the last finished layer, by variant."""
        return load_file(self._streams(self.next_layer)) if self.next_layer else {}

    def layer_file(self, index: int) -> Path:
        return self.folder / f"layer-{index:05}.safetensors"

    def finish_layer(self, tensors: dict[str, Tensor], streams: dict[str, Tensor], notes: dict[str, Any]) -> None:
        """Keep a layer, the streams behind it and what was measured."""
        index = self.next_layer
        _save(tensors, self.layer_file(index))
        _save(streams, self._streams(index + 1))
        self.layers.append(notes)
        self.next_layer += 1
        self.save_notes()
        self._streams(index).unlink(missing_ok=True)

    def save_notes(self) -> None:
        notes = {
            "fingerprint": self.fingerprint,
            "next_layer": self.next_layer,
            "layers": self.layers,
            "float_units": self.float_units,
        }
        fresh = self.folder / f"{NOTES}.new"
        fresh.write_text(json.dumps(notes), encoding="utf-8")
        fresh.replace(self.folder / NOTES)

    def _streams(self, index: int) -> Path:
        return self.folder / f"streams-{index:05}.safetensors"


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    fresh = path.with_name(path.name + ".new")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, fresh)
    fresh.replace(path)
