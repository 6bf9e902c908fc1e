"""What was drawn in a step, as the scheduler wants it: drafts that came true, log probabilities, one entry a sequence.

Pure Python on lists; shared by the runners of all devices and called by their worker threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from octavo.protocol.messages import TokenLogprobs
from octavo.scheduling.plan import Sampled, SequenceStep


def rows_of(steps: Sequence[SequenceStep]) -> Iterator[tuple[int, SequenceStep]]:
    """Each row of logits and the step that it belongs to: one a step, and one more for each draft."""
    return enumerate(step for step in steps for _ in range(step.num_drafts + 1))


def accept(
    steps: Sequence[SequenceStep], results: list[Sampled], record: Callable[[int, int], None]
) -> list[Sampled | None]:
    """The token drawn for each step, with those after it as far as its drafts came true.

    results: of all rows, as if every draft came true. `record(slot, token_id)` is told of each token that stands.
    """
    if len(results) == len(steps):
        for step, result in zip(steps, results):
            record(step.slot, result.token_id)
        return list(results)
    accepted: list[Sampled | None] = []
    first = 0
    for step in steps:
        last = first
        for draft in step.drafts:
            if results[last].token_id != draft:
                break
            last += 1
        for result in results[first : last + 1]:
            record(step.slot, result.token_id)
        results[first].more = results[first + 1 : last + 1]
        accepted.append(results[first])
        first += step.num_drafts + 1
    return accepted


def spread(steps: Sequence[SequenceStep], drawn: Sequence[Sampled | None]) -> list[Sampled | None]:
    """`drawn` in the places of the steps that sample, None in the others."""
    rest = iter(drawn)
    return [next(rest) if step.sample else None for step in steps]


def logprob_entries(
    token_ids: Sequence[int], columns: Sequence[Sequence[Any]], num_tops: Sequence[int]
) -> list[TokenLogprobs]:
    """Entries for tokens, from the lists of `Kernels.logprobs`, each with as many top tokens as it asked for."""
    return [
        TokenLogprobs(token_id, logprob, rank, tuple(top_ids[:top]), tuple(top_logprobs[:top]))
        for token_id, logprob, rank, top_ids, top_logprobs, top in zip(token_ids, *columns, num_tops)
    ]
