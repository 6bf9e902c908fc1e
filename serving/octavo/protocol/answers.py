"""What comes out of the tensor OUT: token messages, their parts, and how they are encoded.

A token message is a JSON list of one object; an error and the answer to an op are bare objects. The last message
of a choice carries `is_end` 1 and the totals. `TokenOut` is what the front end writes (fields that are UNSET are
left out), `TokenMessage` what holders of tokens read.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec
from msgspec import UNSET, UnsetType

from octavo.protocol.errors import OctavoError


class TopLogprob(msgspec.Struct, frozen=True):
    id: int
    token: str
    logprob: float


class Logprob(msgspec.Struct, frozen=True):
    """Of the sampled (or prompt) token at one position, with the most probable ones there."""

    id: int
    token: str
    logprob: float
    rank: int
    top: list[TopLogprob]


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Counts of tokens; completion counts what was sampled, the end token included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TokenOut(msgspec.Struct):
    """One message of one choice. `token` is the text of `token_ids`; both may be empty on the last one."""

    req_id: str
    token: str
    token_ids: list[int]
    send_idx: int
    is_end: int
    infer_seed: int
    index: int | UnsetType = UNSET  # choice; only with n > 1
    logprobs: list[Logprob] | UnsetType = UNSET
    prompt: str | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: list[Logprob | None] | UnsetType = UNSET
    finish_reason: str | UnsetType = UNSET
    stop_reason: str | int | UnsetType = UNSET
    tokens_all: str | UnsetType = UNSET
    tokens_all_num: int | UnsetType = UNSET
    tokens_all_ids: list[int] | UnsetType = UNSET
    usage: Usage | UnsetType = UNSET
    fingerprint: str | UnsetType = UNSET
    times: dict[str, float] | UnsetType = UNSET


class TokenMessage(msgspec.Struct):
    """A `TokenOut` as it is read: what was left out has its default."""

    req_id: str
    token: str
    token_ids: list[int]
    send_idx: int
    is_end: int
    infer_seed: int
    index: int = 0
    logprobs: list[Logprob] | None = None
    prompt: str | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[Logprob | None] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    tokens_all: str | None = None
    tokens_all_num: int | None = None
    tokens_all_ids: list[int] | None = None
    usage: Usage | None = None
    fingerprint: str | None = None
    times: dict[str, float] | None = None


class Tokens(msgspec.Struct):
    """A `TokenMessage` that says no more than its tokens, as the native dialect's line has it."""

    req_id: str
    token: str
    token_ids: list[int]
    send_idx: int
    is_end: int
    infer_seed: int
    error_msg: str = ""
    error_code: int = 0
    index: ClassVar[int] = 0
    logprobs: ClassVar[None] = None
    prompt: ClassVar[None] = None
    prompt_token_ids: ClassVar[None] = None
    prompt_logprobs: ClassVar[None] = None
    finish_reason: ClassVar[None] = None
    stop_reason: ClassVar[None] = None
    usage: ClassVar[None] = None
    fingerprint: ClassVar[None] = None


Message = TokenMessage | Tokens


def token_decoder() -> msgspec.json.Decoder[tuple[TokenMessage]]:
    """Decodes the JSON list of one token message; raises msgspec.ValidationError on anything else."""
    return msgspec.json.Decoder(tuple[TokenMessage])


def encode_error(error: OctavoError, req_id: str | None) -> bytes:
    """An error as OUT carries it."""
    return msgspec.json.encode(error.as_native(req_id))


def decode_answer(payload: bytes) -> dict[str, Any]:
    """The object in OUT, whatever it is: a token message, an error, or the answer to an op."""
    value = msgspec.json.decode(payload)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, dict):
        raise ValueError("OUT must hold one JSON object")
    return value
