"""How the text of an environment variable becomes a value: parsers, each with the sentence that says what it allows.

A parser raises ValueError or KeyError; settings.py turns that into the one line for the user.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def integer(low: int, high: int, extra: tuple[int, ...] = ()) -> tuple[Callable[[str], int], str]:
    """A parser for whole numbers in [low, high] or in `extra`, and its description."""

    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high and value not in extra:
            raise ValueError(text)
        return value

    also = "".join(f" or {value}" for value in extra)
    return parse, f"must be a whole number from {low} to {high}{also}"


def number(low: float, high: float) -> tuple[Callable[[str], float], str]:
    """A parser for finite numbers in (low, high], and its description."""

    def parse(text: str) -> float:
        value = float(text)
        if not low < value <= high:
            raise ValueError(text)
        return value

    return parse, f"must be a number above {low:g} and at most {high:g}"


def choice(*values: str) -> tuple[Callable[[str], str], str]:
    """A parser for one of the given words, in any case."""

    def parse(text: str) -> str:
        for value in values:
            if text.lower() == value.lower():
                return value
        raise ValueError(text)

    return parse, "must be one of " + ", ".join(values)


def flag() -> tuple[Callable[[str], bool], str]:
    """A parser for switches: 0 or 1 (true/false are understood)."""

    def parse(text: str) -> bool:
        return {"0": False, "1": True, "false": False, "true": True}[text.lower()]

    return parse, "must be 0 or 1"


def text() -> tuple[Callable[[str], str], str]:
    """Any printable text."""

    def parse(value: str) -> str:
        if not value.isprintable():
            raise ValueError(value)
        return value

    return parse, "must be printable text"


def words() -> tuple[Callable[[str], tuple[str, ...]], str]:
    """A comma-separated list without empty parts."""

    def parse(value: str) -> tuple[str, ...]:
        parts = tuple(part.strip() for part in value.split(","))
        if not all(parts):
            raise ValueError(value)
        return parts

    return parse, "must be comma-separated, without empty parts"


def path() -> tuple[Callable[[str], Path], str]:
    """A path of the file system."""
    return Path, "must be a path"
