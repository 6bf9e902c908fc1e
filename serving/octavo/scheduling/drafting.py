"""Adds drafts to a complete plan of one token for each sequence and nothing of prompts. Engine thread only.

Runs before the plan is handed to the runner. It finds room for drafts (tokens of the step, blocks, the sequence's
limit) and leaves to the drafter what is worth drafting. Verifying is the scheduler's, at commit.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from octavo.scheduling.block_pool import BLOCK_SIZE, BlockPool, num_blocks_for
from octavo.scheduling.plan import SequenceStep
from octavo.scheduling.sequence import Sequence
from octavo.scheduling.speculation import DraftBudget, Drafter


class Drafting:
    """Drafts of at most `most` tokens, in blocks of the pool that nobody needs."""

    def __init__(self, pool: BlockPool, *, most: int) -> None:
        self._pool = pool
        self._most = most
        self._drafter = Drafter()

    def measured(self, rows: int, seconds: float) -> None:
        """A step with one token for each sequence, and drafts, took this long."""
        self._drafter.costs.measured(rows, seconds)

    def lengthen(self, members: Seq[Sequence], steps: Seq[SequenceStep], *, room: int, spare: int) -> bool:
        """Add tokens that may come next to the steps of sequences that speculate. Whether there are any.

        room: tokens that fit the step. spare: blocks that must be left.
        """
        budget = self._drafter.budget(num_sequences=len(members), rows=len(members))
        if not budget.can_pay:
            return False
        drafts: list[tuple[int, list[int]]] = []
        for place, seq in enumerate(members):
            draft = self._propose(seq, room, budget) if room > 0 else []
            if draft:
                drafts.append((place, draft))
                room -= len(draft)
        if not budget.pays:
            return False
        return any([self._add(members[place], steps[place], draft, spare=spare) for place, draft in drafts])

    def _propose(self, seq: Sequence, room: int, budget: DraftBudget) -> list[int]:
        if seq.speculation is None:
            return []
        known, pending = seq.token_ids, seq.num_pending - 1  # one is pending because of the step that is planned now
        most = min(self._most, room, seq.limit - len(known) - seq.num_pending)
        return self._drafter.propose(seq.speculation, known, pending=bool(pending), most=most, budget=budget)

    def _add(self, seq: Sequence, step: SequenceStep, draft: list[int], *, spare: int) -> bool:
        """As much of a draft as there are blocks for without taking anyone's. False if that is nothing."""
        end = seq.num_computed + len(draft)
        wanted = num_blocks_for(end) - len(seq.blocks)
        if wanted > 0 and self._pool.can_allocate(wanted, spare=spare):
            blocks = self._pool.allocate(wanted)
            assert blocks is not None
            seq.grow(blocks)
            step.block_table = seq.block_view
        end = min(end, len(seq.blocks) * BLOCK_SIZE)
        step.num_drafts = end - seq.num_computed
        step.token_ids = [*step.token_ids, *draft[: step.num_drafts]]
        return step.num_drafts > 0
