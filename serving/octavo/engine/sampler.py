"""How each running sequence samples: one row of state per slot, turned into `SamplingRows` for a step.

Owned by the runner's worker thread. Token counts are kept only for sequences with penalties; the kernels draw. What
does not change while the same sequences run is made once, not every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.engine.step_tensors import on_device
from octavo.kernels.interface import SamplingRows
from octavo.protocol.messages import SamplingParams
from octavo.scheduling.plan import SequenceStep

BAN = float("-inf")

Lists = tuple[NDArray[Any], NDArray[Any]]  # ids int32, and a value for each
EMPTY: Lists = (np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int32))


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

    def arrays(self) -> Lists:
        """Ids and counts; views that the next `add` may change."""
        return self._ids[: len(self._place)], self._counts[: len(self._place)]

    def ahead(self, token_ids: Sequence[int]) -> list[Lists]:
        """Ids and counts as they are, and as they would be after each of `token_ids` came too."""
        ids, counts = self.arrays()
        rows, new = [(ids, counts)], dict[int, int]()
        for token_id in token_ids:
            place = self._place.get(token_id, new.get(token_id))
            if place is None:
                new[token_id] = len(ids)
                ids, counts = np.append(ids, np.int32(token_id)), np.append(counts, np.int32(1))
            else:
                counts = counts.copy()
                counts[place] += 1
            rows.append((ids, counts))
        return rows


@dataclass(slots=True)
class _Slot:
    """What a row of numbers does not hold of one sequence."""

    seen: SeenTokens | None = None
    bias: Lists = EMPTY  # the request's
    banning: Lists = EMPTY  # and end tokens banned
    min_tokens: int = 0
    num_recorded: int = 0  # output tokens whose ids are known here
    prompt: Sequence[int] = ()  # kept only for prompt logprobs

    def has_lists(self, num_outputs: int) -> bool:
        return self.seen is not None or len(self.bias[0]) > 0 or num_outputs < self.min_tokens


class SlotStates:
    """Sampling state of every slot, and the last token sampled in it."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.last_token = np.zeros(num_slots, dtype=np.int64)
        self._numbers: dict[str, NDArray[Any]] = {
            "temperature": np.zeros(num_slots, dtype=np.float32),
            "top_p": np.ones(num_slots, dtype=np.float32),
            "top_k": np.zeros(num_slots, dtype=np.int32),
            "min_p": np.zeros(num_slots, dtype=np.float32),
            "seed": np.zeros(num_slots, dtype=np.int64),
            "repetition_penalty": np.ones(num_slots, dtype=np.float32),
            "frequency_penalty": np.zeros(num_slots, dtype=np.float32),
            "presence_penalty": np.zeros(num_slots, dtype=np.float32),
        }
        self._slots = [_Slot() for _ in range(num_slots)]
        self._last_rows: tuple[list[int], SamplingRows] | None = None  # slots and rows; gone when a slot changes

    def start(self, step: SequenceStep) -> None:
        """Take over a slot for a sequence that is fresh in it."""
        slot, params = step.slot, step.params
        for name, column in self._numbers.items():
            if name != "seed":
                column[slot] = getattr(params, name)
        self._numbers["seed"][slot] = np.uint64(params.seed & 0xFFFF_FFFF_FFFF_FFFF).astype(np.int64)
        self._slots[slot] = _Slot(
            seen=_seen_tokens(step),
            bias=_biases(params, banned=()),
            banning=_biases(params, banned=params.end_token_ids),
            min_tokens=params.min_tokens if params.end_token_ids else 0,
            num_recorded=max(0, len(step.history) - step.prompt_len),
            prompt=step.history[: step.prompt_len] if params.prompt_logprobs >= 0 else (),
        )
        self._last_rows = None
        if len(step.history):
            self.last_token[slot] = step.history[-1]

    def release(self, slot: int) -> None:
        """Forget the sequence of a slot."""
        self._slots[slot] = _Slot()

    def prompt(self, slot: int) -> Sequence[int]:
        """The prompt of the sequence in a slot; kept only if it wants prompt logprobs."""
        return self._slots[slot].prompt

    def counts_awaited(self, steps: Sequence[SequenceStep]) -> bool:
        """Whether `rows` has a list whose last id is -1 - slot: it stands for a token that was not recorded yet."""
        return any(self._slots[step.slot].seen is not None and self._awaits(step) for step in steps)

    def _awaits(self, step: SequenceStep) -> bool:
        return step.num_outputs > self._slots[step.slot].num_recorded

    def record(self, slot: int, token_id: int) -> None:
        """A token was sampled."""
        self.last_token[slot] = token_id
        self._slots[slot].num_recorded += 1
        seen = self._slots[slot].seen
        if seen is not None:
            seen.add(token_id, count=1)

    def rows(self, steps: Sequence[SequenceStep], *, device: torch.device) -> SamplingRows:
        """State of the sequences to sample, in order: one row each, and one for each draft.

        The row after a draft is that of a sequence in which all drafts up to it came true.
        """
        slots, positions = _slots_and_positions(steps)
        if self._last_rows is None or self._last_rows[0] != slots:
            self._last_rows = slots, self._make_rows(slots, device)
        rows = replace(self._last_rows[1], position=on_device(np.array(positions, dtype=np.int64), device))
        if not any(self._slots[step.slot].has_lists(step.num_outputs) for step in steps):
            return rows
        seen_start, seen_ids, seen_counts = _csr([row for step in steps for row in self._seen(step)], np.int32, device)
        bias_start, bias_ids, bias_values = _csr(
            [row for step in steps for row in self._bias(step)], np.float32, device
        )
        return replace(
            rows,
            seen_start=seen_start,
            seen_ids=seen_ids,
            seen_counts=seen_counts,
            bias_start=bias_start,
            bias_ids=bias_ids,
            bias_values=bias_values,
        )

    def _make_rows(self, slots: list[int], device: torch.device) -> SamplingRows:
        """Rows without lists."""
        numbers = {name: on_device(column[slots], device) for name, column in self._numbers.items()}
        starts = torch.zeros(len(slots) + 1, dtype=torch.int32, device=device)
        none = torch.empty(0, dtype=torch.int32, device=device)
        return SamplingRows(
            **numbers,
            position=none,
            seen_start=starts,
            seen_ids=none,
            seen_counts=none,
            bias_start=starts,
            bias_ids=none,
            bias_values=none.float(),
        )

    def _seen(self, step: SequenceStep) -> list[Lists]:
        seen = self._slots[step.slot].seen
        if seen is None:
            return [EMPTY] * (step.num_drafts + 1)
        rows = seen.ahead(step.drafts)
        if not self._awaits(step):
            return rows
        newest = np.int32(-1 - step.slot)
        return [(np.append(ids, newest), np.append(counts, np.int32(1))) for ids, counts in rows]

    def _bias(self, step: SequenceStep) -> list[Lists]:
        slot = self._slots[step.slot]
        num_banned = min(max(slot.min_tokens - step.num_outputs, 0), step.num_drafts + 1)
        return [slot.banning] * num_banned + [slot.bias] * (step.num_drafts + 1 - num_banned)


def _slots_and_positions(steps: Sequence[SequenceStep]) -> tuple[list[int], list[int]]:
    if not any(step.num_drafts for step in steps):
        return [step.slot for step in steps], [step.num_outputs for step in steps]
    slots = [step.slot for step in steps for _ in range(step.num_drafts + 1)]
    return slots, [step.num_outputs + place for step in steps for place in range(step.num_drafts + 1)]


def _csr(rows: list[Lists], value_type: type, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of arrays per row as one: starts [B + 1] int32, then ids int32 and values."""
    start = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(ids) for ids, _ in rows], out=start[1:])
    ids = np.concatenate([ids for ids, _ in rows]).astype(np.int32, copy=False)
    values: NDArray[Any] = np.concatenate([values for _, values in rows]).astype(value_type, copy=False)
    return on_device(start, device), on_device(ids, device), on_device(values, device)


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


def _biases(params: SamplingParams, *, banned: Sequence[int]) -> Lists:
    """Biases of one row, each token once: logit_bias, and tokens that are banned."""
    biases = {**params.logit_bias, **dict.fromkeys(banned, BAN)}
    if not biases:
        return EMPTY
    return np.array(list(biases), dtype=np.int32), np.array(list(biases.values()), dtype=np.float32)
