"""The stop command: `python -m octavo.node.stop`, called by stop_server.sh. Standard library only.

Finds node by its record in the run directory (pid and start time: a reused pid is nobody), asks it to drain, and if it
does not end in time kills it and what it started. Removes what a killed one left behind.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from octavo.node import run_dir
from octavo.node.__main__ import fail
from octavo.node.errors import EXIT_BAD_SETTINGS, EXIT_FAILED
from octavo.node.run_dir import ProcessId, Record
from octavo.settings import Settings, SettingsError

MARGIN_SECONDS = 30.0  # after DRAIN_SECONDS, for the processes to end
LEFTOVER_SECONDS = 3.0  # for children of a dead node to end by themselves


def main() -> int:
    """Stop one server. Returns 0 also if there was none."""
    try:
        settings = Settings.from_environ()
        found = find(settings)
    except SettingsError as error:
        return fail(error, EXIT_BAD_SETTINGS)
    if not found:
        print("octavo: no server is running")
        return 0
    if len(found) > 1:
        for path, record in found:
            print(f"  HTTP_PORT={record.ports.get('HTTP_PORT')}  pid {record.node.pid}  RUN_DIR={path}")
        return fail(Exception("several servers are running; set HTTP_PORT or RUN_DIR to the one to stop"), EXIT_FAILED)
    return stop(*found[0])


def find(settings: Settings) -> list[tuple[Path, Record]]:
    """The server of RUN_DIR; if there is none and RUN_DIR is the default one, all of this user's."""
    own = run_dir.read_record(settings.run_dir)
    if own is not None:
        return [(settings.run_dir, own)]
    if settings.run_dir != Settings.from_environ({}).run_dir:
        return []
    others = sorted(settings.run_dir.parent.glob("*/node.json"))
    return [
        (path.parent, record) for path in others if (record := run_dir.read_record(path.parent)) and record.node.alive
    ]


def stop(path: Path, record: Record) -> int:
    """Drain, wait, kill if need be, clean up."""
    node = record.node
    if node.alive:
        print(
            f"octavo: stopping (pid {node.pid}); running requests have up to {record.drain_seconds} s to end",
            flush=True,
        )
        family = {node, *descendants(node)}
        os.kill(node.pid, signal.SIGTERM)
        if not gone({node}, seconds=record.drain_seconds + MARGIN_SECONDS):
            print("octavo: it did not end in time; killing it", flush=True)
            kill({*family, *descendants(node)})
    leftovers = set(record.children)
    if not gone(leftovers, seconds=LEFTOVER_SECONDS):
        kill(leftovers)
    run_dir.remove_shared_memory(record.shm_prefix)
    if (now := run_dir.read_record(path)) is None or now.node == node:
        run_dir.remove_record(path)
    print("octavo: stopped")
    return 0


def gone(processes: set[ProcessId], *, seconds: float) -> bool:
    """Wait until none of them is alive; False if time runs out."""
    deadline = time.monotonic() + seconds
    while any(process.alive for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def kill(processes: set[ProcessId]) -> None:
    """SIGKILL each, with its group if it leads one."""
    for process in processes:
        if process.alive:
            leads = run_dir.process_stat(process.pid)[2:3] == [str(process.pid)]
            (os.killpg if leads else os.kill)(process.pid, signal.SIGKILL)
    gone(processes, seconds=5.0)


def descendants(node: ProcessId) -> Iterator[ProcessId]:
    """All processes below it: being the subreaper, it keeps even those whose parent died."""
    parents = {
        int(entry.name): int(fields[1])
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and (fields := run_dir.process_stat(int(entry.name)))
    }
    level = {node.pid}
    while level := {pid for pid, parent in parents.items() if parent in level}:
        yield from (found for pid in level if (found := ProcessId.of(pid)))


if __name__ == "__main__":
    sys.exit(main())
