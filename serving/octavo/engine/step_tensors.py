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


def forward_batch(
    steps: Sequence[SequenceStep], last_token: NDArray[np.int64], *, device: torch.device
) -> ForwardBatch:
    """Rows of all sequences in order. Logits are wanted of the rows that sample, then of those for prompt logprobs.

    last_token: [num_slots], stands in for PENDING.
    """
    lengths = np.fromiter((step.num_tokens for step in steps), dtype=np.int64, count=len(steps))
    starts = np.zeros(len(steps) + 1, dtype=np.int64)
    np.cumsum(lengths, out=starts[1:])
    tables = _block_tables(steps)
    positions = np.concatenate([np.arange(step.start, step.end) for step in steps])  # [M]
    owner = np.repeat(np.arange(len(steps)), lengths)  # [M] the sequence of each row
    slot_mapping = tables[owner, positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK
    seq_lens = np.fromiter((step.end for step in steps), dtype=np.int64, count=len(steps))

    def int32(array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int32)).to(device)

    layout = BatchLayout(
        query_start=int32(starts),
        seq_lens=int32(seq_lens),
        block_tables=int32(tables),
        positions=int32(positions),
        slot_mapping=int32(slot_mapping),
        max_query_len=int(lengths.max()),
        max_seq_len=int(seq_lens.max()),
    )
    token_ids = torch.from_numpy(_token_ids(steps, starts, last_token)).to(device)
    return ForwardBatch(token_ids, layout, torch.from_numpy(_logits_rows(steps, starts)).to(device))


def _token_ids(steps: Sequence[SequenceStep], starts: NDArray[Any], last_token: NDArray[np.int64]) -> NDArray[np.int64]:
    token_ids = np.empty(starts[-1], dtype=np.int64)
    for index, step in enumerate(steps):
        token_ids[starts[index] : starts[index + 1]] = step.token_ids
        if step.token_ids[-1] == PENDING:
            token_ids[starts[index + 1] - 1] = last_token[step.slot]
    return token_ids


def _block_tables(steps: Sequence[SequenceStep]) -> NDArray[np.int32]:
    """[B, max_blocks], unused entries 0."""
    tables = np.zeros((len(steps), max(len(step.block_table) for step in steps)), dtype=np.int32)
    for index, step in enumerate(steps):
        tables[index, : len(step.block_table)] = step.block_table
    return tables


def _logits_rows(steps: Sequence[SequenceStep], starts: NDArray[Any]) -> NDArray[np.int64]:
    sampled = [starts[index + 1] - 1 for index, step in enumerate(steps) if step.sample]
    prompt = [np.arange(starts[index], starts[index] + prompt_rows(step)) for index, step in enumerate(steps)]
    return np.concatenate([np.array(sampled, dtype=np.int64), *prompt])
