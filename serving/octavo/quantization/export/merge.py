"""`merge`: a float checkpoint with a LoRA adapter folded in, written tensor by tensor.

The files of the result are cut as those of the original are. Offline, one process.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from octavo.models.config import load_config
from octavo.quantization.errors import CheckpointError
from octavo.quantization.export.folder import copy_companions
from octavo.quantization.formats.reader import FLOAT_DTYPES, type_name
from octavo.quantization.formats.source import INDEX, TensorSource
from octavo.quantization.lora import Adapter, Change
from octavo.quantization.safetensors_file import list_entries, write_safetensors

Progress = Callable[[str, float], None]  # tensor, fraction from 0 to 1


@dataclass(frozen=True)
class Merged:
    """What was done. change: ‖W' − W‖ / ‖W‖ of the tensor that changed most."""

    num_tensors: int
    change: float
    name: str
    notes: tuple[str, ...]


@torch.inference_mode()
def merge(model: Path, lora: Path, out: Path, progress: Progress) -> Merged:
    """Write `model` with the adapter `lora` to the folder `out`. Raises CheckpointError."""
    config = load_config(model)
    if config.quantization is not None:
        raise CheckpointError(f"{model}: is quantised; an adapter is folded into the float checkpoint before that")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"--out {out}: exists and is not empty")
    source, adapter = TensorSource(model), Adapter(lora)
    tied = config.family.embedding if config.tie_word_embeddings else None
    _check(source, adapter.changes, tied=tied, head=f"{config.family.head}.weight")
    fresh = out.with_name(out.name + ".partial")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    largest, name = _write(fresh, source, adapter.changes, progress)
    for companion in ("config.json", INDEX):
        if (model / companion).is_file():
            shutil.copyfile(model / companion, fresh / companion)
    copy_companions(model, fresh)
    if out.is_dir():
        out.rmdir()
    fresh.rename(out)
    return Merged(len(adapter.changes), largest, name, tuple(adapter.notes))


def _write(folder: Path, source: TensorSource, changes: dict[str, Change], progress: Progress) -> tuple[float, str]:
    """The files; the largest relative change and where it is."""
    found = (0.0, "")
    files = source.files()
    total, done = sum(map(len, files.values())), 0

    def read(name: str) -> Tensor:
        nonlocal done, found
        progress(name, done / total)
        done += 1
        source.release()
        tensor = source.take(name)
        if name not in changes:
            return tensor
        changed = changes[name].apply(tensor)
        if not bool(torch.isfinite(changed).all()):
            raise CheckpointError(f"{name}: its changed values do not fit into {type_name(changed)}")
        found = max(found, (_relative(changed, tensor), name))
        return changed

    for file_name in files:
        write_safetensors(folder / file_name, list_entries(source.folder / file_name), read)
    return found


def _check(source: TensorSource, changes: dict[str, Change], *, tied: str | None, head: str) -> None:
    """Every change must have its tensor, of a float type and the same shape."""
    names: Iterable[str] = source.names()
    for name, change in changes.items():
        if tied is not None and name in (tied, head):
            raise CheckpointError(
                f"{name}: the model's head is its embedding; an adapter of one of them is not supported"
            )
        if name not in names:
            raise CheckpointError(f"the adapter changes {name}, which the checkpoint does not have")
        tensor = source.take(name)
        if tensor.dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"{name}: is {type_name(tensor)}, a float type is needed here")
        if tuple(tensor.shape) != change.shape:
            raise CheckpointError(f"{name}: has shape {list(tensor.shape)}, the adapter's is {list(change.shape)}")
    source.release()


def _relative(changed: Tensor, tensor: Tensor) -> float:
    return float((changed.float() - tensor.float()).norm() / tensor.float().norm().clamp_min(1e-30))
