"""What the front end knows of a request and of its sequences. Data only; who may touch what is said at each field.

`lock` is the registry's lock, `intake`, `link` and `delivery` are threads. A request is built by the intake thread and
handed on through the registry; what is not marked does not change after that.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from octavo.frontend.sink import Sink
from octavo.protocol.errors import OctavoError, Unavailable
from octavo.protocol.messages import SamplingParams, SequenceOutput, TokenLogprobs
from octavo.protocol.native import Request
from octavo.text.output import OutputText
from octavo.text.tokenizer import Tokenizer


@dataclass(slots=True, eq=False)
class Finish:
    """How a sequence ended: stop, length or cancelled; `stop_reason` is the stop string or the end token."""

    reason: str
    stop_reason: str | int | None = None


@dataclass(slots=True, eq=False)
class SequenceState:
    """One choice of a request."""

    index: int
    params: SamplingParams
    output: OutputText  # delivery
    received: list[int]  # link: all tokens so far, as a new engine must be told them
    send_idx: int = 0  # delivery: of the next message
    seq_id: int = 0  # lock: its name in the engine, another one after each replay
    started: bool = False  # lock: the engine has given tokens
    ended: bool = False  # lock: the engine has said its last word
    in_engine: bool = False  # lock: submitted to the engine that is there now
    num_at_submit: int = 0  # lock: tokens that it was submitted with
    num_deaths: int = 0  # lock: of engines, while it was running
    finish: Finish | None = None  # delivery (intake, if the request came with all its tokens)
    closed: bool = False  # delivery: its last message was built
    end_token: int | None = None  # delivery: sampled, not in the output
    logprobs: list[bytes] = field(default_factory=list)  # delivery: of the tokens not sent yet, as msgpack
    prompt_logprobs: list[TokenLogprobs] | None = None  # delivery: until it is sent
    cached_tokens: int = 0  # delivery
    scheduled_at: float = 0.0  # delivery
    first_sent_at: float = 0.0  # delivery
    last_sent_at: float = 0.0  # delivery


@dataclass(slots=True, eq=False)
class RequestState:
    """An accepted request."""

    req_id: str
    request: Request
    sink: Sink
    arrival: float
    deadline: float
    prompt_ids: list[int]
    prompt_text: str | None  # only with return_prompt
    seed: int
    fingerprint: str
    sequences: list[SequenceState]
    pending: list[tuple[SequenceState, SequenceOutput]] = field(default_factory=list)  # lock: not delivered yet
    queued: bool = False  # lock: the delivery thread will look at it
    verdict: OctavoError | None = None  # lock: ends the request from outside
    done: bool = False  # lock: its req_id is free again
    accepted: bool = False  # delivery: a message was sent
    next_check: float = 0.0  # sweeper: when to ask the sink next

    @property
    def generated(self) -> bool:
        """No more tokens come."""
        return all(sequence.ended or sequence.finish is not None for sequence in self.sequences)

    @property
    def was_cancelled(self) -> bool:
        return any(sequence.finish is None or sequence.finish.reason == "cancelled" for sequence in self.sequences)

    @property
    def resumed(self) -> bool:
        return self.request.attempt > 0 or bool(self.request.generated_token_ids)


class TokenizerSlot:
    """Where the tokenizer will be once it is read. Set once by the intake thread."""

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        self.tokenizer = tokenizer
        self.failure: str | None = None

    def get(self) -> Tokenizer:
        if self.tokenizer is None:
            raise Unavailable(self.failure or "the tokenizer is loading")
        return self.tokenizer
