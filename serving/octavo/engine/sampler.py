"""How each running sequence samples: one row of state per slot, turned into `SamplingRows` for a step.

Owned by the runner's worker thread. Token counts are kept only for sequences with penalties; the kernels draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from octavo.kernels.interface import SamplingRows
from octavo.protocol.messages import SamplingParams
from octavo.scheduling.plan import SequenceStep

BAN = float("-inf")


class SeenTokens:
    """The tokens that penalties look at, each once, and how often each is in the output (0: in the prompt only)."""

    def __init__(self) -> None:
        self._place: dict[int, int] = {}
        self._ids = np.empty(256, dtype=np.int32)
        self._counts = np.empty(256, dtype=np.int32)

    def add(self, token_id: int, *, count: int) -> None:
        """See a token once more: count 1 in the output, 0 in the prompt."""
        place = self._place.get(token_id)
        if place is None:
            place = self._place[token_id] = len(self._place)
            if place == len(self._ids):
                self._ids, self._counts = np.resize(self._ids, 2 * place), np.resize(self._counts, 2 * place)
            self._ids[place], self._counts[place] = token_id, 0
        self._counts[place] += count

    def arrays(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Ids and counts; views that the next `add` may change."""
        return self._ids[: len(self._place)], self._counts[: len(self._place)]


class SlotStates:
    """Sampling state of every slot, and the last token sampled in it."""

    def __init__(self, num_slots: int) -> None:
        self.last_token = np.zeros(num_slots, dtype=np.int64)
        self._temperature = np.zeros(num_slots, dtype=np.float32)
        self._top_p = np.ones(num_slots, dtype=np.float32)
        self._top_k = np.zeros(num_slots, dtype=np.int32)
        self._min_p = np.zeros(num_slots, dtype=np.float32)
        self._seed = np.zeros(num_slots, dtype=np.int64)
        self._repetition = np.ones(num_slots, dtype=np.float32)
        self._frequency = np.zeros(num_slots, dtype=np.float32)
        self._presence = np.zeros(num_slots, dtype=np.float32)
        self._seen: list[SeenTokens | None] = [None] * num_slots
        self._prompts: list[Sequence[int]] = [()] * num_slots

    def start(self, step: SequenceStep) -> None:
        """Take over a slot for a sequence that is fresh in it."""
        slot, params = step.slot, step.params
        self._temperature[slot] = params.temperature
        self._top_p[slot] = params.top_p
        self._top_k[slot] = params.top_k
        self._min_p[slot] = params.min_p
        self._seed[slot] = np.uint64(params.seed & 0xFFFF_FFFF_FFFF_FFFF).astype(np.int64)
        self._repetition[slot] = params.repetition_penalty
        self._frequency[slot] = params.frequency_penalty
        self._presence[slot] = params.presence_penalty
        self._seen[slot] = _seen_tokens(step)
        self._prompts[slot] = step.history[: step.prompt_len] if params.prompt_logprobs >= 0 else ()
        if len(step.history):
            self.last_token[slot] = step.history[-1]

    def release(self, slot: int) -> None:
        """Forget the sequence of a slot."""
        self._seen[slot] = None
        self._prompts[slot] = ()

    def prompt(self, slot: int) -> Sequence[int]:
        """The prompt of the sequence in a slot; kept only if it wants prompt logprobs."""
        return self._prompts[slot]

    def record(self, slot: int, token_id: int) -> None:
        """A token was sampled."""
        self.last_token[slot] = token_id
        seen = self._seen[slot]
        if seen is not None:
            seen.add(token_id, count=1)

    def rows(self, steps: Sequence[SequenceStep], *, device: torch.device) -> SamplingRows:
        """State of the sequences to sample, one row each, in order."""
        slots = np.fromiter((step.slot for step in steps), dtype=np.int64, count=len(steps))
        position = np.fromiter((step.num_outputs for step in steps), dtype=np.int64, count=len(steps))
        seen_start, (seen_ids, seen_counts) = _lists([self._seen_arrays(step.slot) for step in steps], np.int32)
        bias_start, (bias_ids, bias_values) = _lists([_biases(step) for step in steps], np.float32)

        def on_device(array: NDArray[Any]) -> torch.Tensor:
            return torch.from_numpy(array).to(device)

        return SamplingRows(
            temperature=on_device(self._temperature[slots]),
            top_p=on_device(self._top_p[slots]),
            top_k=on_device(self._top_k[slots]),
            min_p=on_device(self._min_p[slots]),
            seed=on_device(self._seed[slots]),
            position=on_device(position),
            repetition_penalty=on_device(self._repetition[slots]),
            frequency_penalty=on_device(self._frequency[slots]),
            presence_penalty=on_device(self._presence[slots]),
            seen_start=on_device(seen_start),
            seen_ids=on_device(seen_ids),
            seen_counts=on_device(seen_counts),
            bias_start=on_device(bias_start),
            bias_ids=on_device(bias_ids),
            bias_values=on_device(bias_values),
        )

    def _seen_arrays(self, slot: int) -> tuple[NDArray[Any], NDArray[Any]]:
        seen = self._seen[slot]
        return EMPTY if seen is None else seen.arrays()


EMPTY: tuple[NDArray[Any], NDArray[Any]] = (np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int32))


def _lists(
    rows: list[tuple[NDArray[Any], NDArray[Any]]], value_type: type
) -> tuple[NDArray[Any], tuple[NDArray[Any], NDArray[Any]]]:
    """Pairs of arrays per row as one: starts [B + 1] int32, then ids int32 and values."""
    start = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(ids) for ids, _ in rows], out=start[1:])
    ids = np.concatenate([EMPTY[0], *(ids for ids, _ in rows)]).astype(np.int32)
    values = np.concatenate([EMPTY[1], *(values for _, values in rows)]).astype(value_type)
    return start, (ids, values)


def _seen_tokens(step: SequenceStep) -> SeenTokens | None:
    """Counts of a fresh sequence, or None if none of its penalties does anything."""
    params = step.params
    repeats = params.repetition_penalty != 1.0
    if not (repeats or params.frequency_penalty or params.presence_penalty):
        return None
    seen = SeenTokens()
    if repeats:
        for token_id in step.history[: step.prompt_len]:
            seen.add(token_id, count=0)
    for token_id in step.history[step.prompt_len :]:
        seen.add(token_id, count=1)
    return seen


def _biases(step: SequenceStep) -> tuple[NDArray[Any], NDArray[Any]]:
    """Biases of one row, each token once: logit_bias, and end tokens banned below min_tokens."""
    params: SamplingParams = step.params
    banned = params.end_token_ids if step.num_outputs < params.min_tokens else ()
    if not banned and not params.logit_bias:
        return EMPTY
    biases = {**params.logit_bias, **dict.fromkeys(banned, BAN)}
    return np.array(list(biases), dtype=np.int32), np.array(list(biases.values()), dtype=np.float32)
