"""The code blocks of the documentation, and how they are run.

A fence's first word is its language. bash and python blocks run, but for those with norun="the reason"; one with
error=CODE must be answered with that error. A json block right after a bash block is its answer: its shape must be
what the server gives.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from server.conftest import REPOSITORY

PAGES = (
    "README.md",
    *(f"docs/{name}.md" for name in ("deploy-model", "api", "operations", "migration", "tracing", "page")),
)
CHINESE = {"README.md": "README_zh.md", **{page: page.replace("docs/", "docs/zh/") for page in PAGES[1:]}}
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block; `answer` is the json block that follows it directly."""

    page: str
    line: int
    language: str
    info: str
    code: str
    answer: str | None = None

    @property
    def norun(self) -> str | None:
        found = re.search(r'norun="([^"]*)"', self.info)
        return found[1] if found else None

    @property
    def error(self) -> int | None:
        found = re.search(r"error=(\d+)", self.info)
        return int(found[1]) if found else None

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str, root: Path = REPOSITORY) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = (root / page).read_text(encoding="utf-8")
    found = list(FENCE.finditer(text))
    made = []
    for at, one in enumerate(found):
        follower = found[at + 1] if at + 1 < len(found) else None
        follows = follower is not None and not text[one.end() : follower.start()].strip()
        answer = follower[3] if follower and follows and follower[1] == "json" and not follower[2] else None
        line = text.count("\n", 0, one.start()) + 1
        made.append(Block(page, line, one[1], one[2].strip(), one[3], answer))
    return made


def to_run(language: str) -> list[Block]:
    """The blocks of a language that are run."""
    return [one for page in PAGES for one in blocks(page) if one.language == language and one.norun is None]


def shape(value: object) -> object:
    """Names and kinds of a JSON value, without what differs from answer to answer."""
    if isinstance(value, dict):
        return {name: shape(item) for name, item in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__
