"""The wire of the three kinds of servers: request bodies and what a line of the answer says.

    completions   /v1/completions, server-sent events
    chat          /v1/chat/completions, server-sent events
    native        /v1/chat/completions, one JSON object a line

A reader takes the lines of one answer and fills in its `Outcome`; it decodes each into a typed struct, which is cheap.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from octavo.cli.bench.figures import Outcome
from octavo.cli.bench.work import Item, WorkError

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions", "native": "/v1/chat/completions"}


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class _Message(msgspec.Struct):
    token_ids: list[int] = []
    is_end: int = 0
    usage: _Usage | None = None
    error_msg: str = ""
    error_code: int = 0


_CHUNK = msgspec.json.Decoder(_Chunk)
_MESSAGE = msgspec.json.Decoder(_Message)


@dataclass
class Dialect:
    """How to ask one server. `ignore_eos` and `usage` are taken back when the server refuses the fields."""

    api: str
    model: str | None = None
    temperature: float | None = None
    seed: int | None = None
    ignore_eos: bool = True
    usage: bool = True
    extra: Mapping[str, object] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return PATHS[self.api]

    def body(self, item: Item) -> bytes:
        """WorkError if this dialect cannot say it."""
        fields: dict[str, object] = self._prompt(item)
        native = self.api == "native"
        if self.model is not None:
            fields["model"] = self.model
        fields["max_dec_len" if native else "max_tokens"] = item.output_len
        fields["stream"] = True
        if self.temperature is not None:
            fields["temperature"] = self.temperature
        if self.seed is not None:
            fields["infer_seed" if native else "seed"] = self.seed
        if self.ignore_eos:
            fields["ignore_eos"] = True
        if self.usage and not native:
            fields["stream_options"] = {"include_usage": True}
        return json.dumps({**fields, **self.extra}).encode()

    def _prompt(self, item: Item) -> dict[str, object]:
        if self.api == "completions":
            if item.messages is not None:
                raise WorkError("/v1/completions takes no messages: use --api chat")
            return {"prompt": item.text if item.text is not None else list(item.token_ids or ())}
        if self.api == "chat":
            if item.token_ids is not None:
                raise WorkError("/v1/chat/completions takes no token ids: use --api completions or --prompts words")
            return {"messages": list(item.messages or ({"role": "user", "content": item.text or ""},))}
        if item.messages is not None:
            return {"messages": list(item.messages)}
        return {"text": item.text} if item.text is not None else {"input_ids": list(item.token_ids or ())}

    def reader(self, outcome: Outcome) -> NativeReader | EventReader:
        return NativeReader(outcome) if self.api == "native" else EventReader(outcome)


class NativeReader:
    """JSON lines; the token ids say how many tokens came."""

    def __init__(self, outcome: Outcome) -> None:
        self.complete = False
        self._outcome = outcome
        outcome.counted = "ids"

    def line(self, line: bytes, now: float) -> None:
        outcome = self._outcome
        try:
            message = _MESSAGE.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            outcome.fail("malformed line", line[:200].decode("utf-8", "replace"), now=now)
            return
        if message.error_msg or message.error_code:
            outcome.fail(f"error {message.error_code} in the stream", message.error_msg, now=now)
        if message.token_ids:
            outcome.arrivals.append(now)
            outcome.output_tokens += len(message.token_ids)
        if message.is_end:
            self.complete = True
            _take_usage(outcome, message.usage)


class EventReader:
    """Server-sent events of the OpenAI API; without `usage`, chunks count as tokens."""

    def __init__(self, outcome: Outcome) -> None:
        self.complete = False
        self._outcome = outcome

    def line(self, line: bytes, now: float) -> None:
        if not line.startswith(b"data:"):
            return
        data = line[5:].strip()
        outcome = self._outcome
        if data == b"[DONE]":
            self.complete = True
            return
        try:
            chunk = _CHUNK.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            outcome.fail("malformed line", line[:200].decode("utf-8", "replace"), now=now)
            return
        if chunk.error is not None:
            outcome.fail("error in the stream", what_it_said(json.dumps({"error": chunk.error}).encode()), now=now)
            return
        for choice in chunk.choices:
            if has_token(choice):
                outcome.arrivals.append(now)
                outcome.output_tokens += outcome.counted == "chunks"
            self.complete = self.complete or choice.finish_reason is not None
        _take_usage(outcome, chunk.usage)


def has_token(choice: _Choice) -> bool:
    """False for the chunk that only opens the answer and the one that only ends it."""
    delta = choice.delta
    if delta is None:
        return bool(choice.text) or choice.finish_reason is None
    if delta.content or delta.reasoning_content or delta.reasoning:
        return True
    return delta.role is None and choice.finish_reason is None


def _take_usage(outcome: Outcome, usage: _Usage | None) -> None:
    """The server's own count is the one that holds."""
    if usage is None:
        return
    if usage.completion_tokens is not None:
        outcome.output_tokens, outcome.counted = usage.completion_tokens, "usage"
    if usage.prompt_tokens is not None:
        outcome.input_tokens = usage.prompt_tokens


def what_it_said(body: bytes) -> str:
    """The message in an error's body, in whichever shape, or the beginning of the body."""
    try:
        value = json.loads(body)
    except ValueError:
        return body[:300].decode("utf-8", "replace").strip()
    if isinstance(value, dict):
        for name in ("error", "error_msg", "message", "detail"):
            found = value.get(name)
            if isinstance(found, dict):
                found = found.get("message")
            if found:
                return str(found)[:300]
    return json.dumps(value)[:300]
