"""Keeps what users write from becoming control tokens of the chat template.

A template puts messages between control tokens such as <|im_end|>; a message that spells one out would end its turn and
begin another in somebody else's name. So such words are marked before the template is filled in, the marks are taken
out of the prompt, and where they were the prompt gets the tokens of the plain text. Pure functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MARKS = "".join(map(chr, range(0xFDD0, 0xFDF0)))  # noncharacters of Unicode: nobody's text needs them


def pattern_of(words: Iterable[str]) -> re.Pattern[str] | None:
    """Finds any of the control words, the longest first; None if there are none."""
    found = sorted({word for word in words if len(word) > 1}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, found))) if found else None


def choose_mark(texts: Sequence[str]) -> str | None:
    """A mark that occurs in none of the texts."""
    return next((mark for mark in MARKS if not any(mark in text for text in texts)), None)


def marked(text: str, control: re.Pattern[str], mark: str) -> str:
    """Every control word of the text with a mark behind its first character."""
    return control.sub(lambda found: found[0][0] + mark + found[0][1:], text)


def mark_all(
    messages: Sequence[Mapping[str, str]], variables: Mapping[str, Any], control: re.Pattern[str]
) -> tuple[list[dict[str, str]], dict[str, Any], str]:
    """Messages and variables with their control words marked, and the mark; "" if there is nothing to mark.

    Raises ValueError for a text that has every mark in it.
    """
    strings = {name: value for name, value in variables.items() if isinstance(value, str)}
    texts = [message["content"] for message in messages] + list(strings.values())
    if not any(control.search(text) for text in texts):
        return [dict(message) for message in messages], dict(variables), ""
    mark = choose_mark(texts)
    if mark is None:
        raise ValueError("the messages use every noncharacter of Unicode beside control tokens of the model")
    shown = [{**message, "content": marked(message["content"], control, mark)} for message in messages]
    return shown, {**variables, **{name: marked(text, control, mark) for name, text in strings.items()}}, mark


def unmarked(text: str, mark: str) -> tuple[str, list[int]]:
    """The text without its marks, and the positions in it of the words that were marked."""
    parts = text.split(mark)
    starts, length = [], 0
    for part in parts[:-1]:
        length += len(part)
        starts.append(length - 1)
    return "".join(parts), starts


def plain_ids(
    token_ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    starts: Sequence[int],
    plain: Mapping[int, Sequence[int]],
) -> list[int]:
    """Token ids with those that a user's word became at `starts` put in plain. `offsets`: where each token begins and
    ends in the text; `plain`: the ids of each control word as plain text.
    """
    out: list[int] = []
    at = 0
    for token_id, (begin, end) in zip(token_ids, offsets):
        while at < len(starts) and starts[at] < begin:
            at += 1
        words = token_id in plain and at < len(starts) and begin <= starts[at] < end
        out += plain[token_id] if words else (token_id,)
    return out
