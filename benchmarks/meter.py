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
from dataclasses import dataclass
from pathlib import Path

from standard_model import CACHE_BYTES, HEAD_WEIGHTS, WEIGHTS

HERE = Path(__file__).resolve().parent
CONTEXT = 256  # tokens behind every sequence of a decode figure whose name does not say


@dataclass(frozen=True)
class Ceilings:
    """The small program that says what the machine gives now; zeros without a compiler or the instruction."""

    program: Path
    threads: int

    @classmethod
    def build(cls, folder: Path, threads: int) -> Ceilings:
        flags = ["-O3", "-std=c++17", "-mavx512f", "-mavx512bw", "-mavx512vnni", "-Wno-psabi", "-pthread"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            subprocess.run(["g++", *flags, str(HERE / "ceilings.cpp"), "-o", str(folder / "ceilings")], check=True)
        return cls(folder / "ceilings", threads)

    def measure(self) -> tuple[float, float]:
        """GB/s of reading and GOPS of the int8 instruction."""
        try:
            command = [str(self.program), str(self.threads), "0.12"]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return 0.0, 0.0
        read, products = map(float, printed.split())
        return read, products


def limit(tokens: int, limbs: int, *, read: float, products: float, logits: int, cached: int = 0) -> float:
    """Least seconds of a step of `tokens` rows, `logits` of them through the head, with `cached` tokens to attend."""
    num_bytes = WEIGHTS + (HEAD_WEIGHTS if logits else 0) + cached * CACHE_BYTES
    reading = num_bytes / (read * 1e9) if read else 0.0
    working = 2 * limbs * (tokens * WEIGHTS + logits * HEAD_WEIGHTS) / (products * 1e9) if products else 0.0
    return max(reading, working)


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
            limits = [statistics.mean(pair) for pair in zip(*probes[-2:])]
            shares.append(rates[-1] * seconds_per_token(name, self.limbs, limits, cache=False))
            with_cache.append(rates[-1] * seconds_per_token(name, self.limbs, limits, cache=True))
        print(name, *(f"{rate:.1f} ({share:.0%})" for rate, share in zip(rates, shares)), file=sys.stderr, flush=True)
        return {
            "median": statistics.median(rates),
            "best": max(rates),
            "worst": min(rates),
            "share": statistics.median(shares),
            "share_with_cache": statistics.median(with_cache),
            "read_gb_s": statistics.median(read for read, _ in probes),
            "int8_gops": statistics.median(products for _, products in probes),
        }


def seconds_per_token(name: str, limbs: int, limits: Sequence[float], *, cache: bool) -> float:
    """What the limits allow at best for a figure of this name."""
    kind, *numbers = name.replace("_at_", "_").split("_")
    tokens = int(numbers[0])
    context = int(numbers[1]) if len(numbers) > 1 else CONTEXT
    decodes = kind == "decode"
    logits, cached = tokens if decodes else 1, tokens * context if decodes and cache else 0
    return limit(tokens, limbs, read=limits[0], products=limits[1], logits=logits, cached=cached) / tokens


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
