"""One plan on a GPU: queue the forward pass, queue sampling, take in what came out.

Used by the GPU runner's worker thread, which decides when. Nothing here waits for the device but `finish`. A token that
a step samples reaches the next step on the device, in `last_token`; decode steps are replays (decode_graphs.py), steps
with prompts or drafts run operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octavo.engine.decode_graphs import LAYOUT_NAMES, DecodeGraphs, Spare, resolve
from octavo.engine.device_queue import DeviceQueue
from octavo.engine.drawn import accept, logprob_entries, rows_of, spread
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
HOST = torch.device("cpu")


@dataclass
class Queued:
    """A plan whose work is queued."""

    plan: StepPlan
    started: float
    logits: Tensor | None = None  # [R, V] of the rows that sample; gone once sampling is queued
    hidden: Tensor | None = None  # [P, H] of the rows for log probabilities of prompts; likewise
    download: Download | None = None  # of tokens and log probabilities, once sampling is queued

    def arrived(self) -> bool:
        """Whether `finish` will not wait."""
        return self.download is None or self.download.arrived()


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
        self._forward_staging, self._sample_staging, self._prompt_staging = (Staging(device) for _ in range(3))
        self._graphs = DecodeGraphs(
            model,
            caches,
            device,
            last_token=self._last_token,
            spare=Spare(block=info.num_blocks, slot=info.batch_size),
            batch_size=info.batch_size,
            max_blocks=-(-(longest + 1) // BLOCK),
        )

    def prepare(self, report: Callable[[float], None]) -> None:
        """Record decode steps, if the model can be."""
        if self._records:
            self._graphs.prepare(report)

    def forward(self, plan: StepPlan, now: float) -> Queued:
        """Queue all up to the logits. The step before need not be finished."""
        for slot in plan.evicted_slots:
            self._slots.release(slot)
        for step in plan.sequences:
            if step.fresh:
                self._slots.start(step)
        queued = Queued(plan, now)
        if not plan.sequences:
            return queued
        batch = forward_batch(plan.sequences, self._by_slot, self._tables, device=HOST)
        if self._records and is_decode(plan.sequences):
            queued.logits = self._graphs.run(batch)
            return queued
        hidden = self._model.hidden(self._on_device(batch), self._caches)  # [R, H]
        num_rows = sum(step.num_drafts + 1 for step in plan.sequences if step.sample)
        if num_rows:
            queued.logits = self._model.logits(hidden[:num_rows])
        queued.hidden = hidden[num_rows:]
        return queued

    def sample(self, queued: Queued) -> Queued:
        """Queue sampling, and the copy of all results to the host. The step before is finished."""
        results = self._prompt_columns(queued)
        steps = [step for step in queued.plan.sequences if step.sample]
        if steps:
            results |= self._draw(steps, queued.logits)
        queued.download = Download(self._device, results)  # of nothing, it still marks the end of the step
        queued.logits = queued.hidden = None
        return queued

    def finish(self, queued: Queued) -> StepResult:
        """What was computed; waits for its copy."""
        assert queued.download is not None
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

    # ---- parts of sampling

    def _draw(self, steps: Sequence[SequenceStep], logits: Tensor | None) -> dict[str, Tensor]:
        """Tokens [R] of all rows, and what belongs to the log probabilities of some."""
        assert logits is not None
        rows = self._slots.rows(steps, device=HOST)
        wanted = [row for row, step in rows_of(steps) if step.params.logprobs >= 0]
        single = [row for row, step in rows_of(steps) if not step.num_drafts]
        staged = self._sample_staging.put(
            {field.name: getattr(rows, field.name).numpy() for field in fields(rows)}
            | {"wanted": np.array(wanted, dtype=np.int64), "single": np.array(single, dtype=np.int64)}
            | {"slots": np.array([step.slot for step in steps if not step.num_drafts], dtype=np.int64)}
        )
        wanted_rows, single_rows, slots = (staged.pop(name) for name in ("wanted", "single", "slots"))
        raw = logits[wanted_rows] if wanted else None  # sampling may change the logits
        tokens = self._kernels.sample(logits, SamplingRows(**staged))
        if single:  # the others' next step waits for the host, which counts the drafts that came true
            self._last_token.index_copy_(0, slots, tokens[single_rows])
        if raw is None:
            return {"tokens": tokens}
        num_top = max(step.params.logprobs for step in steps)
        return {"tokens": tokens} | self._logprobs("sampled", raw, tokens[wanted_rows], num_top=num_top)

    def _prompt_columns(self, queued: Queued) -> dict[str, Tensor]:
        """Log probabilities of prompt tokens that this step's rows predict, LOGPROB_ROWS rows at a time."""
        steps = [step for step in queued.plan.sequences if prompt_rows(step)]
        if not steps or queued.hidden is None:
            return {}
        num_top = max(step.params.prompt_logprobs for step in steps)
        targets = np.array([token for step in steps for token in self._targets(step)], dtype=np.int64)
        token_ids = self._prompt_staging.put({"targets": targets})["targets"]
        parts = []
        for low in range(0, len(targets), LOGPROB_ROWS):
            logits = self._model.logits(queued.hidden[low : low + LOGPROB_ROWS])
            parts.append(self._logprobs("prompt", logits, token_ids[low : low + LOGPROB_ROWS], num_top=num_top))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

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

    def _on_device(self, batch: ForwardBatch) -> ForwardBatch:
        """A batch of the host's, its ids resolved, after one copy."""
        given = batch.layout
        arrays = {name: getattr(given, name).numpy() for name in LAYOUT_NAMES}
        arrays |= {"token_ids": batch.token_ids.numpy(), "logits_rows": batch.logits_rows.numpy()}
        staged = self._forward_staging.put(arrays)
        token_ids, logits_rows = resolve(staged.pop("token_ids"), self._last_token), staged.pop("logits_rows")
        layout = BatchLayout(**staged, max_query_len=given.max_query_len, max_seq_len=given.max_seq_len)
        return ForwardBatch(token_ids, layout, logits_rows)


def is_decode(steps: Sequence[SequenceStep]) -> bool:
    """Whether every sequence computes one token and samples, and that is all."""
    return all(step.sample and len(step.token_ids) == 1 and not prompt_rows(step) for step in steps)


def _columns(found: dict[str, list[Any]], name: str) -> list[list[Any]]:
    return [found[f"{name}.{part}"] for part in LOGPROB_PARTS]
