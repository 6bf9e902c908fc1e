"""Loads a compiled library and holds what every CPU mixin needs: the functions, the thread pool, argument checks,
memory.

Calls come from one thread at a time; ctypes releases the interpreter lock while native code runs. Knows nothing of
what the functions compute: each mixin module lists its own in SIGNATURES.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

_LETTERS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float, "d": ctypes.c_double}
_HUGE_PAGE = 2 << 20
_CHUNK = 32 << 20
_LARGE = 8 << 20  # bytes of a result that gets huge pages


class CpuBase:
    """What the mixins share. `_lib` has the native functions as attributes; `_pool` is the first argument of each.

    `_quick` has the same functions for calls of microseconds: it keeps the interpreter lock. A thread that gives it up
    between two steps may get it back only when the engine's loop has done its work.
    """

    name: str
    device: torch.device
    _lib: ctypes.CDLL
    _quick: ctypes.PyDLL
    _pool: int
    _memory: WeightMemory


Library = TypeVar("Library", bound=ctypes.CDLL)


def load_library(
    path: Path,
    signatures: Mapping[str, str],
    *,
    opener: Callable[[str], Library] = ctypes.CDLL,  # type: ignore[assignment]
) -> Library:
    """Open `path` and declare its functions: one letter an argument (p pointer, i int64, f float, d double), all
    returning nothing.

    Raises OSError if the file is missing or not for this machine, AttributeError if a function is missing.
    """
    library = opener(str(path))
    library.octavo_pool_create.argtypes = [ctypes.c_int64, ctypes.c_int64]
    library.octavo_pool_create.restype = ctypes.c_void_p
    library.octavo_pool_destroy.argtypes = [ctypes.c_void_p]
    library.octavo_pool_destroy.restype = None
    for name, letters in signatures.items():
        function = getattr(library, name)
        function.argtypes = [_LETTERS[letter] for letter in letters]
        function.restype = None
    return library


def create_pool(library: ctypes.CDLL, num_threads: int, *, tiles: bool, owner: object) -> int:
    """A pool of `num_threads` (the caller is one of them) that ends with `owner`.

    Raises OSError if `tiles` (AMX) are wanted and Linux, or the compiler of the library, does not give them.
    """
    if not 1 <= num_threads <= 1024:
        raise ValueError(f"num_threads must be from 1 to 1024, not {num_threads}")
    handle = library.octavo_pool_create(num_threads, int(tiles))
    if handle is None:
        raise OSError("tile registers are not to be had: they need Linux 5.16 and a library built by g++ 11")
    weakref.finalize(owner, library.octavo_pool_destroy, handle)
    return int(handle)


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a tensor's first element; None stays None (a null pointer)."""
    return None if tensor is None else tensor.data_ptr()


def checked(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], name: str) -> Tensor:
    """`tensor`, contiguous, if it has this type and shape (-1: any); native code trusts both. Raises ValueError."""
    matches = len(shape) == tensor.dim() and all(want in (-1, have) for want, have in zip(shape, tensor.shape))
    if tensor.dtype != dtype or not matches or tensor.device.type != "cpu":
        raise ValueError(f"{name} must be {dtype} {list(shape)} on the cpu, not {tensor.dtype} {list(tensor.shape)}")
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def empty_floats(rows: int, width: int) -> Tensor:
    """[rows, width] float32 without contents. Unlike torch.empty this keeps the interpreter lock."""
    return torch.from_numpy(np.empty((rows, width), dtype=np.float32))


def empty_result(library: ctypes.CDLL, rows: int, width: int) -> Tensor:
    """[rows, width] float32 without contents, on huge pages where it is large: a fault per 4 kB costs a third of a
    product.
    """
    result = torch.empty(rows, width, dtype=torch.float32)
    if rows * width * 4 >= _LARGE:
        start = result.data_ptr() + -result.data_ptr() % _HUGE_PAGE
        library.octavo_advise_huge_pages(start, result.data_ptr() + rows * width * 4 - start)
    return result


class WeightMemory:
    """Hands out 64-byte aligned memory for weights from large chunks that ask for huge pages (they raise read
    bandwidth).
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._advise = library.octavo_advise_huge_pages
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor without contents. It keeps its chunk alive."""
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        if num_bytes > self._chunk.numel() - self._used:
            if num_bytes > _CHUNK // 4:
                return self._new_chunk(num_bytes)[:num_bytes].view(dtype).view(shape)
            self._chunk, self._used = self._new_chunk(_CHUNK), 0
        part = self._chunk[self._used : self._used + num_bytes]
        self._used += (num_bytes + 63) // 64 * 64
        return part.view(dtype).view(shape)

    def _new_chunk(self, num_bytes: int) -> Tensor:
        raw = torch.empty(num_bytes + _HUGE_PAGE, dtype=torch.uint8)
        start = -raw.data_ptr() % _HUGE_PAGE
        chunk = raw[start : start + num_bytes]
        self._advise(chunk.data_ptr(), num_bytes)
        return chunk
