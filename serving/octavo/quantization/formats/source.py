"""The safetensors files of a model folder as one map from name to tensor. Runs while a model loads.

Files are mapped, so a tensor costs memory only while it is used; `release` gives the pages back. Remembers what was
taken: a tensor that nobody wanted is a sign of a checkpoint read wrongly. Opens safetensors and small JSON files of the
folder, nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from octavo.quantization.errors import CheckpointError
from octavo.quantization.files import foreign_weights, inside, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CACHE_SCALES = "kv_cache_scales.safetensors"
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
COPIED_BYTES = 1 << 20  # smaller tensors are copied, so that none of them keeps a mapped file alive
MAPPED_BYTES = 16 << 20  # mapped pages that a load may hold before it gives them back
DTYPES = {  # how safetensors calls the types that some reader takes
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Taken:
    """A tensor that a reader has taken."""

    name: str
    dtype: str
    num_bytes: int


class TensorSource:
    """Tensors by name. Raises CheckpointError if the folder has no readable safetensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.taken: list[Taken] = []  # in the order of taking
        self._files: dict[str, Any] = {}  # file name -> open file
        self._where: dict[str, str] = {}  # tensor name -> file name
        self._values: dict[str, Tensor] = {}  # tensors that are in no safetensors file
        self._used: set[str] = set()
        self._mapped_bytes = 0
        index = _read_index(folder)
        for file_name in _weight_files(folder, index):
            self._list(file_name)
        _check_index(index, self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def names(self) -> Iterable[str]:
        return self._where.keys()

    def files(self) -> dict[str, list[str]]:
        """The names of the tensors in each safetensors file."""
        found: dict[str, list[str]] = {}
        for name, file_name in self._where.items():
            if name not in self._values:
                found.setdefault(file_name, []).append(name)
        return found

    def dtype(self, name: str) -> torch.dtype | None:
        """The type of a tensor without reading it; None if there is no such tensor, or of no type that is read."""
        if name not in self._where:
            return None
        if name in self._values:
            return self._values[name].dtype
        try:
            return DTYPES.get(self._file(self._where[name]).get_slice(name).get_dtype())
        except SafetensorError:
            return None

    def take(self, name: str, *, shape: tuple[int, ...] | None = None) -> Tensor:
        """The tensor, as stored. Raises CheckpointError if it is missing or has another shape."""
        if name not in self._where:
            raise CheckpointError(f"the checkpoint has no tensor {name}")
        tensor = self._values[name] if name in self._values else self._read(name)
        if shape is not None and tuple(tensor.shape) != shape:
            raise CheckpointError(f"{name}: has shape {list(tensor.shape)}, the configuration asks for {list(shape)}")
        num_bytes = tensor.numel() * tensor.element_size()
        self._mapped_bytes += num_bytes
        self._used.add(name)
        self.taken.append(Taken(name, str(tensor.dtype).removeprefix("torch."), num_bytes))
        return tensor.clone() if num_bytes <= COPIED_BYTES else tensor

    def add(self, file_name: str, values: Mapping[str, Tensor]) -> None:
        """More tensors, from a file of another kind. Raises CheckpointError for a name that is there already."""
        self._claim(file_name, values.keys())
        self._values.update(values)

    def pass_over(self, name: str) -> None:
        """Count a tensor as taken without reading it; it need not exist."""
        self._used.add(name)

    def untaken(self) -> list[str]:
        """Names that nobody took, sorted."""
        return sorted(self._where.keys() - self._used)

    def release(self, *, at_least: int = 0) -> None:
        """Give mapped pages back once `at_least` bytes were taken. Tensors that are still used stay as they are."""
        if self._mapped_bytes >= at_least:
            self._files.clear()
            self._mapped_bytes = 0

    def _read(self, name: str) -> Tensor:
        file_name = self._where[name]
        try:
            tensor: Tensor = self._file(file_name).get_tensor(name)
        except (SafetensorError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{file_name}: tensor {name} cannot be read: {error}") from None
        if tensor.dtype not in DTYPES.values():
            raise CheckpointError(f"{file_name}: tensor {name} is {tensor.dtype}, a type that is not supported")
        return tensor

    def _file(self, file_name: str) -> Any:
        if file_name not in self._files:
            try:
                self._files[file_name] = safe_open(inside(self.folder, file_name), framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file_name}: cannot be read as safetensors: {error}") from None
        return self._files[file_name]

    def _list(self, file_name: str) -> None:
        self._claim(file_name, self._file(file_name).keys())

    def _claim(self, file_name: str, names: Iterable[str]) -> None:
        for name in names:
            if name in self._where:
                raise CheckpointError(f"tensor {name} is in both {self._where[name]} and {file_name}")
            self._where[name] = file_name


def _read_index(folder: Path) -> Mapping[str, str] | None:
    """Tensor name → shard of the index; None without one. Raises CheckpointError for names that leave the folder."""
    if not (folder / INDEX).is_file():
        return None
    weight_map = read_json(inside(folder, INDEX), name=INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX}: must be a JSON object with a weight_map")
    for file_name in sorted({str(value) for value in weight_map.values()}):
        if Path(file_name).name != file_name or "\\" in file_name or not file_name.endswith(".safetensors"):
            raise CheckpointError(f"{INDEX}: {file_name!r} is not the name of a safetensors file in the folder")
        if not (folder / file_name).is_file():
            raise CheckpointError(f"{INDEX}: {file_name} is missing")
    return weight_map


def _check_index(index: Mapping[str, str] | None, where: Mapping[str, str]) -> None:
    """The index and the shards must agree on every tensor."""
    if index is None:
        return
    for name, file_name in index.items():
        if where.get(name) != file_name:
            found = f"it is in {where[name]}" if name in where else "it is in no file"
            raise CheckpointError(f"{INDEX}: says that {name} is in {file_name}, but {found}")
    for name, file_name in where.items():
        if name not in index and file_name != CACHE_SCALES:
            raise CheckpointError(f"{INDEX}: has no entry for {name}, which is in {file_name}")


def _weight_files(folder: Path, index: Mapping[str, str] | None) -> list[str]:
    """File names to open, cache scales last."""
    if index is not None:
        files = sorted(set(index.values()))
    elif (folder / SINGLE).is_file():
        files = [SINGLE]
    else:
        files = _unindexed_files(folder)
    return files + ([CACHE_SCALES] if (folder / CACHE_SCALES).is_file() and CACHE_SCALES not in files else [])


def _unindexed_files(folder: Path) -> list[str]:
    """One file of any name, or a complete set of numbered shards."""
    names = sorted(path.name for path in folder.glob("*.safetensors") if path.is_file() and path.name != CACHE_SCALES)
    if not names:
        reason = foreign_weights(folder) or f"there is neither {SINGLE} nor {INDEX}"
        raise CheckpointError(f"{folder}: {reason}")
    if len(names) == 1 and SHARD.fullmatch(names[0]) is None:
        return names
    shards = [SHARD.fullmatch(name) for name in names]
    stems = {(shard[1], int(shard[3])) for shard in shards if shard is not None}
    if None in shards or len(stems) != 1:
        raise CheckpointError(f"{folder}: several safetensors files and no {INDEX} that says which belong to the model")
    stem, count = stems.pop()
    numbers = {int(shard[2]) for shard in shards if shard is not None}
    missing = next((number for number in range(1, count + 1) if number not in numbers), None)
    if missing is not None:
        raise CheckpointError(f"{folder}: {stem}-{missing:05}-of-{count:05}.safetensors is missing")
    return names
