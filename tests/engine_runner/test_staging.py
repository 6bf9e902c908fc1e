"""Uploads: memory that is still being copied is never written, however many copies are under way."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from octavo.engine.device_queue import ImmediateQueue
from octavo.engine.staging import RING, Download, Staging


class LateMark:
    """Passes when it is waited for: all that was queued up to it then happens."""

    def __init__(self, happen: Callable[[], None]) -> None:
        self._happen = happen
        self.done = False

    def passed(self) -> bool:
        return self.done

    def wait(self) -> None:
        self._happen()
        self.done = True


class LateQueue(ImmediateQueue):
    """Remembers whose memory was handed out, and counts waits."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.waits = 0
        self.hosts: list[Tensor] = []

    def host_memory(self, num_bytes: int) -> Tensor:
        self.hosts.append(super().host_memory(num_bytes))
        return self.hosts[-1]

    def mark(self) -> LateMark:
        def happen() -> None:
            self.waits += 1

        return LateMark(happen)


def test_memory_comes_again_only_after_its_copy() -> None:
    queue = LateQueue()
    staging = Staging(queue, num_bytes=256)
    for turn in range(RING):
        staging.put({"a": np.array([turn], dtype=np.int32)})
    assert queue.waits == 0
    assert [int(host[0]) for host in queue.hosts] == list(range(RING))
    staging.put({"a": np.array([99], dtype=np.int32)})
    assert queue.waits == 1
    assert int(queue.hosts[0][0]) == 99


def test_arrays_keep_their_places_and_grow_when_they_must() -> None:
    staging = Staging(LateQueue(), num_bytes=512)
    first = staging.put({"a": np.arange(3, dtype=np.int64), "b": np.ones(2, dtype=np.float32)})
    places = {name: tensor.data_ptr() for name, tensor in first.items()}
    again = staging.put({"a": np.arange(3, dtype=np.int64) * 2, "b": np.zeros(2, dtype=np.float32)})
    assert {name: tensor.data_ptr() for name, tensor in again.items()} == places
    assert again["a"].tolist() == [0, 2, 4]
    large = staging.put({"a": np.arange(1000, dtype=np.int32)})
    assert large["a"].tolist() == list(range(1000))


def test_results_of_all_shapes_come_back_in_one_copy() -> None:
    queue, wide = LateQueue(), torch.arange(12).view(3, 4)
    tensors = {
        "odd": torch.tensor([0.5]),
        "column": wide[:, :1],
        "one of one": wide[1:2, :1],
        "nothing": wide[:, :0],
        "floats": wide.T.float(),
        "ids": wide[0],
    }
    download = Download(queue, tensors)
    assert len(queue.hosts) == 1
    assert download.lists() == {name: tensor.tolist() for name, tensor in tensors.items()}
    assert Download(queue, {}).lists() == {}
    assert len(queue.hosts) == 1
