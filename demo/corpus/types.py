"""The nouns of the corpus, and readers for its two file formats.

Text files hold blocks of "?" trained wordings, "!" held-out wordings and one "=" answer; tables are
tab-separated with one comment line. Knows nothing of templates, tokens or training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DATA_DIR = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Message:
    """One turn: role is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Fact:
    """One answer with every wording of its question; `held_out` wordings are never trained on."""

    topic: str
    questions: tuple[str, ...]
    held_out: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Conversation:
    """Messages that end with an assistant's answer."""

    topic: str
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Completion:
    """Raw text without a chat template: the continuation follows the prompt character by character."""

    topic: str
    prompt: str
    continuation: str


def read_table(name: str) -> list[tuple[str, ...]]:
    """Rows of a tab-separated data file, without comments. Raises ValueError if rows differ in width."""
    lines = (DATA_DIR / name).read_text(encoding="utf-8").splitlines()
    rows = [tuple(line.split("\t")) for line in lines if line and not line.startswith("#")]
    if len({len(row) for row in rows}) != 1:
        raise ValueError(f"{name}: rows of different width")
    return rows


def read_facts(name: str) -> list[Fact]:
    """Facts of a "?", "!", "=" file; the topic is the file's stem."""
    topic = Path(name).stem
    facts = []
    for block in read_blocks(name):
        questions = tuple(text for mark, text in block if mark == "?")
        held_out = tuple(text for mark, text in block if mark == "!")
        answers = [text for mark, text in block if mark == "="]
        if len(answers) != 1 or not questions:
            raise ValueError(f"{name}: a block needs one answer and a question: {block[:2]}")
        facts.append(Fact(topic=topic, questions=questions, held_out=held_out, answer=answers[0].removeprefix(" ")))
    return facts


def read_completions(name: str) -> list[Completion]:
    """Raw prompts (">") and their continuations ("=", kept to the last character)."""
    completions = []
    for block in read_blocks(name):
        marks = dict(block)
        completions.append(Completion(topic="completions", prompt=marks[">"], continuation=marks["="]))
    return completions


def read_blocks(name: str) -> list[list[tuple[str, str]]]:
    """Blocks between empty lines, as (mark, text); "=" text keeps what follows the mark and takes in more lines."""
    blocks: list[list[tuple[str, str]]] = [[]]
    for line in (DATA_DIR / name).read_text(encoding="utf-8").splitlines():
        block = blocks[-1]
        if not line:
            blocks.append([])
        elif block and block[-1][0] == "=":
            block[-1] = ("=", block[-1][1] + "\n" + line)
        elif line.startswith(("? ", "! ", "> ")):
            block.append((line[0], line[2:]))
        elif line.startswith("="):
            block.append(("=", line[1:]))
        elif not line.startswith("#"):
            raise ValueError(f"{name}: a line without a mark: {line!r}")
    return [block for block in blocks if block]
