"""The waiting queue: by priority, then by arrival. Engine thread only.

A heap with lazy deletion: a sequence that ends while it waits is counted out at once and dropped when it surfaces, or
when dead entries outnumber the living. A preempted sequence keeps its arrival number, so it comes back in front of all
that never ran.
"""

from __future__ import annotations

import heapq

from octavo.scheduling.sequence import Sequence, State


class WaitingQueue:
    """push and pop are O(log n), discard O(1) amortised."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Sequence]] = []
        self._num_dead = 0

    def __len__(self) -> int:
        return len(self._heap) - self._num_dead

    def push(self, seq: Sequence) -> None:
        heapq.heappush(self._heap, (seq.priority, seq.arrival, seq))

    def peek(self) -> Sequence | None:
        """The sequence that is next to run, or None."""
        while self._heap and self._heap[0][2].state is not State.WAITING:
            heapq.heappop(self._heap)
            self._num_dead -= 1
        return self._heap[0][2] if self._heap else None

    def pop(self) -> Sequence:
        """Take what `peek` showed. IndexError if there is none."""
        self.peek()
        return heapq.heappop(self._heap)[2]

    def discard(self, seq: Sequence) -> None:
        """Count out a queued sequence whose state is no longer WAITING."""
        assert seq.state is not State.WAITING
        self._num_dead += 1
        if self._num_dead > 16 and self._num_dead * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2].state is State.WAITING]
            heapq.heapify(self._heap)
            self._num_dead = 0
