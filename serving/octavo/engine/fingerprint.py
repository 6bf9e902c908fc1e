"""A fingerprint of all that decides a sequence's bits: the model folder, settings that change arithmetic, the version.

A sequence may be resumed only where the fingerprint is the same. Computed by the engine and by front ends, so no torch
here; it reads file sizes, small files and safetensors headers, never weights: milliseconds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from octavo import __version__
from octavo.settings import Settings

MAX_HEADER_BYTES = 100 << 20
MAX_SMALL_FILE = 64 << 20
SMALL_SUFFIXES = {".json", ".jinja", ".model", ".txt"}
FIELDS = ("weight_quant", "head_quant", "dtype", "use_cache_kv_int8", "mp_num", "device", "kernels", "block_size")


def fingerprint(settings: Settings) -> str:
    """32 hex digits. A folder that cannot be read counts as its name: the load will say what is wrong."""
    hasher = hashlib.blake2b(digest_size=16)
    chosen = {name: getattr(settings, name) for name in FIELDS}
    _add(hasher, __version__.encode())
    _add(hasher, json.dumps(chosen, sort_keys=True).encode())
    for part in _model_parts(Path(settings.model_dir), settings.model_config_path):
        _add(hasher, part)
    return hasher.hexdigest()


def _add(hasher: hashlib.blake2b, part: bytes) -> None:
    """Length first, so that no two lists of parts look alike."""
    hasher.update(len(part).to_bytes(8, "little"))
    hasher.update(part)


def _model_parts(folder: Path, config: Path) -> Iterator[bytes]:
    try:
        paths = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError:
        yield str(folder).encode()
        return
    for path in paths if config.parent == folder else [*paths, config]:
        if path.suffix in SMALL_SUFFIXES or path.suffix == ".safetensors":
            yield path.name.encode()
            yield from _file_parts(path)


def _file_parts(path: Path) -> Iterator[bytes]:
    try:
        status = path.stat()
        yield str(status.st_size).encode()
        if path.suffix == ".safetensors":
            yield str(status.st_mtime_ns).encode()
            yield _header(path, status.st_size)
        elif status.st_size <= MAX_SMALL_FILE:
            yield path.read_bytes()
        else:
            yield str(status.st_mtime_ns).encode()
    except OSError as error:
        yield f"unreadable {error.errno}".encode()


def _header(path: Path, size: int) -> bytes:
    """The JSON header of a safetensors file, as it is; what is not one gives its first bytes."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return file.read(min(length, size, MAX_HEADER_BYTES))
