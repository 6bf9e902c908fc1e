"""Decode steps as recorded work: one capture for each size of batch and of table, replayed on fixed memory.

Used by the GPU runner's worker thread. A step in which every sequence computes one token and samples is filled up with
rows that write to a block nobody reads; their results are thrown away, and rows do not influence each other. Recording
waits for the device: it is done at the start, and what that has no time for while nothing is under way.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.engine.device_queue import Body, DeviceQueue
from octavo.engine.newest_tokens import resolve
from octavo.engine.staging import Staging, staged_bytes, views
from octavo.kernels.interface import BLOCK, BatchLayout, LayerCache
from octavo.models.batch import ForwardBatch
from octavo.models.decoder import Decoder

LOG = logging.getLogger(__name__)
SMALL_TABLE = 16  # blocks: the narrowest table, 1024 tokens
NARROW = 4  # times that: tables that are recorded at the start whatever it takes
RECORD_SECONDS = 20.0  # of the start, after which no wider ones are begun


def batch_buckets(batch_size: int) -> list[int]:
    """Sizes that are captured: 1, 2, 4, then multiples of 8, of 16 from 64 on, up to the batch size."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, batch_size + 1, 16)]
    return sorted({size for size in sizes if size < batch_size} | {batch_size})


def table_buckets(max_blocks: int) -> list[int]:
    """Widths of tables: four times wider each. The widest sequence fits the last one."""
    widths = [SMALL_TABLE]
    while widths[-1] < max_blocks:
        widths.append(4 * widths[-1])
    return [*widths[:-1], max(max_blocks, SMALL_TABLE)] if len(widths) > 1 else widths


@dataclass(frozen=True)
class Spare:
    """What rows that fill up a batch point at."""

    block: int  # of every layer's cache; never handed out
    slot: int  # of last_token; likewise


def recorded_bytes(batch_size: int, max_blocks: int) -> int:
    """Of staging, what the largest recorded step reads."""
    return staged_bytes(_filling(batch_size, table_buckets(max_blocks)[-1], Spare(0, 0)))


class DecodeGraphs:
    """Captures by (rows, blocks of a table); made by `prepare`, and by `record_one` what that left out.

    They read the first bytes of the memory that staging has now. Should it move, those are copied here first.
    """

    def __init__(
        self,
        model: Decoder,
        caches: Sequence[LayerCache],
        queue: DeviceQueue,
        staging: Staging,  # of at least `recorded_bytes`
        *,
        last_token: Tensor,  # [num_slots + 1] int64, the last one spare
        spare: Spare,
        batch_size: int,
        max_blocks: int,
    ) -> None:
        self._model = model
        self._caches = caches
        self._queue = queue
        self._last_token = last_token
        self._spare = spare
        self._batches = batch_buckets(batch_size)
        self._tables = table_buckets(max_blocks)
        self._replays: dict[tuple[int, int], Body] = {}
        self._left: dict[tuple[int, int], None] = {}  # to be recorded; the last ones first
        self._staging = staging
        self._memory = staging.memory  # that captures read
        self._logits = torch.zeros(batch_size, model.head.out_features, dtype=torch.float32, device=queue.device)

    def prepare(self, report: Callable[[float], None], *, clock: Callable[[], float] = time.monotonic) -> None:
        """Record all batches over all tables, but begin no wide ones after RECORD_SECONDS.

        The widest of the narrow tables comes first: the others fit its memory. Each wider one takes memory of its own.
        """
        until = clock() + RECORD_SECONDS
        narrow = [width for width in self._tables if width <= NARROW * SMALL_TABLE]
        widths = [*reversed(narrow), *self._tables[len(narrow) :]]
        keys = [(rows, width) for width in widths for rows in reversed(self._batches)]
        for done, key in enumerate(keys):
            if done >= len(narrow) * len(self._batches) and clock() >= until:
                LOG.warning("%d of %d recordings are left for when nothing is to do", len(keys) - done, len(keys))
                self._left = dict.fromkeys(reversed(keys[done:]))
                return
            report(done / len(keys))
            self._record(*key)

    @property
    def unfinished(self) -> bool:
        """Whether `record_one` has something to do."""
        return bool(self._left)

    def record_one(self) -> None:
        """Record what `prepare` left out, the latest needed first. Waits for the device."""
        self._record(*self._left.popitem()[0])

    def run(self, batch: ForwardBatch, others: Mapping[str, NDArray[Any]]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [B, V] float32 of a decode step given on the host, ids as in `resolve`; good until the next run.

        `others` go to the device with the same copy, for what comes behind. A step that is not recorded runs operation
        by operation, with the same bits.
        """
        count = len(batch.token_ids)
        rows = self._batches[bisect_left(self._batches, count)]
        width = self._tables[bisect_left(self._tables, batch.layout.block_tables.shape[1])]
        arrays = _filling(rows, width, self._spare)
        _fill(arrays, batch)
        staged = self._put(arrays, others)
        replay = self._replays.get((rows, width))
        if replay is None:
            replay = self._body_over(rows, width, arrays)
            if (rows, width) in self._left:
                self._left[rows, width] = self._left.pop((rows, width))  # the next to be recorded
        replay()
        return self._logits[:count], {name: staged[name] for name in others}

    def _put(self, arrays: dict[str, NDArray[Any]], others: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
        """All on the device, `arrays` where captures read them."""
        staged = self._staging.put(arrays | dict(others))
        if self._staging.memory is not self._memory:
            size = staged_bytes(arrays)
            self._memory[:size].copy_(self._staging.memory[:size])
        return staged

    def _record(self, rows: int, width: int) -> None:
        arrays = _filling(rows, width, self._spare)
        self._put(arrays, {})
        self._replays[rows, width] = body = self._body_over(rows, width, arrays)  # should recording fail
        try:
            self._replays[rows, width] = self._queue.capture(body)
            return
        except torch.OutOfMemoryError as error:  # a recording keeps its memory; single operations give theirs back
            LOG.warning("no memory to record steps of %d x %d blocks: they run unrecorded (%s)", rows, width, error)
        self._queue.release_memory()  # only now: the error held what the recording had

    def _body_over(self, rows: int, width: int, arrays: dict[str, NDArray[Any]]) -> Body:
        """The step over the memory that holds `arrays`, whose addresses follow from rows and width."""
        tensors = views(self._memory, arrays)
        return lambda: self._body(tensors, rows=rows, width=width)

    def _body(self, tensors: dict[str, Tensor], *, rows: int, width: int) -> None:
        layout = BatchLayout(
            **{name: tensors[name] for name in LAYOUT_NAMES}, max_query_len=1, max_seq_len=width * BLOCK
        )
        token_ids = resolve(tensors["token_ids"], self._last_token)
        hidden = self._model.hidden(ForwardBatch(token_ids, layout, tensors["logits_rows"]), self._caches)
        self._logits[:rows].copy_(self._model.logits(hidden))


LAYOUT_NAMES = ("query_start", "seq_lens", "block_tables", "positions", "slot_mapping")


def _filling(rows: int, width: int, spare: Spare) -> dict[str, NDArray[Any]]:
    """A step of nothing but spare rows: each a sequence of one token in the spare block."""
    return {
        "token_ids": np.full(rows, -1 - spare.slot, dtype=np.int64),
        "logits_rows": np.arange(rows, dtype=np.int64),
        "query_start": np.arange(rows + 1, dtype=np.int32),
        "seq_lens": np.ones(rows, dtype=np.int32),
        "positions": np.zeros(rows, dtype=np.int32),
        "slot_mapping": np.full(rows, spare.block * BLOCK, dtype=np.int32),
        "block_tables": np.full((rows, width), spare.block, dtype=np.int32),
    }


def _fill(arrays: dict[str, NDArray[Any]], batch: ForwardBatch) -> None:
    """The step's sequences in the first rows."""
    count, layout = len(batch.token_ids), batch.layout
    arrays["token_ids"][:count] = batch.token_ids.numpy()
    for name in ("seq_lens", "positions", "slot_mapping"):
        arrays[name][:count] = getattr(layout, name).numpy()
    tables = layout.block_tables.numpy()
    arrays["block_tables"][:count, : tables.shape[1]] = tables
