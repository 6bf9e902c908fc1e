"""What a run asks: prompts and lengths, random by a seed or from a file, and when each request is due.

Knows nothing of servers. Token prompts are ids drawn from a range that nearly every vocabulary has and that is mostly
plain text there.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_TEXT = """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power hour
game line end member law car city name team minute idea body back parent face level office door
"""
WORDS = tuple(_TEXT.split())


class WorkError(ValueError):
    """What is to be asked cannot be made; one sentence."""


@dataclass(frozen=True)
class Item:
    """One request: exactly one of text, messages and token_ids, and how many tokens to make."""

    output_len: int
    text: str | None = None
    messages: tuple[dict[str, str], ...] | None = None
    token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Shape:
    """Of random prompts. Lengths are even between `1 - ratio` and `1 + ratio` of what is given."""

    input_len: int
    output_len: int
    range_ratio: float = 0.0
    prefix_len: int = 0  # of the beginning that all prompts share; part of input_len
    words: bool = False
    token_range: tuple[int, int] = (256, 4000)


def random_items(count: int, shape: Shape, *, seed: int) -> list[Item]:
    """`count` requests; the same for the same seed and shape."""
    generator = random.Random(seed)
    prefix = draw(generator, shape.prefix_len, shape)
    items = []
    for _ in range(count):
        length = max(vary(generator, shape.input_len, shape.range_ratio), shape.prefix_len + 1)
        pieces = prefix + draw(generator, length - len(prefix), shape)
        output = vary(generator, shape.output_len, shape.range_ratio)
        if shape.words:
            items.append(Item(output, text=" ".join(WORDS[piece % len(WORDS)] for piece in pieces)))
        else:
            items.append(Item(output, token_ids=tuple(pieces)))
    return items


def draw(generator: random.Random, count: int, shape: Shape) -> list[int]:
    low, high = shape.token_range
    return [generator.randrange(low, high) for _ in range(count)]


def vary(generator: random.Random, length: int, ratio: float) -> int:
    """A length around `length`, at least 1."""
    return max(1, generator.randint(math.floor(length * (1 - ratio)), math.ceil(length * (1 + ratio))))


def arrivals(count: int, rate: float, *, seed: int) -> list[float]:
    """Seconds after the start at which requests are due: a Poisson process of `rate` a second; all at 0 if infinite."""
    if math.isinf(rate):
        return [0.0] * count
    generator, now, due = random.Random(seed), 0.0, []
    for _ in range(count):
        due.append(now)
        now += generator.expovariate(rate)
    return due


def read_dataset(path: Path, *, output_len: int) -> list[Item]:
    """One request a line of JSON: prompt or text, messages, input_ids, or conversations; and output_len or max_tokens.

    WorkError with the line's number. `output_len` is for lines that do not say.
    """
    items = list(_dataset_items(path, output_len))
    if not items:
        raise WorkError(f"{path}: no requests in it")
    return items


def _dataset_items(path: Path, output_len: int) -> Iterator[Item]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WorkError(f"{path}: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield item_of(json.loads(line), output_len=output_len)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise WorkError(f"{path}, line {number}: {error}") from None


def item_of(row: object, *, output_len: int) -> Item:
    """The request of one line. ValueError if it holds none."""
    if not isinstance(row, dict):
        raise ValueError(f"a line must be an object, not {type(row).__name__}")
    asked = int(row.get("output_len") or row.get("max_tokens") or output_len)
    if asked < 1:
        raise ValueError(f"output_len ({asked}) must be at least 1")
    for name in ("messages", "conversations"):
        if row.get(name):
            return Item(asked, messages=tuple(messages_of(row[name])))
    for name in ("input_ids", "prompt", "text"):
        value = row.get(name)
        if isinstance(value, str) and value:
            return Item(asked, text=value)
        if isinstance(value, list) and value and all(isinstance(one, int) for one in value):
            return Item(asked, token_ids=tuple(value))
    raise ValueError("a line needs prompt or text (a string or token ids), input_ids, messages or conversations")


def messages_of(turns: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Messages as they are; of a recorded conversation the turns up to the first answer."""
    if "role" in turns[0]:
        return [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in turns]
    asked = []
    for turn in turns:
        if turn["from"] in ("gpt", "assistant"):
            break
        asked.append({"role": "system" if turn["from"] == "system" else "user", "content": str(turn["value"])})
    if not asked:
        raise ValueError("the conversation begins with an answer")
    return asked
