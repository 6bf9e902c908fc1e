"""What the chaos did and what it cost: one row a case, printed at the end of the test run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

COLUMNS = ("case", "faults", "streams", "lost", "changed", "late", "probes", "lies", "leaks", "recovery")


@dataclass
class Row:
    """One case. `lost`: streams without their end; `changed`: other tokens or text than undisturbed; `late`: a gap
    between two messages beyond the case's bound; `lies`: requests that failed though readiness said 200."""

    case: str
    faults: int = 0
    streams: int = 0
    lost: int = 0
    changed: int = 0
    late: int = 0
    probes: int = 0
    lies: int = 0
    leaks: list[str] = field(default_factory=list)
    recovery: list[float] = field(default_factory=list)  # seconds, one a fault

    def cells(self) -> list[str]:
        seconds = " ".join(f"{value:.1f}" for value in self.recovery)
        shown = [self.case, self.faults, self.streams, self.lost, self.changed, self.late, self.probes, self.lies]
        return [*map(str, shown), str(len(self.leaks)), f"{seconds} s" if seconds else ""]

    def check(self) -> None:
        """AssertionError unless nothing was lost."""
        bad = {name: getattr(self, name) for name in ("lost", "changed", "late", "lies", "leaks")}
        assert not any(bad.values()), f"{self.case}: {bad}"


@dataclass
class Scoreboard:
    """All rows of a run."""

    rows: list[Row] = field(default_factory=list)

    def row(self, case: str) -> Row:
        self.rows.append(Row(case))
        return self.rows[-1]

    def text(self) -> str:
        """A table in Markdown."""
        return "\n".join(_lines([list(COLUMNS), ["---"] * len(COLUMNS), *(row.cells() for row in self.rows)]))


def _lines(table: list[list[str]]) -> Iterable[str]:
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        yield "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |"
