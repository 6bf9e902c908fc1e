"""Plans to a runner's worker thread and results back: what the engine's loop sees of every runner."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable

from octavo.engine.interface import DeviceLost, RunnerError
from octavo.protocol.messages import EngineInfo
from octavo.scheduling.plan import StepPlan, StepResult


class PlanQueues:
    """The loop's side of a `Runner`. Who inherits starts a worker, which takes plans until None comes."""

    def __init__(self, info: EngineInfo) -> None:
        self.info = info
        # Not a SimpleQueue: its `get` with a time limit, which a runner may poll with, may wait until the next `put`.
        self._plans: queue.Queue[StepPlan | None] = queue.Queue()
        self._results: queue.SimpleQueue[StepResult | Exception] = queue.SimpleQueue()

    def _start(self, work: Callable[[], None]) -> None:
        """Run the worker. It ends before the interpreter does, for it writes to memory that would be gone."""
        self._worker = threading.Thread(target=work, name="octavo-runner", daemon=True)
        self._worker.start()
        self._at_exit = weakref.finalize(self, _end, self._plans, self._worker)

    def submit(self, plan: StepPlan) -> None:
        """Queue a plan and return at once."""
        self._plans.put(plan)

    def collect(self) -> StepResult:
        """Wait for the oldest submitted plan. Raises RunnerError if its step failed, DeviceLost if all will."""
        result = self._results.get()
        if isinstance(result, (DeviceLost, RunnerError)):
            raise result
        if isinstance(result, Exception):
            raise RunnerError(f"{type(result).__name__}: {result}") from result
        return result

    def close(self) -> None:
        """Stop the worker after the plans under way."""
        _end(self._plans, self._worker)
        self._at_exit.detach()


def _end(plans: queue.Queue[StepPlan | None], worker: threading.Thread) -> None:
    plans.put(None)
    worker.join()
