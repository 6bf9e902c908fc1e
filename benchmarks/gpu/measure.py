"""Timing and lines: what every part of the benchmark of a card writes its figures with.

`CardClock` times with events of the device and a cold L2, `HostClock` runs work once where there is no card, so that a
dry run walks through everything.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "serving"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from gpu.steps import captured
from gpu.without_msgspec import provide
from octavo.kernels.interface import Kernels

provide()  # before anything of the engine is imported
ROOT = Path(__file__).resolve().parents[2]
Work = Callable[[], object]


class Clock(Protocol):
    """Times work on a device."""

    def milliseconds(self, work: Work) -> float: ...

    def recorded(self, work: Work) -> Callable[[], None]:
        """Work that does the same again without the host."""
        ...


class CardClock:
    """Medians of repeated runs, each with a cold L2."""

    def __init__(self, *, repeats: int) -> None:
        self._repeats = repeats
        self._flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def milliseconds(self, work: Work) -> float:
        for _ in range(3):
            work()
        times = []
        for _ in range(self._repeats):
            self._flush.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return statistics.median(times)

    def recorded(self, work: Work) -> Callable[[], None]:
        return captured(work)[0].replay


class HostClock:
    """One run of each: a dry run's figures mean nothing."""

    def milliseconds(self, work: Work) -> float:
        began = time.perf_counter()
        work()
        return (time.perf_counter() - began) * 1000

    def recorded(self, work: Work) -> Callable[[], None]:
        def again() -> None:
            work()

        return again


@dataclass(frozen=True)
class Sizes:
    """The sizes that names speak of, cut to what a dry run can take."""

    batch: int = 1 << 30
    context: int = 1 << 30
    rows: int = 1 << 30
    width: int = 1 << 30

    def of(self, kind: str, nominal: int) -> int:
        """`nominal`, or the largest there is of that kind."""
        return min(nominal, int(getattr(self, kind)))


@dataclass(frozen=True)
class Line:
    """One measurement. `share`: of the copy bandwidth, or of the bf16 product's rate, as `of` says."""

    name: str
    milliseconds: float
    rate: float  # TB/s, TOPS, tokens/s or what `unit` says
    unit: str
    share: float | None = None
    of: str = ""


@dataclass
class Bench:
    """Keeps the lines. Rates are set against the ceilings, which come first."""

    kernels: Kernels
    clock: Clock
    sizes: Sizes = field(default_factory=Sizes)
    lines: dict[str, Line] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # what has no figure, and why
    bandwidth: float = 0.0  # bytes per second, read and written, of a copy
    bf16: float = 0.0  # operations per second of a bf16 product
    kept: Callable[[], None] = lambda: None  # called after each line
    until: float = float("inf")  # when the part that runs should have ended, of `time.monotonic`

    @property
    def device(self) -> torch.device:
        return self.kernels.device

    def has_time(self, name: str) -> bool:
        """Whether the part that runs may begin with `name`; says so if it may not."""
        if time.monotonic() < self.until:
            return True
        self.lacks(name, "the time of this part is over")
        return False

    def lacks(self, name: str, reason: str) -> None:
        """Say why something has no figure."""
        self.missing[name] = reason
        print(f"{name}: no figure: {reason}", flush=True)

    def moved(self, name: str, milliseconds: float, num_bytes: float) -> None:
        """Bytes against the copy."""
        rate = num_bytes / (milliseconds / 1000)
        self._keep(Line(name, milliseconds, rate / 1e12, "TB/s", rate / self.bandwidth, "copy"))

    def computed(self, name: str, milliseconds: float, operations: float) -> None:
        """Operations against the bf16 product."""
        rate = operations / (milliseconds / 1000)
        self._keep(Line(name, milliseconds, rate / 1e12, "TOPS", rate / self.bf16, "bf16"))

    def made(self, name: str, milliseconds: float, tokens: float, *, moved: float | None = None) -> None:
        """Tokens, and the bytes that had to be read for them against the copy."""
        seconds = milliseconds / 1000
        share = None if moved is None else moved / seconds / self.bandwidth
        self._keep(Line(name, milliseconds, tokens / seconds, "tok/s", share, "" if moved is None else "copy"))

    def note(self, name: str, value: float, unit: str) -> None:
        """A figure that has no ceiling here."""
        self._keep(Line(name, 0.0, value, unit))

    def rate(self, name: str) -> float | None:
        """A line's figure, if it was measured."""
        return self.lines[name].rate if name in self.lines else None

    def share(self, name: str) -> float | None:
        return self.lines[name].share if name in self.lines else None

    def _keep(self, line: Line) -> None:
        self.lines[line.name] = line
        share_text = "" if line.share is None else f"{line.share:7.2f} of {line.of}"
        print(f"{line.name:38} {line.milliseconds:9.4f} ms {line.rate:12.4g} {line.unit:7}{share_text}", flush=True)
        self.kept()
