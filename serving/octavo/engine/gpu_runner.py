"""Plans in, results out on a GPU: the device is never waited for while there is a next step to give it.

One worker thread. For each plan it queues the whole step, then takes in the tokens of the step before, which have
arrived by then, or arrive while the device computes. Only without a next plan does it wait for the device. Knows no
requests.
"""

from __future__ import annotations

import logging
import queue
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from octavo.engine.device_queue import DeviceQueue, out_of_memory
from octavo.engine.gpu_steps import GpuSteps, Queued
from octavo.engine.interface import DeviceLost, StepOutOfMemory
from octavo.engine.plan_queues import PlanQueues
from octavo.kernels.interface import LayerCache
from octavo.models.decoder import Decoder
from octavo.protocol.messages import EngineInfo
from octavo.scheduling.plan import StepPlan, StepResult

LOG = logging.getLogger(__name__)
POLL_SECONDS = 0.0001  # how often a worker without a next plan looks whether the last step is done
IDLE_SECONDS = 0.1  # without a plan, after which decode steps are recorded that the start left out
Result = TypeVar("Result")
ADVICE = "out of device memory: lower MAX_NUM_BATCHED_TOKENS, BATCH_SIZE or KV_MEMORY_FRACTION"


class GpuRunner(PlanQueues):
    """A `Runner` with one worker thread over one device."""

    def __init__(
        self,
        model: Decoder,
        caches: Sequence[LayerCache],
        info: EngineInfo,
        make_queue: Callable[[], DeviceQueue],
        *,
        longest: int,  # tokens of the longest sequence
        clock: Callable[[], float] = time.monotonic,
        report: Callable[[float], None] | None = None,
    ) -> None:
        """Every cache has one block more than `info.num_blocks`. Decode steps are recorded here if `report` is given.

        Raises what making them raises.
        """
        super().__init__(info)
        self._clock = clock
        self._last_end = 0.0  # of the last step that finished
        self._closing = False  # of the worker: no plan will come
        made: queue.Queue[Exception | None] = queue.Queue()

        def work() -> None:
            try:
                device = make_queue()
                with torch.inference_mode(), device.entered():
                    steps = GpuSteps(model, caches, info, device, longest=longest)
                    if report is not None:
                        steps.prepare(report)
            except Exception as error:  # this constructor's caller gets it
                made.put(error)
                return
            made.put(None)
            try:
                with torch.inference_mode(), device.entered():
                    self._work(steps)
            except Exception as error:  # else `collect` would wait for ever: even asking a lost device raises
                LOG.exception("the runner's worker ended")
                self._results.put(DeviceLost(str(error)))

        self._start(work)
        error = made.get()
        if error is not None:
            raise error

    def _work(self, steps: GpuSteps) -> None:
        before: Queued | None = None  # whose result is not out yet
        while True:
            plan = self._next_plan(before, steps)
            queued = None if plan is None else attempt(steps.queue, plan, self._clock())
            if before is not None:
                self._results.put(attempt(self._finish, steps, before))
            if isinstance(queued, Exception):
                self._results.put(queued)
            before = queued if isinstance(queued, Queued) else None
            if plan is None and self._closing:
                return

    def _next_plan(self, before: Queued | None, steps: GpuSteps) -> StepPlan | None:
        """The next plan; None if `before` is done first, or if there will be none."""
        while True:
            idle = IDLE_SECONDS if steps.unfinished else None
            try:
                plan = self._plans.get(timeout=idle if before is None else POLL_SECONDS)
            except queue.Empty:
                if before is None:
                    attempt(steps.record_one)  # one at a time: a plan waits for no more than that
                elif before.download.arrived():
                    return None
                continue
            self._closing = plan is None
            return plan

    def _finish(self, steps: GpuSteps, queued: Queued) -> StepResult:
        result = steps.finish(queued)
        now = self._clock()  # a step that was queued early began when the one before ended
        result.seconds, self._last_end = now - max(queued.started, self._last_end), now
        return result


def attempt(part: Callable[..., Result], *arguments: object) -> Result | Exception:
    """A part of a step, or why it failed: that becomes the step's result."""
    try:
        return part(*arguments)
    except Exception as error:  # the engine loop's edge: it reaches the loop through `collect`
        return failure(error)


def failure(error: Exception) -> Exception:
    """What `collect` makes of an error: advice if memory ran out, DeviceLost if nothing will work any more."""
    text = str(error)
    if out_of_memory(error):
        traceback.clear_frames(error.__traceback__)  # the step's tensors are there still
        torch.cuda.empty_cache()
        LOG.error("%s (%s)", ADVICE, text.splitlines()[0])
        return StepOutOfMemory(ADVICE)
    LOG.error("a step failed", exc_info=error)
    kinds = getattr(torch, "AcceleratorError", ())  # after a failed kernel CUDA refuses everything
    lost = (kinds and isinstance(error, kinds)) or "CUDA error" in text or "Triton Error [CUDA]" in text
    return DeviceLost(text) if lost else error
