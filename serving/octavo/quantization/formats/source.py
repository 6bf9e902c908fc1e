"""The safetensors files of a model folder as one map from name to tensor. Runs while a model loads.

Files are mapped, so a tensor costs memory only while it is used. Remembers what was taken: a tensor that nobody wanted
is a sign of a checkpoint read wrongly. Never opens anything but safetensors, and no file outside the folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from octavo.quantization.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CACHE_SCALES = "kv_cache_scales.safetensors"
MAX_INDEX_BYTES = 64 << 20
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class TensorSource:
    """Tensors by name. Raises CheckpointError if the folder has no readable safetensors."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}  # file name -> open file
        self._where: dict[str, str] = {}  # tensor name -> file name
        self._taken: set[str] = set()
        for file_name in _weight_files(folder):
            self._open(folder, file_name)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def names(self) -> Iterable[str]:
        return self._where.keys()

    def take(self, name: str, *, shape: tuple[int, ...] | None = None) -> Tensor:
        """The tensor, as stored. Raises CheckpointError if it is missing or has another shape."""
        if name not in self._where:
            raise CheckpointError(f"the checkpoint has no tensor {name}")
        self._taken.add(name)
        try:
            tensor: Tensor = self._files[self._where[name]].get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self._where[name]}: tensor {name} cannot be read: {error}") from None
        if shape is not None and tuple(tensor.shape) != shape:
            raise CheckpointError(f"{name}: has shape {list(tensor.shape)}, the configuration asks for {list(shape)}")
        return tensor

    def pass_over(self, name: str) -> None:
        """Count a tensor as taken without reading it; it need not exist."""
        self._taken.add(name)

    def untaken(self) -> list[str]:
        """Names that nobody took, sorted."""
        return sorted(self._where.keys() - self._taken)

    def _open(self, folder: Path, file_name: str) -> None:
        try:
            file: Any = safe_open(folder / file_name, framework="pt", device="cpu")
            names = list(file.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file_name}: cannot be read as safetensors: {error}") from None
        self._files[file_name] = file
        for name in names:
            if name in self._where:
                raise CheckpointError(f"tensor {name} is in both {self._where[name]} and {file_name}")
            self._where[name] = file_name


def _weight_files(folder: Path) -> list[str]:
    """File names to open, cache scales last."""
    if (folder / INDEX).is_file():
        files = _indexed_files(folder / INDEX)
    elif (folder / SINGLE).is_file():
        files = [SINGLE]
    else:
        raise _no_weights(folder)
    return files + ([CACHE_SCALES] if (folder / CACHE_SCALES).is_file() and CACHE_SCALES not in files else [])


def _indexed_files(index: Path) -> list[str]:
    """The shards of an index. Raises CheckpointError for names that are not plain file names in the folder."""
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise CheckpointError(f"{INDEX}: larger than {MAX_INDEX_BYTES} bytes")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({str(file_name) for file_name in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{INDEX}: must be a JSON object with a weight_map") from None
    for file_name in files:
        if Path(file_name).name != file_name or "\\" in file_name or not file_name.endswith(".safetensors"):
            raise CheckpointError(f"{INDEX}: {file_name!r} is not the name of a safetensors file in the folder")
        if not (index.parent / file_name).is_file():
            raise CheckpointError(f"{INDEX}: {file_name} is missing")
    return files


def _no_weights(folder: Path) -> CheckpointError:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    for name in names:
        if name.endswith(PICKLE_SUFFIXES):
            return CheckpointError(
                f"{folder}: {name} is a pickle, which can run code when it is opened; convert the model to safetensors"
            )
    for name in names:
        if name.endswith((".gguf", ".pdmodel", ".pdiparams")):
            return CheckpointError(f"{folder}: {name}: this kind of file is not supported; safetensors are needed")
    return CheckpointError(f"{folder}: there is neither {SINGLE} nor {INDEX}")
