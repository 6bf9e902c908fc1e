"""Blocks and slots in use, and those on their way back. Engine thread only.

What a plan under way refers to must not be handed out again before that plan is committed: `release` keeps it until
then. Knows step numbers, not sequences or plans.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from octavo.scheduling.block_pool import BlockPool


@dataclass(slots=True)
class _Deferred:
    """Given back once step `step_id` is committed."""

    step_id: int
    blocks: list[int]
    slot: int


class Holdings:
    """The pool, the free slots and what is deferred."""

    def __init__(self, pool: BlockPool, *, num_slots: int) -> None:
        self.pool = pool
        self.num_coming = 0  # blocks that will be available once the steps under way are committed
        self._num_slots = num_slots
        self._slots = list(range(num_slots - 1, -1, -1))
        self._evicted: list[int] = []  # slots given back since the last plan
        self._deferred: list[_Deferred] = []
        self._committed = 0

    @property
    def has_slot(self) -> bool:
        return bool(self._slots)

    def take_slot(self) -> int:
        return self._slots.pop()

    def release(self, blocks: list[int], slot: int, *, last_step: int) -> None:
        """Give back at once, or after step `last_step`, the newest plan that refers to them."""
        if last_step <= self._committed:
            self._give_back(blocks, slot)
        else:
            self.num_coming += self.pool.count_exclusive(blocks)
            self._deferred.append(_Deferred(last_step, blocks, slot))

    def begin_commit(self, step_id: int) -> None:
        """What is released from now on needs no longer wait for this step."""
        self._committed = step_id

    def end_commit(self) -> None:
        """Give back what only committed steps referred to."""
        if not self._deferred:
            return
        for entry in self._deferred:
            if entry.step_id <= self._committed:
                self._give_back(entry.blocks, entry.slot)
        self._deferred = [entry for entry in self._deferred if entry.step_id > self._committed]
        self.num_coming = sum(self.pool.count_exclusive(entry.blocks) for entry in self._deferred)

    def _give_back(self, blocks: list[int], slot: int) -> None:
        self.pool.free(blocks)
        self._slots.append(slot)
        self._evicted.append(slot)

    def hand_over_evicted(self, *, but: Collection[int]) -> list[int]:
        """Slots given back since the last call, without those that are filled anew."""
        evicted, self._evicted = self._evicted, []
        return [slot for slot in evicted if slot not in but]

    def check_integrity(self, tables: list[list[int]], slots: list[int]) -> None:
        """AssertionError if pool, deferred and the tables and slots of running sequences do not add up."""
        self.pool.check_integrity()
        references = [0] * self.pool.num_blocks
        for table in [*tables, *(entry.blocks for entry in self._deferred)]:
            for block in table:
                references[block] += 1
        assert tuple(references) == self.pool.references, "references and tables differ"
        held = [*self._slots, *slots, *(entry.slot for entry in self._deferred)]
        assert sorted(held) == list(range(self._num_slots)), "a slot is lost or held twice"
