"""A stand-in for the engine process that emits tokens at a fixed rate and writes down when it emitted which.

    python benchmarks/stand_in.py --rate 20000 --times FILE

The engine of the tests, which costs next to nothing. FILE gets, for each step, its time in seconds of CLOCK_MONOTONIC,
the number of sequences, and seed and position of each: float64 all.
"""

from __future__ import annotations

import argparse
import sys
from array import array
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from fakes.engine import FakeEngine  # noqa: E402
from octavo.settings import Settings  # noqa: E402


@dataclass
class TimedEngine(FakeEngine):
    """Notes every step; writes when nothing runs any more."""

    times: Path | None = None
    notes: array[float] = field(default_factory=lambda: array("d"))

    def _step(self, now: float) -> None:
        before = [*self._running.values(), *self._waiting]
        super()._step(now)
        self.notes.extend((now, len(before)))
        for sequence in before:
            self.notes.extend((sequence.submit.params.seed, sequence.position - 1))
        if not self._running and self.times is not None:
            with self.times.open("ab") as file:
                self.notes.tofile(file)
            self.notes = array("d")


def read_times(path: Path) -> dict[int, list[float]]:
    """When each token was emitted, by the seed of its request. Of several requests with one seed, the last one's."""
    notes = array("d")
    notes.frombytes(path.read_bytes())
    out: dict[int, list[float]] = {}
    at = 0
    while at < len(notes):
        now, count = notes[at], int(notes[at + 1])
        for place in range(at + 2, at + 2 + 2 * count, 2):
            seed, position = int(notes[place]), int(notes[place + 1])
            if position == 0:
                out[seed] = []
            out[seed].append(now)
        at += 2 + 2 * count
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=20_000.0, help="tokens per second over all sequences")
    parser.add_argument("--times", type=Path, required=True)
    options = parser.parse_args()
    settings = Settings.from_environ()
    engine = TimedEngine(
        settings.infer_queue_port,
        settings.run_dir,
        rate=options.rate,
        batch_size=settings.batch_size,
        vocab_size=32_000,
        context_length=16_384,
        num_blocks=1 << 16,
        times=options.times,
    )
    engine._prepare()
    engine.run()


if __name__ == "__main__":
    main()
