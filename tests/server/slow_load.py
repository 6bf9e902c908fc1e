"""The real start command, node and engine, but a load rests after each step that it tells of, as if the disk were slow.

`python slow_load.py` is the start command; with `node` or `engine` it is that process.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from octavo.engine import __main__ as engine
from octavo.engine.core import EngineCore
from octavo.engine.server import Progress
from octavo.node import __main__ as node
from octavo.node import launch
from octavo.node.programs import Programs
from octavo.settings import Settings

REST_SECONDS = 0.25


def rests(load: Callable[[Progress], EngineCore]) -> Callable[[Progress], EngineCore]:
    def slowly(progress: Progress) -> EngineCore:
        def tell(stage: str, fraction: float) -> None:
            progress(stage, fraction)
            time.sleep(REST_SECONDS)

        return load(tell)

    return slowly


def run_engine() -> int:
    loader = engine.loader

    def slow_loader(settings: Settings) -> Callable[[Progress], EngineCore]:
        return rests(loader(settings))

    engine.loader = slow_loader
    return engine.main()


def main(process: str) -> int:
    command = (sys.executable, __file__)
    if process == "engine":
        return run_engine()
    if process == "node":
        return node.main(Programs(engine=(*command, "engine")))
    return launch.main(node=(*command, "node"))


if __name__ == "__main__":
    code = main(sys.argv[1] if len(sys.argv) > 1 else "")
    sys.stdout.flush()
    os._exit(code)
