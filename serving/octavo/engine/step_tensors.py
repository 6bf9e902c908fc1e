"""A `StepPlan` as tensors. Run by the runner's worker thread, in numpy, since a step's integers are few."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from octavo.kernels.interface import BLOCK, BatchLayout
from octavo.models.batch import ForwardBatch
from octavo.scheduling.plan import PENDING, SequenceStep


def prompt_rows(step: SequenceStep) -> int:
    """How many of this step's first rows predict a prompt token whose logprob is wanted."""
    if step.params.prompt_logprobs < 0:
        return 0
    return max(0, min(step.end, step.prompt_len - 1) - step.start)


class BlockTables:
    """The block table of every slot as an array, kept over steps: a table changes once in 64 tokens."""

    def __init__(self, num_slots: int) -> None:
        self._views: list[Sequence[int]] = [()] * num_slots  # what a row holds; plans never change a table
        self._rows = np.zeros((num_slots, 16), dtype=np.int32)

    def of(self, steps: Sequence[SequenceStep], slots: NDArray[np.int64]) -> NDArray[np.int32]:
        """[B, max_blocks], unused entries 0."""
        views, widest = self._views, 0
        for step in steps:
            table = step.block_table
            widest = max(widest, len(table))
            if views[step.slot] is not table:
                self._fill(step.slot, table)
        return self._rows[slots, :widest]

    def _fill(self, slot: int, table: Sequence[int]) -> None:
        if len(table) > self._rows.shape[1]:
            width = max(len(table), 2 * self._rows.shape[1])
            self._rows = np.pad(self._rows, ((0, 0), (0, width - self._rows.shape[1])))
        self._rows[slot, : len(table)] = table
        self._rows[slot, len(table) :] = 0
        self._views[slot] = table


def forward_batch(
    steps: Sequence[SequenceStep], last_token: NDArray[np.int64], tables: BlockTables, *, device: torch.device
) -> ForwardBatch:
    """Rows of all sequences in order. Logits are wanted of the rows that sample, then of those for prompt logprobs.

    last_token: [num_slots], stands in for PENDING.
    """
    if all(len(step.token_ids) == 1 and step.params.prompt_logprobs < 0 for step in steps):
        return _decode_batch(steps, last_token, tables, device=device)
    count = len(steps)
    slots = np.array([step.slot for step in steps])
    first = np.array([step.start for step in steps])  # [B] positions
    lengths = np.array([len(step.token_ids) for step in steps])
    starts = np.zeros(count + 1, dtype=np.int32)
    np.cumsum(lengths, out=starts[1:])
    num_rows = int(starts[-1])
    seq_lens = first + lengths
    block_tables = tables.of(steps, slots)
    if num_rows == count:
        positions, owner = first, np.arange(count)
    else:
        owner = np.repeat(np.arange(count), lengths)  # [M] the sequence of each row
        positions = np.arange(num_rows) + (first - starts[:-1])[owner]  # [M]
    slot_mapping = block_tables[owner, positions // BLOCK] * BLOCK + positions % BLOCK

    def int32(array: NDArray[Any]) -> torch.Tensor:
        return on_device(array.astype(np.int32, copy=False), device)

    layout = BatchLayout(
        query_start=int32(starts),
        seq_lens=int32(seq_lens),
        block_tables=int32(block_tables),
        positions=int32(positions),
        slot_mapping=int32(slot_mapping),
        max_query_len=int(lengths.max()),
        max_seq_len=int(seq_lens.max()),
    )
    token_ids = on_device(_token_ids(steps, starts, last_token), device)
    return ForwardBatch(token_ids, layout, on_device(_logits_rows(steps, starts), device))


def _decode_batch(
    steps: Sequence[SequenceStep], last_token: NDArray[np.int64], tables: BlockTables, *, device: torch.device
) -> ForwardBatch:
    """`forward_batch` of one token a sequence, with hardly any numpy.

    After all weights have passed, no cache holds its code: each function of it costs more than these lists do.
    """
    newest, positions = last_token.tolist(), [step.start for step in steps]
    tokens = [newest[step.slot] if step.token_ids[0] == PENDING else step.token_ids[0] for step in steps]
    places = [step.block_table[at // BLOCK] * BLOCK + at % BLOCK for step, at in zip(steps, positions)]

    def integers(numbers: Sequence[int], kind: type = np.int32) -> torch.Tensor:
        return on_device(np.array(numbers, dtype=kind), device)

    layout = BatchLayout(
        query_start=integers(range(len(steps) + 1)),
        seq_lens=integers([at + 1 for at in positions]),
        block_tables=on_device(tables.of(steps, np.array([step.slot for step in steps])), device),
        positions=integers(positions),
        slot_mapping=integers(places),
        max_query_len=1,
        max_seq_len=max(positions) + 1,
    )
    rows = [row for row, step in enumerate(steps) if step.sample]
    return ForwardBatch(integers(tokens, np.int64), layout, integers(rows, np.int64))


def on_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """A tensor over the array on the host, else a copy.

    Nothing here gives up the interpreter lock on the host: the engine loop, which has just got the step before, would
    take it and keep the next step waiting.
    """
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.to(device)


def _token_ids(steps: Sequence[SequenceStep], starts: NDArray[Any], last_token: NDArray[np.int64]) -> NDArray[np.int64]:
    flat: list[int] = []
    for step in steps:
        flat += step.token_ids
    token_ids = np.array(flat, dtype=np.int64)
    pending = np.flatnonzero(token_ids == PENDING)
    if len(pending):
        owners = np.searchsorted(starts, pending, side="right") - 1
        token_ids[pending] = last_token[[steps[owner].slot for owner in owners.tolist()]]
    return token_ids


def _logits_rows(steps: Sequence[SequenceStep], starts: NDArray[Any]) -> NDArray[np.int64]:
    ends = starts[1:].tolist()
    rows: list[int] = []
    for step, end in zip(steps, ends):
        if step.num_drafts:
            rows += range(end - 1 - step.num_drafts, end)
        elif step.sample:
            rows.append(end - 1)
    for step, end in zip(steps, ends):
        if step.params.prompt_logprobs >= 0:
            start = end - len(step.token_ids)
            rows += range(start, start + prompt_rows(step))
    return np.array(rows, dtype=np.int64)
