"""Log files of the children: bounded in size, repeated on node's own output. Node's event loop.

Children append to their file directly, so a slow or dead node never blocks them. This module reads what was added,
repeats error lines (or every line, where node's output is the only log that anybody reads), and when a file has grown
too long moves its content to FILE.1 and empties it in place.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

MAX_LOG_BYTES = 64 << 20
READ_BYTES = 256 << 10
ERROR_LINE = re.compile(r"octavo: error:|\bERROR\b|\bCRITICAL\b|^E\d{4} |^Traceback |^\w*(Error|Exception)\b")
# Triton says these on every machine without an NVIDIA driver
HARMLESS = ("CudaDriverHelper has not been initialized", "Exit timeout expired")


class LogFile:
    """One growing file and how far it was read."""

    def __init__(self, name: str, path: Path, *, echo: Callable[[str], None] | None, everything: bool = False) -> None:
        self._name = name
        self._path = path
        self._echo = echo
        self._everything = everything
        self._offset = path.stat().st_size if path.exists() else 0

    def look(self) -> None:
        """Repeat new lines; empty the file if it is too long."""
        try:
            size = self._path.stat().st_size
        except FileNotFoundError:
            return
        if self._echo is not None and size > self._offset:
            self._repeat(self._echo)
        if size > MAX_LOG_BYTES:
            shutil.copyfile(self._path, f"{self._path}.1")
            os.truncate(self._path, 0)
            size = self._offset = 0
        if size < self._offset:
            self._offset = size

    def _repeat(self, echo: Callable[[str], None]) -> None:
        with open(self._path, "rb") as log:
            log.seek(self._offset)
            chunk = log.read(READ_BYTES)
        complete = chunk.rfind(b"\n") + 1 or len(chunk)
        self._offset += complete
        for line in printable_lines(chunk[:complete]):
            if self._is_repeated(line):
                echo(f"[{self._name}] {line[:500]}")

    def _is_repeated(self, line: str) -> bool:
        if self._everything:
            return bool(line)
        return bool(ERROR_LINE.search(line)) and not any(part in line for part in HARMLESS)


async def watch_logs(files: list[LogFile], *, interval: float = 0.5) -> None:
    """Look at every file now and then, until cancelled."""
    while True:
        for log in files:
            log.look()
        await asyncio.sleep(interval)


def printable_lines(data: bytes) -> list[str]:
    """Lines without control characters: what a log holds must not steer a terminal."""
    text = data.decode("utf-8", errors="replace").replace("\r", "\n")
    return ["".join(c if c.isprintable() else " " for c in line).rstrip() for line in text.split("\n")]


def last_error(path: Path, offset: int, *, lines: int = 3) -> str:
    """Why a program ended, by what it logged after `offset`: its one-line error, else its last lines."""
    try:
        with open(path, "rb") as log:
            log.seek(max(offset, os.fstat(log.fileno()).st_size - READ_BYTES))
            said = [line for line in printable_lines(log.read()) if line.strip()]
    except OSError:
        return ""
    for line in reversed(said):
        if "octavo: error:" in line:
            return line.partition("octavo: error:")[2].strip()
    errors = [line for line in said if ERROR_LINE.search(line) and not any(part in line for part in HARMLESS)]
    return " | ".join((errors or said)[-lines:])[:1500]


def progress_step(reason: str) -> str:
    """The reason with its percentage cut to tens: what must change for another line; times in it do not count."""
    words = [word for word in reason.split() if not word.replace(".", "").isdigit()]
    percent = [word for word in reason.split() if word.isdigit()]
    return " ".join(words) + (percent[-1][:-1] if reason.endswith("%") and percent else "")
