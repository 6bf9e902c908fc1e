"""What the doctor says: one line a finding, and whether it would stop a start."""

from __future__ import annotations

from dataclasses import dataclass

OK, NOTE, WRONG = "ok", "note", "WRONG"


@dataclass(frozen=True)
class Finding:
    """One line. `stops` is the exit code of a start that meets it; 0: a start goes on."""

    mark: str  # OK, NOTE or WRONG
    text: str
    stops: int = 0

    @property
    def line(self) -> str:
        return f"{self.mark:6} {self.text}"


def ok(text: str) -> Finding:
    return Finding(OK, text)


def note(text: str) -> Finding:
    """Worth knowing, not wrong."""
    return Finding(NOTE, text)


def wrong(text: str, *, stops: int = 0) -> Finding:
    return Finding(WRONG, text, stops)
