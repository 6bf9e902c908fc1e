"""What a run of the benchmark has found: on disk after every line, and a table when it ends, however that comes.

A run ends by itself, by its time (a thread sees to it, should the card hang), or by a signal. What was measured until
then is kept each time, and a part that fails costs no other part its figures.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import goals
from measure import Bench

EXIT_FAILED, EXIT_LATE, EXIT_STOPPED = 1, 3, 143


class Stopped(BaseException):
    """Somebody asked for the end."""


@dataclass
class Report:
    """Everything that goes into the JSON."""

    bench: Bench
    path: Path | None
    about: dict[str, object]
    ended: str = "under way"  # or how it ended
    left_out: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # parts, and why in one line
    seconds: dict[str, float] = field(default_factory=dict)  # of each part
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def save(self) -> None:
        """Replaces the file at once: a reader never sees half of it."""
        if self.path is None:
            return
        found = self.about | {
            "ended": self.ended, "left_out": self.left_out, "failed": self.failed, "seconds": self.seconds,
            "missing": self.bench.missing,
            "lines": [asdict(line) for line in list(self.bench.lines.values())], "goals": goals.rows(self.bench),
        }  # fmt: skip
        with self._lock:
            beside = self.path.with_name(f".{self.path.name}.new")
            beside.write_text(json.dumps(found, indent=1) + "\n")
            beside.replace(self.path)

    def part(self, name: str, work: Callable[[], None]) -> None:
        """Run a part; its failure is noted, and the next one runs."""
        began = time.monotonic()
        try:
            work()
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            self.failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            print(f"{name}: failed: {self.failed[name]}", flush=True)
        self.seconds[name] = round(time.monotonic() - began, 1)
        print(f"-- {name}: {self.seconds[name]} s", flush=True)
        self.save()

    def finish(self, ended: str) -> None:
        """The table and the last JSON; once."""
        with self._lock:
            if self.ended != "under way":
                return
            self.ended = ended
            goals.show(goals.rows(self.bench))
            for name, reason in self.failed.items():
                print(f"failed: {name}: {reason}")
            print(f"{ended}{'; left out: ' + ' '.join(self.left_out) if self.left_out else ''}", flush=True)
            self.save()

    @contextmanager
    def watched(self, seconds: float) -> Iterator[None]:
        """Inside, the run ends after so many seconds at the latest, and with SIGTERM, its processes with it."""

        def late() -> None:
            self.finish(f"stopped after {seconds:.0f} s, the time that was given")
            end_children()
            os._exit(EXIT_LATE)

        def asked(*_: object) -> None:
            raise Stopped

        before = signal.signal(signal.SIGTERM, asked)
        timer = threading.Timer(seconds, late)
        timer.daemon = True
        timer.start()
        try:
            yield
            self.finish("done")
        except (Stopped, KeyboardInterrupt):
            self.finish("stopped by a signal")
            end_children()
            os._exit(EXIT_STOPPED)
        finally:
            timer.cancel()
            signal.signal(signal.SIGTERM, before)


def end_children() -> None:
    """Servers and other engines that this process started."""
    for path in Path("/proc/self/task").glob("*/children"):
        for child in path.read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGTERM)
