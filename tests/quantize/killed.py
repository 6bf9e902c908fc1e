"""`octavo` in a process that ends like by `kill -9` at one place of its work.

`python killed.py MODULE:NAME COUNT ARGUMENT...`: the COUNTth call of that function kills the process instead.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from typing import Any

from octavo.cli.main import main


def kill_at(place: str, count: int) -> None:
    """Put a trap in place of a function, or of a method as MODULE:CLASS.NAME."""
    module, _, path = place.partition(":")
    owner: Any = importlib.import_module(module)
    *parts, name = path.split(".")
    for part in parts:
        owner = getattr(owner, part)
    whole, calls = getattr(owner, name), []

    def trap(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*arguments, **named)

    setattr(owner, name, trap)


def run_killed(place: str, count: int, *arguments: str, num_threads: int) -> int:
    """The exit code of such a process."""
    command = [sys.executable, __file__, place, str(count), *arguments]
    return subprocess.run(
        command, env=environ(num_threads=num_threads), capture_output=True, check=False, timeout=120
    ).returncode


def environ(*, num_threads: int) -> dict[str, str]:
    """Of a process whose sums are split as here, whatever other tests have put into the environment."""
    path = os.pathsep.join(path for path in sys.path if path)
    count = str(num_threads)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}


if __name__ == "__main__":
    kill_at(sys.argv[1], int(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
