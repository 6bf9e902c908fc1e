"""What a run of the tests on a card may take: later tests are left out by name, and one that hangs ends the run.

A plugin of pytest, used by conftest.py where there is a card.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator

import pytest

EXIT_LATE = 3


class TimeLimit:
    """`seconds` after it was made no test begins; `grace` later the run ends, with the stacks of what still ran."""

    def __init__(self, config: pytest.Config, *, seconds: float, grace: float) -> None:
        self._config = config
        self._seconds = seconds
        self._began = time.monotonic()
        self._running = "nothing"
        self._timer = threading.Timer(seconds + grace, self._late)
        self._timer.daemon = True
        self._timer.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._running = item.nodeid
        return (yield)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        if time.monotonic() - self._began > self._seconds:
            pytest.skip(f"left out: the {self._seconds:.0f} s that all may take are over")

    def pytest_sessionfinish(self) -> None:
        self._timer.cancel()

    def _late(self) -> None:
        capture = self._config.pluginmanager.getplugin("capturemanager")
        if capture is not None:
            capture.suspend_global_capture(in_=True)
        print(f"\nthe time is over, and {self._running} has not ended", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        os._exit(EXIT_LATE)
