"""The real engine with two flaws: one prompt kills it, another makes a step last for ever, the first time."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from octavo.engine import __main__, core

POISON, QUICKSAND = [4000] * 8, [4001] * 8  # how a prompt begins


def _meets(submitted: core._Submitted, prompt: list[int]) -> bool:
    return any(step.start == 0 and list(step.token_ids[:8]) == prompt for step in submitted.plan.sequences)


class FlawedCore(core.EngineCore):
    def _collect(self) -> list:
        if _meets(self._submitted[0], POISON):
            os.kill(os.getpid(), signal.SIGKILL)
        trap = Path(os.environ["RUN_DIR"]) / "trap"
        if _meets(self._submitted[0], QUICKSAND) and not trap.exists():
            trap.touch()
            time.sleep(3600)
        return super()._collect()


if __name__ == "__main__":
    __main__.EngineCore = FlawedCore
    os._exit(__main__.main())
