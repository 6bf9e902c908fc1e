"""Plans made by hand, as the scheduler would make them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from octavo.engine.interface import Runner
from octavo.protocol.messages import SamplingParams
from octavo.scheduling.plan import PENDING, Sampled, SequenceStep, StepPlan

BLOCKS = 8  # of each slot


def step(
    slot: int,
    token_ids: Sequence[int],
    *,
    params: SamplingParams,
    start: int = 0,
    prompt_len: int | None = None,
    history: Sequence[int] | None = None,
    sample: bool = True,
    num_outputs: int = 0,
) -> SequenceStep:
    """A part of a sequence whose blocks follow from its slot. Fresh if a history is given."""
    return SequenceStep(
        seq_id=100 + slot,
        slot=slot,
        fresh=history is not None,
        start=start,
        token_ids=token_ids,
        block_table=list(range(slot * BLOCKS, (slot + 1) * BLOCKS))[: -(-(start + len(token_ids)) // 64)],
        sample=sample,
        num_outputs=num_outputs,
        prompt_len=len(token_ids) if prompt_len is None else prompt_len,
        params=params,
        history=history or (),
    )


def params(**values: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 100, "min_tokens": 0, "temperature": 0.0, **values})


@dataclass
class Driver:
    """Runs one sequence in a slot, a step ahead as the engine does."""

    runner: Runner
    slot: int = 0
    step_id: int = 0
    results: list[Sampled] = field(default_factory=list)

    def run(
        self, prompt: Sequence[int], wanted: SamplingParams, *, count: int, generated: Sequence[int] = ()
    ) -> list[int]:
        """Token ids of `count` steps; `generated` were sampled before (a preempted or resumed sequence)."""
        known = [*prompt, *generated]
        first = step(self.slot, known, params=wanted, prompt_len=len(prompt), history=known, num_outputs=len(generated))
        self._submit(first)
        sampled = []
        for index in range(1, count + 1):
            if index < count:
                later = step(
                    self.slot,
                    [PENDING],
                    params=wanted,
                    start=len(known) + index - 1,
                    prompt_len=len(prompt),
                    num_outputs=len(generated) + index,
                )
                self._submit(later)
            (result,) = self.runner.collect().sampled
            assert result is not None
            sampled.append(result)
        self.results = sampled
        return [result.token_id for result in sampled]

    def _submit(self, sequence: SequenceStep) -> None:
        self.step_id += 1
        self.runner.submit(StepPlan(self.step_id, [sequence]))
