"""All tests, as `make test` runs them: the soak, most of whose three minutes are other processes', beside the tests
that only compute, then the others alone, for some of those measure time.

    python tests/lanes.py [options of pytest]

Each file runs in exactly one lane. The exit code is zero if all of them passed.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

HERE = Path(__file__).resolve().parent
SOAK = HERE / "chaos" / "test_soak.py"
COMPUTING = tuple(HERE / name for name in ("kernels", "kernels_gpu", "models", "protocol", "quantization", "quantize"))
NOTHING_SELECTED = 5  # pytest's exit code


class Lanes:
    """Runs of pytest. Each takes its own interrupt, so that the servers that it started end."""

    def __init__(self, options: list[str]) -> None:
        self._options = options
        self._running: list[subprocess.Popen[bytes]] = []
        signal.signal(signal.SIGTERM, self._pass_on)

    def start(self, *arguments: object, output: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "pytest", *map(str, arguments), *self._options]
        self._running.append(subprocess.Popen(command, stdout=output, stderr=output and subprocess.STDOUT))
        return self._running[-1]

    def wait_all(self) -> None:
        for lane in self._running:
            lane.wait()

    def _pass_on(self, *_signal: object) -> None:
        for lane in self._running:
            lane.send_signal(signal.SIGINT)
        self.wait_all()
        sys.exit(128 + signal.SIGTERM)


def run(lanes: Lanes) -> list[int]:
    """Run every lane, whatever the others find; their exit codes."""
    print(f"lanes: {SOAK.name} beside {', '.join(path.name for path in COMPUTING)}; then all others", flush=True)
    with tempfile.TemporaryFile() as output:
        soak = lanes.start(SOAK, output=output)
        try:
            codes = [lanes.start(*COMPUTING).wait(), soak.wait()]
        finally:
            lanes.wait_all()
            output.seek(0)
            print(output.read().decode(errors="replace"), flush=True)
    rest = lanes.start(HERE, *(f"--ignore={path}" for path in (SOAK, *COMPUTING)))
    return [*codes, rest.wait()]


def main(options: list[str]) -> int:
    lanes = Lanes(options)
    try:
        codes = run(lanes)
    finally:
        lanes.wait_all()
    failed = [code for code in codes if code not in (0, NOTHING_SELECTED)]
    return failed[0] if failed else min(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
