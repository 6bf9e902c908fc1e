"""What the engine loop asks of a runner. The loop and the runner's worker are two threads of the engine process."""

from __future__ import annotations

from typing import Protocol

from octavo.protocol.messages import EngineInfo
from octavo.scheduling.plan import StepPlan, StepResult


class RunnerError(RuntimeError):
    """A step failed as a whole; the runner stays usable."""


class StepOutOfMemory(RunnerError):
    """A step found no memory on the device; the message says what to lower."""


class DeviceLost(Exception):
    """The device refuses all further work of this process. The engine ends with it and is started again."""


class Runner(Protocol):
    """Computes plans in order. At most two are under way: one running, one waiting behind it."""

    info: EngineInfo

    def submit(self, plan: StepPlan) -> None:
        """Queue a plan and return at once. The plan and its lists must not change until its result was collected."""
        ...

    def collect(self) -> StepResult:
        """Wait for the oldest submitted plan. Raises RunnerError if its step failed."""
        ...

    def close(self) -> None:
        """Stop the worker and free the device."""
        ...
