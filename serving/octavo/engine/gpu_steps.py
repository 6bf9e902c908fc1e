"""One plan on a GPU: queue all of a step, take in what came out.

Used by the GPU runner's worker thread, which decides when. Nothing here waits for the device but `finish` and
recording. All that a step needs goes to the device in one copy before its work, all that it leaves comes back in one
behind it. A token that a step samples reaches the next step on the device, in `last_token`; decode steps are replays
(decode_graphs.py), steps with prompts or drafts run operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.engine.decode_graphs import LAYOUT_NAMES, DecodeGraphs, Spare, recorded_bytes
from octavo.engine.device_queue import DeviceQueue
from octavo.engine.drawn import accept, logprob_entries, rows_of, spread
from octavo.engine.newest_tokens import resolve, settle_counts
from octavo.engine.sampler import SlotStates
from octavo.engine.staging import Download, Staging
from octavo.engine.step_tensors import BlockTables, forward_batch, prompt_rows
from octavo.kernels.interface import BLOCK, BatchLayout, LayerCache, SamplingRows
from octavo.models.batch import ForwardBatch
from octavo.models.decoder import Decoder
from octavo.protocol.messages import EngineInfo, TokenLogprobs
from octavo.scheduling.plan import Sampled, SequenceStep, StepPlan, StepResult

LOGPROB_ROWS = 64  # prompt rows whose logits are in memory at once
LOGPROB_PARTS = ("logprob", "rank", "top_ids", "top_logprobs")
SAMPLING_ROOM = 1 << 20  # bytes of staging for how rows sample; long lists of penalised tokens make it grow
HOST = torch.device("cpu")


@dataclass
class Queued:
    """A plan whose work is queued."""

    plan: StepPlan
    started: float
    download: Download  # of tokens and log probabilities


class GpuSteps:
    """What the worker thread does with plans: queue, sample, finish."""

    def __init__(
        self, model: Decoder, caches: Sequence[LayerCache], info: EngineInfo, device: DeviceQueue, *, longest: int
    ) -> None:
        self._model = model
        self._kernels = model.kernels
        self._caches = caches
        self._device = device
        self._records = not model.waits
        self._slots = SlotStates(info.batch_size)
        self._tables = BlockTables(info.batch_size)
        # ids below 0 name the slot whose last token is meant: it is on the device only
        self._by_slot = -1 - np.arange(info.batch_size, dtype=np.int64)
        self._last_token = torch.zeros(info.batch_size + 1, dtype=torch.int64, device=device.device)
        max_blocks = -(-(longest + 1) // BLOCK)
        self._staging = Staging(device, num_bytes=recorded_bytes(info.batch_size, max_blocks) + SAMPLING_ROOM)
        self._graphs = DecodeGraphs(
            model,
            caches,
            device,
            self._staging,
            last_token=self._last_token,
            spare=Spare(block=info.num_blocks, slot=info.batch_size),
            batch_size=info.batch_size,
            max_blocks=max_blocks,
        )

    def prepare(self, report: Callable[[float], None]) -> None:
        """Record decode steps, if the model can be."""
        if self._records:
            self._graphs.prepare(report)

    @property
    def unfinished(self) -> bool:
        """Whether `record_one` has something to do."""
        return self._graphs.unfinished

    def record_one(self) -> None:
        """Record a decode step that `prepare` left out. Waits for the device, and best has it to itself."""
        self._graphs.record_one()

    def queue(self, plan: StepPlan, now: float) -> Queued:
        """Queue a whole step, and the copy of its results to the host. The step before need not be finished."""
        self._take_over(plan)
        steps = [step for step in plan.sequences if step.sample]
        results: dict[str, Tensor] = {}
        if plan.sequences:
            logits, hidden, staged = self._forward(plan.sequences, self._arrays(plan.sequences, steps))
            results = self._prompt_columns(plan.sequences, hidden, staged)
            if steps:
                results |= self._draw(steps, logits, staged)
        return Queued(plan, now, Download(self._device, results))  # of nothing, it still marks the end of the step

    def finish(self, queued: Queued) -> StepResult:
        """What was computed; waits for its copy."""
        found = queued.download.lists()
        plan, steps = queued.plan, [step for step in queued.plan.sequences if step.sample]
        results = [Sampled(token_id) for token_id in found.get("tokens", ())]
        if "sampled.rank" in found:
            wanted = [row for row, step in rows_of(steps) if step.params.logprobs >= 0]
            num_tops = [step.params.logprobs for _, step in rows_of(steps) if step.params.logprobs >= 0]
            tokens = [results[row].token_id for row in wanted]
            for row, entry in zip(wanted, logprob_entries(tokens, _columns(found, "sampled"), num_tops)):
                results[row].logprobs = entry
        drawn = spread(plan.sequences, accept(steps, results, self._slots.record))
        return StepResult(plan.step_id, drawn, self._prompt_entries(plan.sequences, found))

    # ---- parts of `queue`

    def _take_over(self, plan: StepPlan) -> None:
        for slot in plan.evicted_slots:
            self._slots.release(slot)
        for step in plan.sequences:
            if step.fresh:
                self._slots.start(step)

    def _arrays(self, sequences: Sequence[SequenceStep], steps: Sequence[SequenceStep]) -> dict[str, NDArray[Any]]:
        """What sampling and log probabilities need of the host, under names that no layout has."""
        rows = self._slots.rows(steps, device=HOST)
        wanted = [row for row, step in rows_of(steps) if step.params.logprobs >= 0]
        single = [row for row, step in rows_of(steps) if not step.num_drafts]
        slots = [step.slot for step in steps if not step.num_drafts]
        targets = [token for step in sequences for token in self._targets(step)]
        lists = {"wanted": wanted, "single": single, "slots": slots, "targets": targets}
        return {field.name: getattr(rows, field.name).numpy() for field in fields(rows)} | {
            name: np.array(numbers, dtype=np.int64) for name, numbers in lists.items()
        }

    def _forward(
        self, sequences: Sequence[SequenceStep], others: dict[str, NDArray[Any]]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Logits [R, V] of rows that sample, hidden states [P, H] of those for prompts, and `others` on the device."""
        batch = forward_batch(sequences, self._by_slot, self._tables, device=HOST)
        if self._records and is_decode(sequences):
            logits, staged = self._graphs.run(batch, others)
            return logits, logits[:0], staged
        on_device, staged = self._on_device(batch, others)
        hidden = self._model.hidden(on_device, self._caches)  # [R + P, H]
        num_rows = sum(step.num_drafts + 1 for step in sequences if step.sample)
        logits = self._model.logits(hidden[:num_rows]) if num_rows else hidden[:0]
        return logits, hidden[num_rows:], staged

    def _on_device(
        self, batch: ForwardBatch, others: dict[str, NDArray[Any]]
    ) -> tuple[ForwardBatch, dict[str, Tensor]]:
        """A batch of the host's, its ids resolved, and `others`, after one copy."""
        given = batch.layout
        arrays = {name: getattr(given, name).numpy() for name in LAYOUT_NAMES}
        arrays |= {"token_ids": batch.token_ids.numpy(), "logits_rows": batch.logits_rows.numpy()}
        staged = self._staging.put(arrays | others)
        token_ids = resolve(staged["token_ids"], self._last_token)
        layout = BatchLayout(
            **{name: staged[name] for name in LAYOUT_NAMES},
            max_query_len=given.max_query_len,
            max_seq_len=given.max_seq_len,
        )
        return ForwardBatch(token_ids, layout, staged["logits_rows"]), staged

    def _draw(self, steps: Sequence[SequenceStep], logits: Tensor, staged: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tokens [R] of all rows, and what belongs to the log probabilities of some."""
        wanted = staged["wanted"]
        raw = logits[wanted] if len(wanted) else None  # sampling may change the logits
        tokens = self._kernels.sample(logits, self._sampling_rows(steps, staged))
        if len(staged["slots"]):  # the others' next step waits for the host, which counts the drafts that came true
            self._last_token.index_copy_(0, staged["slots"], tokens[staged["single"]])
        if raw is None:
            return {"tokens": tokens}
        num_top = max(step.params.logprobs for step in steps)
        return {"tokens": tokens} | self._logprobs("sampled", raw, tokens[wanted], num_top=num_top)

    def _sampling_rows(self, steps: Sequence[SequenceStep], staged: dict[str, Tensor]) -> SamplingRows:
        """As staged, with the tokens put in that penalties count and only the device knows."""
        rows = SamplingRows(**{field.name: staged[field.name] for field in fields(SamplingRows)})
        if not self._slots.counts_awaited(steps):
            return rows
        ids, counts = settle_counts(rows.seen_start, rows.seen_ids, rows.seen_counts, self._last_token)
        return replace(rows, seen_ids=ids, seen_counts=counts)

    def _prompt_columns(
        self, sequences: Sequence[SequenceStep], hidden: Tensor, staged: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Log probabilities of prompt tokens that this step's rows predict, LOGPROB_ROWS rows at a time."""
        token_ids = staged["targets"]
        if not len(token_ids):
            return {}
        num_top = max(step.params.prompt_logprobs for step in sequences if prompt_rows(step))
        parts = []
        for low in range(0, len(token_ids), LOGPROB_ROWS):
            logits = self._model.logits(hidden[low : low + LOGPROB_ROWS])
            parts.append(self._logprobs("prompt", logits, token_ids[low : low + LOGPROB_ROWS], num_top=num_top))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    # ---- parts of `finish`

    def _prompt_entries(
        self, steps: Sequence[SequenceStep], found: dict[str, list[Any]]
    ) -> list[list[TokenLogprobs] | None]:
        results: list[list[TokenLogprobs] | None] = []
        first = 0
        for step in steps:
            if step.params.prompt_logprobs < 0:
                results.append(None)
                continue
            count = prompt_rows(step)
            columns = [column[first : first + count] for column in _columns(found, "prompt")] if count else [[]] * 4
            tops = [step.params.prompt_logprobs] * count
            results.append(logprob_entries(list(self._targets(step)), columns, tops))
            first += count
        return results

    def _targets(self, step: SequenceStep) -> Sequence[int]:
        """The prompt tokens that this step's rows predict."""
        return self._slots.prompt(step.slot)[step.start + 1 : step.start + 1 + prompt_rows(step)]

    def _logprobs(self, name: str, logits: Tensor, token_ids: Tensor, *, num_top: int) -> dict[str, Tensor]:
        columns = self._kernels.logprobs(logits, token_ids, min(num_top, logits.shape[1]))
        return {f"{name}.{part}": column for part, column in zip(LOGPROB_PARTS, columns)}


def is_decode(steps: Sequence[SequenceStep]) -> bool:
    """Whether every sequence computes one token and samples, and that is all."""
    return all(step.sample and len(step.token_ids) == 1 and not prompt_rows(step) for step in steps)


def _columns(found: dict[str, list[Any]], name: str) -> list[list[Any]]:
    return [found[f"{name}.{part}"] for part in LOGPROB_PARTS]
