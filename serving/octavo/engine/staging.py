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
RING = 4  # uploads whose copies may be under way: two steps, and two to spare

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
        if total > len(self.memory):
            self._allocate(2 * total)
        host, copied = self._ring[self._turn], self._copied[self._turn]
        if copied is not None and not copied.passed():
            copied.wait()  # steps that failed may have left more copies under way than steps can
        memory = host.numpy()
        for name, array in arrays.items():
            flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            memory[offsets[name] : offsets[name] + len(flat)] = flat
        self.memory[:total].copy_(host[:total], non_blocking=True)
        self._copied[self._turn] = self._queue.mark()
        self._turn = (self._turn + 1) % RING
        return views(self.memory, arrays)

    def _allocate(self, num_bytes: int) -> None:
        self._ring = [self._queue.host_memory(num_bytes) for _ in range(RING)]
        self._copied: list[Mark | None] = [None] * RING  # behind the copy out of each
        self.memory = torch.zeros(num_bytes, dtype=torch.uint8, device=self._queue.device)


def views(memory: Tensor, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    """Where arrays lie that were put there: [num_bytes] uint8 on the device, from its start."""
    offsets, _ = _offsets(arrays)
    parts = {name: memory[offsets[name] : offsets[name] + array.nbytes] for name, array in arrays.items()}
    return {name: parts[name].view(_TORCH_TYPES[array.dtype]).view(array.shape) for name, array in arrays.items()}


def staged_bytes(arrays: Mapping[str, NDArray[Any]]) -> int:
    """How much of the memory they take."""
    return _offsets(arrays)[1]


def _offsets(arrays: Mapping[str, NDArray[Any]]) -> tuple[dict[str, int], int]:
    """Where each array starts, and the bytes of all."""
    offsets, total = {}, 0
    for name, array in arrays.items():
        offsets[name] = total
        total += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    return offsets, total


class Download:
    """Tensors on their way to the host, all in one copy."""

    def __init__(self, queue: DeviceQueue, tensors: Mapping[str, Tensor]) -> None:
        """Of no tensors, it still marks the end of the work so far."""
        # The widest numbers first: so all lie at multiples of their size.
        self._tensors = sorted(tensors.items(), key=lambda item: -item[1].element_size())
        self._host = self._started(queue)
        self._mark = queue.mark()

    def _started(self, queue: DeviceQueue) -> Tensor | None:
        parts = [tensor.contiguous().view(-1).view(torch.uint8) for _, tensor in self._tensors]
        if not parts:
            return None
        packed = parts[0] if len(parts) == 1 else torch.cat(parts)
        host = queue.host_memory(len(packed))
        return host.copy_(packed, non_blocking=True)

    def arrived(self) -> bool:
        """Never waits."""
        return self._mark.passed()

    def lists(self) -> dict[str, list[Any]]:
        """The tensors as lists; waits until they are there."""
        self._mark.wait()
        found: dict[str, list[Any]] = {}
        first = 0
        for name, tensor in self._tensors:
            assert self._host is not None
            part = self._host[first : first + tensor.numel() * tensor.element_size()]
            found[name] = part.view(tensor.dtype).view(tensor.shape).tolist()
            first += len(part)
        return found
