"""Another engine in a process and an environment of its own: asking it, its memory, the model folder that it loads.

The questions are those of peers/protocol.py. A process sleeps (SIGSTOP) while it is not asked. Used by peers.py and
served.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
OURS = "octavo"
PEERS = ("vllm", "openvino", "llama", "transformers", "ctranslate2")


class PeerError(Exception):
    """The peer did not do it; one sentence."""


@dataclass
class Peer:
    """A driver's process. Its whole group sleeps but for the time of a question."""

    name: str
    python: str
    folder: Path
    log: Path
    gone: str | None = None  # why it is out of the session
    figures: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def start(self) -> None:
        driver = HERE / "peers" / f"drive_{self.name}.py"
        self._process = subprocess.Popen(
            [self.python, str(driver)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("wb"),
            start_new_session=True,
        )

    def ask(self, message: dict[str, object], *, seconds: float) -> dict[str, float]:
        """PeerError if it says so, dies or takes longer."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        self._signal(signal.SIGCONT)
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], seconds)
            line = process.stdout.readline() if ready else b""
        except OSError as error:
            raise PeerError(f"its process ended: {error}") from None
        finally:
            self._signal(signal.SIGSTOP)
        if not ready:
            raise PeerError(f"no answer within {seconds:.0f} s")
        if not line:
            raise PeerError(f"its process ended; see {self.log}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def resident_mib(self) -> float:
        """Proportional resident memory of its processes."""
        total = 0
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError, StopIteration):
                if os.getsid(int(folder.name)) == self._process.pid:
                    lines = (folder / "smaps_rollup").read_text().splitlines()
                    total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return total / 1024

    def end(self) -> None:
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGKILL)
        self._process.wait(30)

    def rate(self, name: str) -> float | None:
        """Of the first run."""
        return self.figures[name][0]["tok_s"] if name in self.figures else None

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def prepare(name: str, python: str, *, source: Path, work: Path) -> Path:
    """The folder that a peer loads, made by its driver the first time. PeerError if it cannot be made."""
    bf16, float_head = work / "bf16", work / "vllm"
    flags = ["--float-head", str(float_head)] if name == "vllm" else ["--bf16", str(bf16)]
    subprocess.run([sys.executable, str(HERE / "checkpoints.py"), str(source), *flags], check=True)
    if name == "vllm":
        return float_head
    if name == "transformers":
        return bf16
    target = work / name
    if not (target / ".complete").is_file():
        print(f"{name}: making {target}", file=sys.stderr, flush=True)
        command = [python, str(HERE / "peers" / f"drive_{name}.py"), "prepare", str(bf16), str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PeerError(f"its model folder cannot be made: {(done.stderr or done.stdout)[-400:].strip()}")
        (target / ".complete").touch()
    return target
