"""The engine as a child of the front end: only where no node starts it (bare Triton). Used by the link thread alone.

The interpreter inside Triton's stub is embedded: sys.executable is not python, and multiprocessing cannot spawn. So
the child is started by path, with this process's module search path. It outlives this process (its own session): a
later front end may find it and attach.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from octavo.engine import run_dir
from octavo.settings import Settings, child_environ

log = logging.getLogger("octavo.frontend")

EXIT_REASONS = {2: "bad settings or model", 3: "INFER_QUEUE_PORT is in use by another program"}
EXIT_LOCKED = 4  # another engine holds the lock: attach to that one
FIRST_PAUSE, LAST_PAUSE = 0.5, 4.0  # seconds between starts; below the five in which an engine is promised to be back


def find_python() -> str:
    """The interpreter whose environment this process uses."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    names = (version, "python3", "python")
    folders = dict.fromkeys((sys.prefix, sys.exec_prefix, sys.base_prefix))
    for path in [Path(folder) / "bin" / name for folder in folders for name in names]:
        if path.is_file() and os.access(path, os.X_OK):
            return str(path)
    for found in map(shutil.which, names):
        if found:
            return found
    return sys.executable or "python3"


class EngineProcess:
    """Starts `python -m octavo.engine`, again after it died, with growing pauses."""

    def __init__(self, settings: Settings, *, clock: Callable[[], float], command: list[str] | None = None) -> None:
        environ = child_environ(settings)
        environ.pop("OCTAVO_NODE", None)
        paths = [str(Path(__file__).resolve().parents[2]), *(path for path in sys.path if path)]
        environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
        self._environ = environ
        self._run_dir = settings.run_dir
        self._command = command or [find_python(), "-m", "octavo.engine"]
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self._pause = FIRST_PAUSE
        self._not_before = 0.0

    def ensure(self) -> str | None:
        """Start the engine if none runs and its pause is over. A text if it never will: bad settings."""
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                return None
            self._process = None
            if code in EXIT_REASONS:
                return f"the engine ended with code {code}: {EXIT_REASONS[code]}"
            self._not_before = self._clock() + self._pause
            self._pause = min(self._pause * 2, LAST_PAUSE)
        if self._clock() >= self._not_before:
            self._process = subprocess.Popen(self._command, env=self._environ, stdin=subprocess.DEVNULL,
                                             start_new_session=True)
        return None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """End an engine that hangs: the child, or one that an earlier front end left (the holder of the lock)."""
        pid = self._process.pid if self._process is not None else None
        if pid is None and run_dir.is_locked(self._run_dir):
            pid = run_dir.running_pid(self._run_dir)
        if pid is not None:
            log.warning("the engine (pid %d) hangs; killing it", pid)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)

    def settled(self) -> None:
        """It is attached: the next failure is a new one."""
        self._pause = FIRST_PAUSE

    def end(self, timeout: float) -> None:
        """Wait for it to end by itself, then end it."""
        if self._process is None:
            return
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
