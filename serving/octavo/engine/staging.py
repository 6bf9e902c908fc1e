"""Small arrays to the device in one copy a step, and results back, without waiting for either.

Used by the GPU runner's worker thread. A step's arrays lie one behind the other in host memory that the device copies
from by itself; a ring of such memory keeps what is still being copied from being written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.engine.device_queue import DeviceQueue, Mark

ALIGNMENT = 256  # bytes; kernels load 16 at once
RING = 4  # uploads whose copies may be under way: two steps, and one to spare for each

_TORCH_TYPES = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64, np.dtype(np.float32): torch.float32}


class Staging:
    """Uploads. Arrays of the same shapes, in the same order, land at the same addresses while the memory suffices."""

    def __init__(self, queue: DeviceQueue, *, num_bytes: int = 1 << 16) -> None:
        self._queue = queue
        self._turn = 0
        self._allocate(num_bytes)

    def put(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
        """int32, int64 and float32 arrays on the device, under their names. Good until the next `put`."""
        offsets, total = _offsets(arrays)
        if total > len(self._device):
            self._allocate(2 * total)
        host, copied = self._ring[self._turn], self._copied[self._turn]
        if copied is not None and not copied.passed():
            copied.wait()  # steps that failed may have left more copies under way than steps can
        memory = host.numpy()
        for name, array in arrays.items():
            flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            memory[offsets[name] : offsets[name] + len(flat)] = flat
        self._device[:total].copy_(host[:total], non_blocking=True)
        self._copied[self._turn] = self._queue.mark()
        self._turn = (self._turn + 1) % RING
        return {name: self._view(offsets[name], array) for name, array in arrays.items()}

    def _view(self, offset: int, array: NDArray[Any]) -> Tensor:
        part = self._device[offset : offset + array.nbytes]
        return part.view(_TORCH_TYPES[array.dtype]).view(array.shape)

    def _allocate(self, num_bytes: int) -> None:
        self._ring = [self._queue.host_memory(num_bytes) for _ in range(RING)]
        self._copied: list[Mark | None] = [None] * RING  # behind the copy out of each
        self._device = torch.zeros(num_bytes, dtype=torch.uint8, device=self._queue.device)


def _offsets(arrays: Mapping[str, NDArray[Any]]) -> tuple[dict[str, int], int]:
    """Where each array starts, and the bytes of all."""
    offsets, total = {}, 0
    for name, array in arrays.items():
        offsets[name] = total
        total += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    return offsets, total


class Download:
    """Tensors on their way to the host."""

    def __init__(self, queue: DeviceQueue, tensors: Mapping[str, Tensor]) -> None:
        self._host = {name: _started(queue, tensor) for name, tensor in tensors.items()}
        self._mark = queue.mark()

    def arrived(self) -> bool:
        """Never waits."""
        return self._mark.passed()

    def lists(self) -> dict[str, list[Any]]:
        """The tensors as lists; waits until they are there."""
        self._mark.wait()
        return {name: tensor.tolist() for name, tensor in self._host.items()}


def _started(queue: DeviceQueue, tensor: Tensor) -> Tensor:
    memory = queue.host_memory(tensor.numel() * tensor.element_size())
    host = memory.view(tensor.dtype).view(tensor.shape)
    host.copy_(tensor, non_blocking=True)
    return host
