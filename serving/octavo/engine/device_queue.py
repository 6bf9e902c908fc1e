"""The one stream of work of a device, as the GPU runner sees it: memory to copy from, marks in the stream, captures.

`CudaQueue` is a CUDA stream with pinned memory and graphs. `ImmediateQueue` does the same at once on any torch device,
so that the runner on top can be tested where there is no card. Used by the runner's worker thread alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

Body = Callable[[], None]  # work on fixed memory, the same operations every time


class Mark(Protocol):
    """A place in the stream."""

    def passed(self) -> bool:
        """Whether all work before it is done. Never waits."""
        ...

    def wait(self) -> None:
        """Block until it is."""
        ...


class DeviceQueue(Protocol):
    """Work in order. Nothing here waits for the device, except `Mark.wait`."""

    device: torch.device

    def entered(self) -> AbstractContextManager[object]:
        """While inside, torch's work of this thread goes to this stream."""
        ...

    def host_memory(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8 on the host that copies to and from the device need not wait for."""
        ...

    def mark(self) -> Mark:
        """A mark behind all work so far."""
        ...

    def capture(self, body: Body) -> Body:
        """Run `body` and record it; what is returned does the same again on the same memory.

        Raises torch.OutOfMemoryError, after which the queue works as before.
        """
        ...

    def release_memory(self) -> None:
        """Give back what is held for later."""
        ...


class _Passed:
    def passed(self) -> bool:
        return True

    def wait(self) -> None:
        return


class ImmediateQueue:
    """Everything is done when a call returns, and a recorded body is run again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def entered(self) -> AbstractContextManager[object]:
        return nullcontext()

    def host_memory(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def mark(self) -> Mark:
        return _Passed()

    def capture(self, body: Body) -> Body:
        body()
        return body

    def release_memory(self) -> None:
        return


def out_of_memory(error: BaseException | None) -> bool:
    """Whether a device had no memory left: torch has a class for it, the driver and triton-lang only words."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


class _CudaMark:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def passed(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        self._event.synchronize()


class CudaQueue:
    """A stream of a CUDA device of its own; all graphs share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.cuda.synchronize(device)  # what was loaded on the default stream is there
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._records = True

    def entered(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def host_memory(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def mark(self) -> Mark:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return _CudaMark(event)

    def capture(self, body: Body) -> Body:
        """Twice without recording: kernels are compiled, and the allocator holds what they need."""
        if not self._records:
            body()
            return body
        for _ in range(2):
            body()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                body()
        except RuntimeError as error:  # ending a recording that found no memory may fail in other words
            self._records = isinstance(error, torch.OutOfMemoryError)  # else the allocator takes it for under way still
            if out_of_memory(error) or out_of_memory(error.__context__):
                raise torch.OutOfMemoryError(str(error)) from error
            raise
        graph.replay()  # recording alone computes nothing
        return graph.replay

    def release_memory(self) -> None:
        torch.cuda.empty_cache()
