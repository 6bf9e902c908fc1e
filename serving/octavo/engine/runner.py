"""Plans in, results out: one worker thread that turns each `StepPlan` into tensors, runs the model and samples.

Lives in the engine process. The engine loop calls `submit` and `collect`; model, caches and slot states belong to the
worker thread alone. A failed step becomes a RunnerError in `collect`; the worker goes on with the next plan. Knows no
requests.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from octavo.engine.drawn import accept, logprob_entries, rows_of, spread
from octavo.engine.plan_queues import PlanQueues
from octavo.engine.sampler import SlotStates
from octavo.engine.step_tensors import BlockTables, forward_batch, prompt_rows
from octavo.kernels.interface import LayerCache
from octavo.models.batch import ForwardBatch
from octavo.models.decoder import Decoder
from octavo.protocol.messages import EngineInfo, TokenLogprobs
from octavo.scheduling.plan import Sampled, SequenceStep, StepPlan, StepResult

LOG = logging.getLogger(__name__)
LOGPROB_ROWS = 64  # prompt rows whose logits are in memory at once
WARMUP_TOKENS = 256


class CpuRunner(PlanQueues):
    """A `Runner` with one worker thread."""

    def __init__(
        self,
        model: Decoder,
        caches: Sequence[LayerCache],
        info: EngineInfo,
        *,
        torch_threads: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(info)
        self._step = _Step(model, caches, SlotStates(info.batch_size))
        self._clock = clock
        self._start(lambda: self._work(torch_threads))

    def _work(self, torch_threads: int | None) -> None:
        if torch_threads is not None:
            torch.set_num_threads(torch_threads)  # holds for this thread and those that start later
        held: StepResult | Exception | None = None  # of the plan before, until the next one's tensors are made
        while True:
            if held is not None and self._plans.empty():
                self._results.put(held)
                held = None
            plan = self._plans.get()
            if plan is None:
                break
            held = self._attempt(plan, held)
        if held is not None:
            self._results.put(held)

    def _attempt(self, plan: StepPlan, before: StepResult | Exception | None) -> StepResult | Exception:
        """Run a plan. The result before goes out once only native code is ahead: the engine loop takes the interpreter
        lock to work on it, and would else hold up this thread.
        """
        started = self._clock()
        batch: ForwardBatch | Exception | None
        try:
            batch = self._step.prepare(plan)
        except Exception as error:  # the engine loop's edge: it reaches the loop through `collect`
            batch = error
        if before is not None:
            self._results.put(before)
        try:
            if isinstance(batch, Exception):
                raise batch
            with torch.inference_mode():
                result = self._step.run(plan, batch)
        except Exception as error:  # as above
            LOG.exception("step %d failed", plan.step_id)
            return error
        result.seconds = self._clock() - started
        return result


class _Step:
    """What the worker thread does with one plan."""

    def __init__(self, model: Decoder, caches: Sequence[LayerCache], slots: SlotStates) -> None:
        self._model = model
        self._kernels = model.kernels
        self._caches = caches
        self._slots = slots
        self._tables = BlockTables(slots.num_slots)

    def prepare(self, plan: StepPlan) -> ForwardBatch | None:
        """The plan as tensors, None if it is empty. What it starts and ends takes effect."""
        for slot in plan.evicted_slots:
            self._slots.release(slot)
        for step in plan.sequences:
            if step.fresh:
                self._slots.start(step)
        if not plan.sequences:
            return None
        return forward_batch(plan.sequences, self._slots.last_token, self._tables, device=self._kernels.device)

    def run(self, plan: StepPlan, batch: ForwardBatch | None) -> StepResult:
        """Compute what `prepare` made, and sample."""
        steps = plan.sequences
        if batch is None:
            return StepResult(plan.step_id, [], [])
        sampling = [step for step in steps if step.sample]
        if sampling and all(step.params.logprobs < 0 and step.params.prompt_logprobs < 0 for step in steps):
            # Made before the layers: after them no cache holds the interpreter any more.
            rows = self._slots.rows(sampling, device=self._kernels.device)
            tokens = self._model.sample(batch, self._caches, rows).tolist()
            drawn = accept(sampling, [Sampled(token_id) for token_id in tokens], self._slots.record)
            return StepResult(plan.step_id, spread(steps, drawn), [None] * len(steps))
        return self._run_parts(plan, batch, sampling)

    def _run_parts(self, plan: StepPlan, batch: ForwardBatch, sampling: Sequence[SequenceStep]) -> StepResult:
        """The same in parts: hidden states and logits are what log probabilities are of, or nothing is sampled."""
        steps = plan.sequences
        hidden = self._model.hidden(batch, self._caches)  # [R, H]: rows that sample, then rows of prompts
        num_rows = len(sampling) + sum([step.num_drafts for step in sampling])
        drawn = self._draw(sampling, hidden[:num_rows] if num_rows < len(hidden) else hidden)
        sampled = drawn if len(sampling) == len(steps) else spread(steps, drawn)
        return StepResult(plan.step_id, sampled, self._prompt_logprobs(steps, hidden[num_rows:]))

    def _draw(self, steps: Sequence[SequenceStep], hidden: Tensor) -> list[Sampled | None]:
        """One entry for each of `steps`; hidden [R, H] has a row for each, and one more for each draft."""
        if not steps:
            return []
        logits = self._model.logits(hidden)  # [R, V]
        wanted = [row for row, step in rows_of(steps) if step.params.logprobs >= 0]
        raw = logits[wanted] if wanted else None  # sampling may change the logits
        tokens = self._kernels.sample(logits, self._slots.rows(steps, device=self._kernels.device)).tolist()
        results = [Sampled(token_id) for token_id in tokens]  # of all rows, as if every draft came true
        if raw is not None:
            num_tops = [step.params.logprobs for _, step in rows_of(steps) if step.params.logprobs >= 0]
            for row, entry in zip(wanted, self._logprobs(raw, [tokens[row] for row in wanted], num_tops)):
                results[row].logprobs = entry
        return accept(steps, results, self._slots.record)

    def _prompt_logprobs(self, steps: Sequence[SequenceStep], hidden: Tensor) -> list[list[TokenLogprobs] | None]:
        """Of the prompt tokens that this step's rows predict; None for sequences that did not ask."""
        results: list[list[TokenLogprobs] | None] = []
        if not len(hidden):
            return [None if step.params.prompt_logprobs < 0 else [] for step in steps]
        first = 0
        for step in steps:
            if step.params.prompt_logprobs < 0:
                results.append(None)
                continue
            count = prompt_rows(step)
            targets = list(self._slots.prompt(step.slot)[step.start + 1 : step.start + 1 + count])
            entries: list[TokenLogprobs] = []
            for low in range(0, count, LOGPROB_ROWS):
                part = targets[low : low + LOGPROB_ROWS]
                logits = self._model.logits(hidden[first + low : first + low + len(part)])
                entries += self._logprobs(logits, part, [step.params.prompt_logprobs] * len(part))
            results.append(entries)
            first += count
        return results

    def _logprobs(self, logits: Tensor, token_ids: list[int], num_tops: list[int]) -> list[TokenLogprobs]:
        """Entries for rows of logits [R, V] and one token each."""
        tokens = torch.tensor(token_ids, dtype=torch.int64, device=logits.device)
        num_top = min(max(num_tops), logits.shape[1])
        columns = [part.tolist() for part in self._kernels.logprobs(logits, tokens, num_top)]
        return logprob_entries(token_ids, columns, num_tops)
