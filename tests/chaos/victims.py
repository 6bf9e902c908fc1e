"""A running server as chaos sees it: its processes by name, faults, recovery times, and what it must not leave."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from server.conftest import Server

STUB = "triton_python_b"  # the kernel cuts names there


def process_fields(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def alive(pid: int) -> bool:
    """Neither gone nor a zombie."""
    return process_fields(pid)[:1] not in ([], ["Z"], ["X"])


def children_of(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and process_fields(int(entry.name))[1:2] == [str(parent)]:
            found.append(int(entry.name))
    return found


def descendants_of(root: int) -> list[int]:
    found, level = [], [root]
    while level:
        level = [child for pid in level for child in children_of(pid)]
        found += level
    return found


def wait_until(condition: Callable[[], object], *, seconds: float, what: str,
               why: Callable[[], str] = lambda: "") -> float:
    """Seconds until it came true. AssertionError if it did not; `why` may know more."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"{what}: not within {seconds} s {why()}"
        time.sleep(0.02)
    return time.monotonic() - began


@dataclass(frozen=True)
class Footprint:
    """What a server holds while it is idle."""

    processes: int
    descriptors: dict[str, int]  # by process name
    threads: dict[str, int]  # by process name
    memory_mb: dict[str, int]  # resident, by process name
    regions: int  # in /dev/shm


class Victim:
    """A server that is about to suffer. Only its own processes are ever touched."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.node = int((server.run_dir / "node.pid").read_text())
        self.prefix = json.loads((server.run_dir / "node.json").read_text())["shm_prefix"]
        self._http = httpx.Client(timeout=10, trust_env=False)

    def health(self) -> dict:
        return self._http.get(f"{self.server.health}/v2/health").json()

    def ready(self) -> bool:
        return self._http.get(f"{self.server.health}/v2/health/ready").status_code == 200

    def pid(self, name: str) -> int | None:
        """Of node, stub, engine, triton or gateway-N; None while there is none."""
        if name == "node":
            return self.node
        wanted = "triton" if name == "stub" else name
        pid = next(process["pid"] for process in self.health()["processes"] if process["name"] == wanted)
        if name != "stub" or pid is None:
            return pid
        return next((child for child in children_of(pid) if comm(child) == STUB), None)

    @property
    def gateways(self) -> list[str]:
        return [process["name"] for process in self.health()["processes"] if process["name"].startswith("gateway")]

    def signal(self, name: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Send it, and return the pid that got it. Waits for a process of that name first."""
        wait_until(lambda: self.pid(name) is not None, seconds=20, what=f"a process {name}")
        pid = self.pid(name)
        assert pid is not None
        assert pid == self.node or self.node in ancestors(pid), f"{pid} is not ours"
        os.kill(pid, number)
        return pid

    def wait_reborn(self, name: str, old: int, *, seconds: float) -> float:
        """Until another process has its name."""
        return wait_until(lambda: self.pid(name) not in (None, old), seconds=seconds, what=f"a new {name}")

    def wait_ready(self, *, seconds: float) -> float:
        return wait_until(self.ready, seconds=seconds, what="ready", why=lambda: str(self.health()))

    def recover(self, name: str, old: int, *, seconds: float) -> float:
        """Until another process has its name and readiness says 200."""
        began = time.monotonic()
        self.wait_reborn(name, old, seconds=seconds)
        self.wait_ready(seconds=seconds)
        return time.monotonic() - began

    def serve_one(self) -> None:
        """A short request that ends well, and the time node may need to hear of it."""
        body = {"text": "hello, llm", "max_dec_len": 4}
        answer = self._http.post(f"{self.server.gateway}/v1/chat/completions", json=body, timeout=30)
        assert answer.status_code == 200, answer.text
        time.sleep(0.6)

    def regions(self) -> list[str]:
        return [entry.name for entry in Path("/dev/shm").iterdir() if entry.name.startswith(self.prefix)]

    def wait_idle(self, *, seconds: float = 10.0) -> dict:
        """Until nothing runs, waits or holds a block; the engine's gauges."""

        def idle() -> bool:
            body = self.health()
            gauges = body["engine"] or {}
            busy = [gauges.get(name, 0) for name in ("num_running", "num_waiting", "num_used_blocks")]
            return body["ready"] and not any(busy) and not body["frontend"]["running"]

        wait_until(idle, seconds=seconds, what="idle")
        return self.health()["engine"]

    def footprint(self) -> Footprint:
        names = {self.node: "node"} | {process["pid"]: process["name"] for process in self.health()["processes"]}
        stub = self.pid("stub")
        names |= {stub: "stub"} if stub else {}
        return Footprint(
            processes=len(descendants_of(self.node)) + 1,
            descriptors={name: len(os.listdir(f"/proc/{pid}/fd")) for pid, name in names.items()},
            threads={name: len(os.listdir(f"/proc/{pid}/task")) for pid, name in names.items()},
            memory_mb={name: resident_mb(pid) for pid, name in names.items()},
            regions=len(self.regions()),
        )

    def leaks(self, before: Footprint, *, descriptors: int = 8, threads: int = 8) -> list[str]:
        """What the idle server holds more than before."""
        now = self.footprint()
        found = []
        if now.processes != before.processes:
            found.append(f"{now.processes} processes, {before.processes} before")
        if now.regions != before.regions:
            found.append(f"{now.regions} regions of shared memory, {before.regions} before")
        for name, count in now.descriptors.items():
            if count > before.descriptors.get(name, 0) + descriptors:
                found.append(f"{name} has {count} descriptors, {before.descriptors.get(name)} before")
        for name, count in now.threads.items():
            if count > before.threads.get(name, 0) + threads:  # pools start theirs when they are first used
                found.append(f"{name} has {count} threads, {before.threads.get(name)} before")
        return found

    def close(self) -> None:
        self._http.close()


def comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def resident_mb(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
    except (OSError, IndexError):
        return 0


def ancestors(pid: int) -> list[int]:
    found = []
    while (fields := process_fields(pid)) and int(fields[1]) > 1:
        pid = int(fields[1])
        found.append(pid)
    return found
