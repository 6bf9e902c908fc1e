"""The waiting queue: by priority, then in turns. Engine thread only.

Within a priority the preempted come first, in order of arrival. The others take turns by tenant: the first of each,
then the second of each, so that a tenant with a long queue delays another one's request by one turn. Within a tenant
it is first come, first served.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict

from octavo.scheduling.sequence import Sequence, State

_Line = OrderedDict[int, Sequence]  # by arrival


class _Level:
    """The queue of one priority. A tenant without a sequence in it is not in `turns`."""

    __slots__ = ("preempted", "turns")

    def __init__(self) -> None:
        self.preempted: list[Sequence] = []  # by arrival; no more than run at once
        self.turns: OrderedDict[str, _Line] = OrderedDict()  # the first tenant is next

    def push(self, seq: Sequence) -> None:
        if seq.has_run:
            insort(self.preempted, seq, key=lambda other: other.arrival)
            return
        line = self.turns.get(seq.tenant)
        if line is None:
            line = self.turns[seq.tenant] = OrderedDict()
        line[seq.arrival] = seq

    def peek(self) -> Sequence:
        if self.preempted:
            return self.preempted[0]
        line = next(iter(self.turns.values()))
        return next(iter(line.values()))

    def remove(self, seq: Sequence) -> bool:
        """Take out anyone. Whether nobody is left."""
        if seq.has_run:
            self.preempted.remove(seq)
        else:
            line = self.turns[seq.tenant]
            del line[seq.arrival]
            if not line:
                del self.turns[seq.tenant]
        return not self.preempted and not self.turns

    def end_turn(self, tenant: str) -> None:
        """The tenant is served last from now on."""
        if tenant in self.turns:
            self.turns.move_to_end(tenant)


class WaitingQueue:
    """All operations take constant time, apart from the number of priorities and of preempted sequences."""

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}  # none is empty
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(self, seq: Sequence) -> None:
        level = self._levels.get(seq.priority)
        if level is None:
            level = self._levels[seq.priority] = _Level()
        level.push(seq)
        self._length += 1

    def peek(self) -> Sequence | None:
        """The sequence that is next to run, or None."""
        return self._levels[min(self._levels)].peek() if self._levels else None

    def pop(self) -> Sequence:
        """Take what `peek` showed. IndexError if there is none."""
        seq = self.peek()
        if seq is None:
            raise IndexError("nobody waits")
        self._remove(seq)
        if not seq.has_run and seq.priority in self._levels:
            self._levels[seq.priority].end_turn(seq.tenant)
        return seq

    def discard(self, seq: Sequence) -> None:
        """Take out a queued sequence whose state is no longer WAITING."""
        assert seq.state is not State.WAITING
        self._remove(seq)

    def _remove(self, seq: Sequence) -> None:
        if self._levels[seq.priority].remove(seq):
            del self._levels[seq.priority]
        self._length -= 1
