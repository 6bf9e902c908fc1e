"""Child processes: spawn, signal, reap. Owned by node's main thread and its event loop.

Each child leads a session of its own and dies with node (guard.py). Node is the child subreaper, so whatever a dead
child leaves behind becomes node's child and is reaped here too. A child's group is killed before its leader is reaped:
until then no other process can have the number. Does not know what the children do.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

GUARD = Path(__file__).with_name("guard.py")
PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Program:
    """How to start one kind of child."""

    name: str  # "engine", "triton", "gateway-1"
    argv: tuple[str, ...]  # argv[0] is an absolute path
    environ: Mapping[str, str]
    log: Path
    death_signal: signal.Signals = signal.SIGTERM  # what the kernel sends it when node dies
    pass_fds: tuple[int, ...] = ()


@dataclass
class Child:
    """A started program. `exited` gets the exit code, or minus the signal."""

    program: Program
    process: subprocess.Popen[bytes]
    started: float
    log_offset: int  # size of its log file when it started
    exited: asyncio.Future[int] = field(repr=False)
    trouble: str = ""  # why node killed it

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return not self.exited.done()


class Children:
    """All children of node. `on_change` is called after each spawn."""

    def __init__(self, *, clock: Callable[[], float], on_change: Callable[[], None]) -> None:
        self._clock = clock
        self._on_change = on_change
        self._by_pid: dict[int, Child] = {}

    def open(self) -> None:
        """Become the subreaper and listen for deaths. Call once, from the main thread inside the running loop."""
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self._reap)

    @property
    def running(self) -> list[Child]:
        return list(self._by_pid.values())

    def spawn(self, program: Program) -> Child:
        """Start a program. Raises OSError if there is no memory or process number left."""
        guarded = [
            sys.executable,
            "-I",
            "-S",
            str(GUARD),
            str(int(program.death_signal)),
            str(os.getpid()),
            *program.argv,
        ]
        with open(program.log, "ab") as log:
            process = subprocess.Popen(
                guarded,
                env=dict(program.environ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=program.pass_fds,
                start_new_session=True,
            )
            offset = log.tell()
        child = Child(program, process, self._clock(), offset, asyncio.get_running_loop().create_future())
        self._by_pid[child.pid] = child
        self._on_change()
        return child

    def signal_group(self, child: Child, number: signal.Signals) -> None:
        """Send a signal to a child and all that it started; nothing if it is dead."""
        if child.running:
            _kill_group(child.pid, number)

    async def end(self, child: Child, *, seconds: float) -> None:
        """SIGTERM to the child itself, SIGKILL to its group if it is not gone in time."""
        if not child.running:
            return
        child.process.send_signal(signal.SIGTERM)
        await asyncio.wait({child.exited}, timeout=seconds)
        self.signal_group(child, signal.SIGKILL)
        await asyncio.wait({child.exited}, timeout=5)

    def _reap(self) -> None:
        while (pid := _dead_child()) is not None:
            child = self._by_pid.pop(pid, None)
            if child is not None:
                _kill_group(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            if child is not None:
                child.process.returncode = os.waitstatus_to_exitcode(status)
                child.exited.set_result(child.process.returncode)


def _dead_child() -> int | None:
    """The pid of a dead child that is not reaped yet."""
    try:
        info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return info.si_pid if info is not None else None


def _kill_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # gone, or only the unreaped leader is left
        os.killpg(pid, number)


async def process_end(pid: int) -> None:
    """Wait until any process has ended, at once if there is none."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(handle, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(handle)
        os.close(handle)


def exit_text(code: int) -> str:
    """An exit code in words: "exit code 2", "signal SIGKILL"."""
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
