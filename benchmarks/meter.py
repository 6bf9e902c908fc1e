"""What the machine allows and what was reached, side by side; and what a process has in memory. Used by cpu.py.

A shared machine changes its speed within seconds, so the ceilings are measured before and after every single run.
"""

from __future__ import annotations

import contextlib
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from standard_model import CACHE_BYTES, HEAD_WEIGHTS, WEIGHTS

HERE = Path(__file__).resolve().parent
TILE_ROWS = 16  # of an AMX tile
CONTEXT = 256  # tokens behind every sequence of a decode figure whose name does not say


@dataclass(frozen=True)
class Rates:
    """What the machine gives now; zero is not known, or not there."""

    read: float  # GB/s
    vectors: float  # GOPS of vpdpbusd
    tiles: float  # GOPS of tdpbusd

    @property
    def instruction(self) -> str:
        """The fastest that multiplies int8."""
        return "tdpbusd (AMX)" if self.tiles > self.vectors else "vpdpbusd (AVX-512 VNNI)"

    def product_seconds(self, operations: Callable[[int], float], rows: int) -> float:
        """Of the fastest instruction for this many rows; tiles take sixteen rows whether they are full or not."""
        ways = [(self.vectors, rows), (self.tiles, -(-rows // TILE_ROWS) * TILE_ROWS)]
        return min((operations(worked) / (rate * 1e9) for rate, worked in ways if rate), default=0.0)

    @classmethod
    def middle(cls, probes: Sequence[Rates], of: Callable[[list[float]], float] = statistics.median) -> Rates:
        return cls(*(of(list(column)) for column in zip(*map(astuple, probes))))


@dataclass(frozen=True)
class Ceilings:
    """The small program that says what the machine gives now; zeros without a compiler or the instructions."""

    program: Path
    threads: int

    @classmethod
    def build(cls, folder: Path, threads: int) -> Ceilings:
        flags = ["-O3", "-std=c++17", "-mavx512f", "-mavx512bw", "-mavx512vnni", "-Wno-psabi", "-pthread"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            subprocess.run(["g++", *flags, str(HERE / "ceilings.cpp"), "-o", str(folder / "ceilings")], check=True)
        return cls(folder / "ceilings", threads)

    def measure(self, seconds: float = 0.12) -> Rates:
        """Takes five times as long: three ways of reading, two of multiplying."""
        try:
            command = [str(self.program), str(self.threads), str(seconds)]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return Rates(0.0, 0.0, 0.0)
        return Rates(*map(float, printed.split()))


def limit(tokens: int, limbs: int, rates: Rates, *, logits: int, cached: int = 0) -> tuple[float, str]:
    """Least seconds of a step of `tokens` rows, `logits` of them through the head, over `cached` tokens; and why."""
    num_bytes = WEIGHTS + (HEAD_WEIGHTS if logits else 0) + cached * CACHE_BYTES
    reading = num_bytes / (rates.read * 1e9) if rates.read else 0.0
    working = sum(
        rates.product_seconds(lambda rows, size=size: 2.0 * rows * size, limbs * rows)
        for rows, size in ((tokens, WEIGHTS), (logits, HEAD_WEIGHTS))
    )
    return (reading, "reading") if reading >= working else (working, "multiplying")


@dataclass
class Meter:
    """Runs something some times, each between two looks at the ceilings."""

    ceilings: Ceilings
    limbs: int
    runs: int

    def measure(self, name: str, run: Callable[[], float]) -> dict[str, object]:
        """Medians of rates and of their shares of the limit. The name says what ran: decode_16_at_2048, prompt_512."""
        rates, shares, with_cache, probes = [], [], [], [self.ceilings.measure()]
        for _ in range(self.runs):
            rates.append(run())
            probes.append(self.ceilings.measure())
            machine = Rates.middle(probes[-2:], statistics.mean)
            shares.append(rates[-1] * seconds_per_token(name, self.limbs, machine, cache=False)[0])
            with_cache.append(rates[-1] * seconds_per_token(name, self.limbs, machine, cache=True)[0])
        print(name, *(f"{rate:.1f} ({share:.0%})" for rate, share in zip(rates, shares)), file=sys.stderr, flush=True)
        machine = Rates.middle(probes)
        return {
            "median": statistics.median(rates),
            "best": max(rates),
            "worst": min(rates),
            "share": statistics.median(shares),
            "share_with_cache": statistics.median(with_cache),
            "limited_by": seconds_per_token(name, self.limbs, machine, cache=False)[1],
            **asdict(machine),
        }


def seconds_per_token(name: str, limbs: int, rates: Rates, *, cache: bool) -> tuple[float, str]:
    """What the machine allows at best for a figure of this name, and what limits it."""
    kind, *numbers = name.replace("_at_", "_").split("_")
    tokens = int(numbers[0])
    context = int(numbers[1]) if len(numbers) > 1 else CONTEXT
    decodes = kind == "decode"
    logits, cached = tokens if decodes else 1, tokens * context if decodes and cache else 0
    seconds, why = limit(tokens, limbs, rates, logits=logits, cached=cached)
    return seconds / tokens, why


def memory_mib() -> dict[str, float]:
    """This process's memory: the largest so far, all of now, that without files, and with a share of what is shared."""
    lines = (
        Path("/proc/self/status").read_text().splitlines()
        + Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    )
    fields = {name: text for name, text in (line.split(":", 1) for line in lines)}
    names = {"peak": "VmHWM", "resident": "VmRSS", "anonymous": "RssAnon", "proportional": "Pss"}
    return {key: int(fields[name].split()[0]) / 1024 for key, name in names.items()}


def processor() -> str:
    """What Linux calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
