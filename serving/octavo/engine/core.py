"""The engine loop's body: schedule, submit, collect, commit, one step ahead. Used by the server and by `LLM`.

Runs on one thread, which owns every sequence. It knows nothing of sockets or text. A step that fails ends the sequences
that were in it; all others go on.
"""

from __future__ import annotations

import logging
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from octavo.engine.interface import Runner, RunnerError, StepOutOfMemory
from octavo.protocol.messages import EngineInfo, EngineStats, SequenceOutput, Submit
from octavo.scheduling.block_pool import BlockPool
from octavo.scheduling.plan import StepPlan
from octavo.scheduling.scheduler import MAX_IN_FLIGHT, Limits, Scheduler
from octavo.settings import Settings

log = logging.getLogger(__name__)

IDLE_TOKENS = 512  # of prompts in a step that delays no next token, unless a setting bounds steps
Clock = Callable[[], float]  # seconds of a monotonic clock


def make_scheduler(
    info: EngineInfo,
    *,
    max_num_batched_tokens: int,
    prefix_cache: bool,
    speculation: str = "none",
    speculation_tokens: int = 8,
    max_idle_tokens: int = 0,
) -> Scheduler:
    """A scheduler over the cache that the runner has."""
    limits = Limits(
        batch_size=info.batch_size,
        max_num_batched_tokens=max_num_batched_tokens,
        context_length=info.context_length,
        vocab_size=info.vocab_size,
        speculation=speculation == "ngram",
        max_draft_tokens=speculation_tokens,
        max_idle_tokens=max_idle_tokens,
    )
    return Scheduler(BlockPool(info.num_blocks, prefix_cache=prefix_cache), limits)


def scheduler_for(settings: Settings, info: EngineInfo) -> Scheduler:
    """The scheduler that the settings ask for."""
    return make_scheduler(
        info,
        max_num_batched_tokens=settings.max_num_batched_tokens or default_budget(info),
        prefix_cache=settings.prefix_cache,
        speculation=settings.speculation,
        speculation_tokens=settings.speculation_tokens,
        max_idle_tokens=0 if settings.max_num_batched_tokens else IDLE_TOKENS,
    )


def default_budget(info: EngineInfo) -> int:
    """Tokens of a step when no setting says: one each for a full batch, and a chunk of prompts.

    The chunk is small enough that the gap between the tokens of the others stays short.
    """
    return budget_of(info.kernels, batch_size=info.batch_size)


def budget_of(kernels: str, *, batch_size: int) -> int:
    """The same before there is an engine."""
    return batch_size + (4096 if kernels == "gpu" else 128)


def incident_id() -> str:
    """A short random name that joins an error message to its traceback in the log."""
    return uuid.uuid4().hex[:12]


@dataclass
class StepTimes:
    """Measured step times, and from them how long a step may take before something must be wrong. Seconds.

    One moving mean per power of two of tokens; a size never seen counts as the next smaller one, scaled up.
    """

    least: float = 10.0
    most: float = 600.0
    factor: float = 20.0
    first: float = 120.0  # for the first steps: pages are touched, kernels tuned
    means: dict[int, float] = field(default_factory=dict)
    num_measured: int = 0

    def measured(self, seconds: float, *, num_tokens: int) -> None:
        self.num_measured += 1
        size = num_tokens.bit_length()
        mean = self.means.get(size, seconds)
        self.means[size] = mean + 0.1 * (seconds - mean)

    def allowed(self, *, num_tokens: int) -> float:
        if self.num_measured < 3:
            return self.first
        size = num_tokens.bit_length()
        known = max((other for other in self.means if other <= size), default=min(self.means))
        expected = self.means[known] * 2.0 ** max(size - known, 0)
        return min(max(self.least, self.factor * expected), self.most)


@dataclass
class _Submitted:
    plan: StepPlan
    error: RunnerError | None  # it was refused at once


@dataclass
class EngineCore:
    """Sequences in, outputs out. `turn` does one round of the loop."""

    scheduler: Scheduler
    runner: Runner
    clock: Clock
    new_incident: Callable[[], str] = incident_id
    times: StepTimes = field(default_factory=StepTimes)
    last_progress: float = 0.0
    step_deadline: float = 0.0  # of the oldest submitted step; 0: idle
    _submitted: deque[_Submitted] = field(default_factory=deque)
    _step_started: float = 0.0

    @property
    def has_work(self) -> bool:
        """Whether `turn` has something to do: sequences to run or plans to collect."""
        return bool(self._submitted) or self.scheduler.has_unfinished

    def add(self, submit: Submit) -> list[SequenceOutput]:
        """Queue a sequence; returns its end if it ends at once. ValueError if its id is in use."""
        output = self.scheduler.add(submit)
        return [] if output is None else [output]

    def abort(self, seq_ids: Iterable[int]) -> list[SequenceOutput]:
        """Cancel those that have not ended; their last outputs."""
        outputs = [self.scheduler.abort(seq_id) for seq_id in seq_ids]
        return [output for output in outputs if output is not None]

    def abort_all(self) -> list[SequenceOutput]:
        return self.abort(self.scheduler.unfinished_ids)

    def fail_all(self, message: str) -> list[SequenceOutput]:
        """End every sequence with an error: the loop cannot go on."""
        abort = self.scheduler.abort
        outputs = [abort(seq_id, reason="error", error=message) for seq_id in self.scheduler.unfinished_ids]
        return [output for output in outputs if output is not None]

    def turn(self) -> list[SequenceOutput]:
        """Plan and submit a step; wait for the oldest one if two are under way or nothing more can be planned."""
        plan = self.scheduler.schedule(self.clock()) if len(self._submitted) < MAX_IN_FLIGHT else None
        if plan is not None:
            self._submit(plan)
        if self._submitted and (plan is None or len(self._submitted) == MAX_IN_FLIGHT):
            return self._collect()
        if plan is None and self.scheduler.has_unfinished:
            raise RuntimeError("sequences wait but none can run")
        return []

    def _submit(self, plan: StepPlan) -> None:
        error = None
        try:
            self.runner.submit(plan)
        except RunnerError as refused:
            error = refused
        self._submitted.append(_Submitted(plan, error))
        if len(self._submitted) == 1:
            self._start_watch()

    def _collect(self) -> list[SequenceOutput]:
        oldest = self._submitted.popleft()
        try:
            if oldest.error is not None:
                raise oldest.error
            result = self.runner.collect()
        except RunnerError as error:
            outputs = self._fail(oldest.plan, error)
        else:
            outputs = self.scheduler.commit(oldest.plan, result)
            self.times.measured(self.clock() - self._step_started, num_tokens=oldest.plan.num_tokens)
        self._start_watch()
        return outputs

    def _fail(self, plan: StepPlan, error: RunnerError) -> list[SequenceOutput]:
        incident = self.new_incident()
        log.error("step %d failed, id %s", plan.step_id, incident, exc_info=error)
        reason = str(error) if isinstance(error, StepOutOfMemory) else "the step failed"
        return self.scheduler.fail(plan, f"{reason} (id {incident})")

    def _start_watch(self) -> None:
        """The oldest submitted step starts now."""
        self.last_progress = self._step_started = self.clock()
        if self._submitted:
            self.step_deadline = self._step_started + self.times.allowed(num_tokens=self._submitted[0].plan.num_tokens)
        else:
            self.step_deadline = 0.0

    def stats(self) -> EngineStats:
        """Counters and gauges; an idle loop's progress is now."""
        progress = self.last_progress if self._submitted else self.clock()
        return self.scheduler.stats(last_progress=progress, step_deadline=self.step_deadline)
