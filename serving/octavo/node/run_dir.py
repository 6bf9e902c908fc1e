"""The run directory: made private, locked for life, with a record of what runs.

Shared by node, the start and the stop command.

node.lock is held by a living node; node.pid has its pid; node.json what the stop command needs when node is gone or
hangs: start times (against reused pids), children and the prefix of Triton's shared memory regions.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from octavo.node.errors import EXIT_ALREADY_RUNNING, EXIT_BAD_SETTINGS, NodeError

SHARED_MEMORY = Path("/dev/shm")
SHM_PREFIX = "octavo_"


@dataclass(frozen=True)
class ProcessId:
    """A process that cannot be confused with a later one of the same number."""

    pid: int
    start_time: int  # clock ticks after boot, from /proc/PID/stat

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """None if there is no such process, or only its zombie."""
        fields = process_stat(pid)
        return cls(pid, int(fields[19])) if fields and fields[0] not in "ZX" else None

    @property
    def alive(self) -> bool:
        return ProcessId.of(self.pid) == self


@dataclass(frozen=True)
class Record:
    """node.json."""

    node: ProcessId
    drain_seconds: int
    shm_prefix: str
    ports: dict[str, int] = field(default_factory=dict)
    children: tuple[ProcessId, ...] = ()


def process_stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on (state, ppid, pgrp, session, …); empty if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            text = file.read(4096)
    except OSError:
        return []
    return text.rpartition(b")")[2].decode("ascii").split()


def make_run_dir(path: Path) -> None:
    """Create the directory and its parents for this user alone. Raises NodeError if others could write there."""
    missing = [folder for folder in (*reversed(path.parents), path) if not folder.exists()]
    try:
        for folder in missing:
            folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise _bad(path, f"cannot be made: {error.strerror}") from None
    for folder in {path, *missing, *([path.parent] if path.parent.name == f"octavo-{os.getuid()}" else [])}:
        _check_private(folder)


def make_log_dir(path: Path) -> None:
    """Create LOG_DIR if it is missing. Raises NodeError if it cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "node.log").touch()
    except OSError as error:
        raise NodeError(f"LOG_DIR={path}: {error.strerror}", exit_code=EXIT_BAD_SETTINGS) from None


def _check_private(folder: Path) -> None:
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise _bad(folder, "is not a folder")
    if status.st_uid != os.getuid():
        raise _bad(folder, f"belongs to another user (uid {status.st_uid})")
    if status.st_mode & 0o022:
        raise _bad(folder, "can be written by other users; give it a folder of its own (chmod 700)")


def _bad(path: Path, reason: str) -> NodeError:
    return NodeError(f"RUN_DIR={path}: {reason}", exit_code=EXIT_BAD_SETTINGS)


def lock(path: Path) -> int:
    """Take node.lock for as long as the returned descriptor is open. Raises NodeError if a node holds it."""
    handle = os.open(path / "node.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise NodeError(
            f"already running (pid {running_pid(path)}); stop it with stop_server.sh", exit_code=EXIT_ALREADY_RUNNING
        ) from None
    return handle


def running_pid(path: Path) -> str:
    """The pid as text, for messages."""
    try:
        return (path / "node.pid").read_text().strip()
    except OSError:
        return "unknown"


def write_record(path: Path, record: Record) -> None:
    """Replace node.pid and node.json, each in one move."""
    for name, text in (("node.json", json.dumps(asdict(record), indent=1)), ("node.pid", f"{record.node.pid}\n")):
        temporary = path / f".{name}.new"
        temporary.write_text(text)
        temporary.replace(path / name)


def read_record(path: Path) -> Record | None:
    """What the last node wrote; None if there is none or it cannot be read."""
    try:
        raw = json.loads((path / "node.json").read_text())
        return Record(
            node=ProcessId(**raw["node"]),
            drain_seconds=int(raw["drain_seconds"]),
            shm_prefix=str(raw["shm_prefix"]),
            ports=dict(raw["ports"]),
            children=tuple(ProcessId(**child) for child in raw["children"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remove_record(path: Path) -> None:
    """Forget the node; the last thing it does."""
    for name in ("node.pid", "node.json"):
        (path / name).unlink(missing_ok=True)


def remove_shared_memory(prefix: str) -> list[str]:
    """Delete Triton's regions of that prefix and return their names. A prefix not made by us deletes nothing."""
    if not prefix.startswith(SHM_PREFIX) or len(prefix) < len(SHM_PREFIX) + 8 or not SHARED_MEMORY.is_dir():
        return []
    names = [entry.name for entry in SHARED_MEMORY.iterdir() if entry.name.startswith(prefix)]
    for name in names:
        (SHARED_MEMORY / name).unlink(missing_ok=True)
    return names


def remains(record: Record) -> Iterable[ProcessId]:
    """Children of a record that are still alive."""
    return (child for child in record.children if child.alive)
