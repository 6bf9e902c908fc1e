"""The engine process with the fake runner in place of a model: `python fake_engine.py [load seconds] [step seconds]`.

Everything else is the real program: settings, lock, key, socket, signals, exit codes.
"""

from __future__ import annotations

import os
import sys
import time

from octavo.engine import __main__ as program
from octavo.engine.core import EngineCore, make_scheduler
from scheduling.fake_runner import FakeRunner, make_info


def main() -> int:
    load_seconds, step_seconds = (float(text) for text in [*sys.argv[1:], "0", "0"][:2])

    def loader(settings):
        def load(progress):
            progress("weights", 0.5)
            time.sleep(load_seconds)
            runner = FakeRunner(make_info(64), before_step=lambda plan: time.sleep(step_seconds))
            scheduler = make_scheduler(runner.info, max_num_batched_tokens=256, prefix_cache=settings.prefix_cache)
            return EngineCore(scheduler, runner, time.monotonic)

        return load

    program.loader = loader
    return program.main()


if __name__ == "__main__":
    os._exit(main())
