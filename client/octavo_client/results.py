"""What comes back: pieces of an answer, and the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Usage:
    """Tokens counted by the server; completion_tokens has the end token in it."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Delta:
    """One message of a stream. `finish_reason` is set on the last: stop, length or cancelled."""

    text: str
    token_ids: tuple[int, ...]
    send_idx: int
    finish_reason: str | None = None
    usage: Usage | None = None
    logprobs: Sequence[Mapping[str, object]] | None = None


@dataclass
class Generation:
    """A finished answer. `seed` repeats it byte for byte on the same build and settings."""

    req_id: str
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    seed: int = 0
    usage: Usage | None = None
    logprobs: list[Mapping[str, object]] = field(default_factory=list)
    num_resumes: int = 0  # times the stream was lost and taken up again


def parse_usage(value: object) -> Usage | None:
    """The usage object of the wire."""
    if not isinstance(value, dict):
        return None
    details = value.get("prompt_tokens_details") or {}
    return Usage(value["prompt_tokens"], value["completion_tokens"], details.get("cached_tokens", 0))
