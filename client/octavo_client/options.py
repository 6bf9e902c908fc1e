"""What a caller may ask of one generation, and how it looks on the wire (native dialect)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from octavo_client.history import ChatHistory

Message = Mapping[str, object]
Prompt = str | ChatHistory | Sequence[Message] | Sequence[int]


@dataclass(frozen=True)
class Options:
    """Sampling and limits; None leaves the server's default. Names are those of the native protocol."""

    max_dec_len: int | None = None
    min_dec_len: int | None = None
    temperature: float | None = None  # 0: greedy
    topp: float | None = None
    top_k: int | None = None
    min_p: float | None = None  # gRPC and HTTP
    frequency_score: float | None = None
    presence_score: float | None = None
    penalty_score: float | None = None
    infer_seed: int | None = None
    stop: Sequence[str] | None = None
    eos_token_ids: Sequence[int] | None = None
    ignore_eos: bool | None = None
    logit_bias: Mapping[str, float] | None = None
    logprobs: int | None = None
    system: str | None = None
    priority: int | None = None
    timeout: float = 300.0  # seconds in all, waiting and resuming included

    def payload(self) -> dict[str, object]:
        """The fields that were set."""
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        out = {name: value for name, value in pairs if value is not None}
        for name in ("stop", "eos_token_ids"):
            if name in out:
                out[name] = list(out[name])
        return out


def prompt_payload(prompt: Prompt) -> dict[str, object]:
    """text, messages or input_ids, by the prompt's type. Raises TypeError."""
    if isinstance(prompt, str):
        return {"text": prompt}
    if isinstance(prompt, ChatHistory):
        return {"messages": prompt.messages}
    items = list(prompt)
    if items and all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        return {"input_ids": items}
    if items and all(isinstance(item, Mapping) for item in items):
        return {"messages": [dict(item) for item in items if isinstance(item, Mapping)]}
    raise TypeError("prompt must be text, a ChatHistory, a list of messages or a list of token ids, and not empty")
