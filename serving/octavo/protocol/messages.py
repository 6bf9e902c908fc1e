"""Messages between the front end and the engine: msgpack over ZeroMQ on loopback, typed by msgspec.

The front end is a DEALER that connects to the engine's ROUTER at 127.0.0.1:INFER_QUEUE_PORT; one message per frame.
The first
message of a connection is `Attach` with the link key from the run directory; the engine answers `Attached` or
`Refused` (while it
loads: `Loading` now and then, then one of the two) and ignores all else from a peer that has not attached. Sequences
are named
by integers that the front end chooses, unique within its epoch: no user text is ever an identifier here.
Times are seconds of CLOCK_MONOTONIC, which all processes of one host share.
"""

from __future__ import annotations

import msgspec

PROTOCOL_VERSION = 1


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How tokens of one sequence are drawn. Values are validated by the front end."""

    max_tokens: int  # output tokens, generated_token_ids included; never above the model's context
    min_tokens: int = 1  # no end token, no stop token before this many
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # 0: only the most probable token
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output
    frequency_penalty: float = 0.0  # over output
    presence_penalty: float = 0.0  # over output
    logit_bias: dict[int, float] = {}
    end_token_ids: tuple[int, ...] = ()  # the model's and the request's; empty with ignore_eos
    seed: int = 0  # 64 bits; random numbers come from (seed, number of output tokens so far) only
    logprobs: int = -1  # -1: none; k >= 0: of the sampled token and of the k most probable ones
    prompt_logprobs: int = -1  # likewise for every prompt token but the first
    speculation: bool | None = None  # guess tokens and verify several a step; None: as the engine's settings say


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities at one position, of the distribution before temperature and cuts."""

    token_id: int
    logprob: float
    rank: int  # 1 for the most probable token
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


# ---- front end to engine


class Attach(msgspec.Struct, frozen=True, tag="attach"):
    version: int
    key: str
    epoch: int  # a higher epoch fences an older front end
    fingerprint: str = ""  # of the model and settings that change bits; "" accepts any


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """Run one sequence. `generated_token_ids` were sampled before (resume): they are not sent again."""

    seq_id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    generated_token_ids: list[int] = []
    priority: int = 0  # lower runs first
    tenant: str = ""  # whose it is: those of one priority take turns by it


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """End sequences; each answers with finish reason `cancelled` unless it has ended already."""

    seq_ids: list[int]


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Answered by `Heartbeat` from the engine loop itself."""

    nonce: int


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """End the process once the current step is over."""


# ---- engine to front end


class EngineInfo(msgspec.Struct, frozen=True):
    """What the front end must know of the loaded model."""

    model_name: str
    architecture: str
    context_length: int  # most tokens of prompt + output
    vocab_size: int
    num_blocks: int
    block_size: int
    batch_size: int
    end_token_ids: tuple[int, ...]
    fingerprint: str
    weight_scheme: str  # for people: "w8a8", "w8a16", "bfloat16", …
    cache_scheme: str  # "int8 static", "int8 dynamic", "bfloat16", …
    kernels: str
    load_seconds: float = 0.0


class EngineStats(msgspec.Struct, frozen=True, omit_defaults=True):
    """Counters since the engine's start and gauges of now."""

    steps: int = 0
    num_running: int = 0
    num_waiting: int = 0  # passed over by the last plan
    num_free_blocks: int = 0
    num_cached_blocks: int = 0  # free for use but holding a reusable prefix; counted in neither of the other two
    num_used_blocks: int = 0
    num_preemptions: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    prompt_tokens: int = 0  # computed
    output_tokens: int = 0
    num_drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0  # draft tokens that came true
    last_progress: float = 0.0  # when the loop last turned
    step_deadline: float = 0.0  # 0: idle; else when the running step must have ended


class SequenceOutput(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """New tokens of one sequence. With `finish_reason` it is the last word about it.

    finish_reason: stop (an end token was sampled: it is the last of token_ids), length, cancelled, error.
    """

    seq_id: int
    token_ids: list[int]
    finish_reason: str | None = None
    logprobs: list[TokenLogprobs] | None = None  # one per token
    prompt_logprobs: list[TokenLogprobs] | None = None  # once, with the first token
    error: str | None = None
    scheduled_at: float = 0.0  # when it left the queue; set on the first output
    cached_tokens: int = 0  # prompt tokens found in the prefix cache; set on the first output


class Attached(msgspec.Struct, frozen=True, tag="attached"):
    version: int
    info: EngineInfo
    stats: EngineStats


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The sender is not, or no longer, attached. code: key, version, epoch (fenced by an equal or higher one),
    fingerprint, load (the model could not be loaded), detached (silent for too long: attach again with a higher epoch
    and submit anew).
    """

    reason: str  # for people
    code: str = ""


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    stage: str
    fraction: float  # 0 to 1


class StepOutputs(msgspec.Struct, frozen=True, tag="step"):
    """All outputs of one commit, or of requests that ended without a step."""

    outputs: list[SequenceOutput]
    stats: EngineStats


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """Sent in answer to Ping, and every 0.5 s by itself while idle."""

    stats: EngineStats
    nonce: int = 0


ToEngine = Attach | Submit | Abort | Ping | Shutdown
FromEngine = Attached | Refused | Loading | StepOutputs | Heartbeat


def encoder() -> msgspec.msgpack.Encoder:
    """An encoder for either direction; not shared between threads."""
    return msgspec.msgpack.Encoder()


def engine_decoder() -> msgspec.msgpack.Decoder[ToEngine]:
    """Decodes what the engine receives; raises msgspec.ValidationError on anything else."""
    return msgspec.msgpack.Decoder(ToEngine)


def frontend_decoder() -> msgspec.msgpack.Decoder[FromEngine]:
    """Decodes what the front end receives; raises msgspec.ValidationError on anything else."""
    return msgspec.msgpack.Decoder(FromEngine)
