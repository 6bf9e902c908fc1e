"""From a checked request to what the engine is asked: prompt ids, sampling parameters, limits.

Pure functions of request, tokenizer and the model's limits; run by the intake thread. Where the dialects differ it is
here: native refuses what is over a limit, openai lowers it and takes its defaults from generation_config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from octavo.protocol.errors import ContextLengthExceeded, InvalidRequest
from octavo.protocol.messages import EngineInfo, SamplingParams
from octavo.protocol.native import Request
from octavo.settings import Settings
from octavo.text.tokenizer import Tokenizer

NATIVE_DEFAULTS = {"temperature": 0.95, "top_p": 0.7, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
OPENAI_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
_BOUNDS = {"temperature": (0.0, 100.0), "top_p": (0.0, 1.0), "top_k": (0, 1 << 24), "min_p": (0.0, 1.0),
           "repetition_penalty": (1e-6, 2.0)}  # for values of generation_config.json
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Limits:
    """What the model and the settings allow."""

    max_seq_len: int
    max_dec_len: int
    context_length: int
    cache_tokens: int  # what the whole cache holds
    vocab_size: int
    end_token_ids: tuple[int, ...]

    @classmethod
    def of(cls, settings: Settings, info: EngineInfo, tokenizer: Tokenizer) -> Limits:
        eos = {token_id for token_id in tokenizer.eos_ids if token_id < info.vocab_size}
        return cls(
            max_seq_len=min(settings.max_seq_len, info.context_length),
            max_dec_len=settings.max_dec_len,
            context_length=info.context_length,
            cache_tokens=info.num_blocks * info.block_size,
            vocab_size=info.vocab_size,
            end_token_ids=tuple(sorted(eos | set(info.end_token_ids))),
        )


@dataclass(frozen=True)
class Prompt:
    token_ids: list[int]
    text: str | None  # as it was tokenised; None if it came as ids
    plain: bool = False  # no template: the output goes on where the text ends


def make_prompt(request: Request, tokenizer: Tokenizer) -> Prompt:
    """Template and tokenise. Raises InvalidRequest."""
    if request.input_ids is not None:
        return Prompt(request.input_ids, None)
    template = tokenizer.chat_template
    if request.messages is None and (request.raw_text or template is None):
        text = request.text or ""
        if request.system is not None:
            text = f"{request.system}\n\n{text}"
        return Prompt(tokenizer.encode(text, add_special_tokens=True), text, plain=True)
    if template is None:
        raise InvalidRequest("the model has no chat template; use text or input_ids", field="messages")
    messages = [{"role": "system", "content": request.system}] if request.system is not None else []
    if request.messages is not None:
        messages += [{"role": message.role, "content": message.content} for message in request.messages]
    else:
        messages.append({"role": "user", "content": request.text or ""})
    text, token_ids = tokenizer.encode_chat(
        messages,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        variables=request.chat_template_kwargs,
    )
    return Prompt(token_ids, text)


def sampling_params(request: Request, num_input: int, limits: Limits,
                    model_defaults: Mapping[str, float]) -> SamplingParams:
    """Everything but the seed. Raises InvalidRequest and ContextLengthExceeded."""
    check_ids(request, limits)
    max_tokens, min_tokens = _lengths(request, num_input, limits)
    default = {**OPENAI_DEFAULTS, **_usable(model_defaults)} if request.dialect == "openai" else NATIVE_DEFAULTS
    ends = () if request.ignore_eos else tuple(sorted({*limits.end_token_ids, *request.eos_token_ids}))
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=_first(request.temperature, default["temperature"]),
        top_p=_first(request.topp, default["top_p"]),
        top_k=int(_first(request.top_k, default["top_k"])),
        min_p=_first(request.min_p, default["min_p"]),
        repetition_penalty=_first(request.penalty_score, default["repetition_penalty"]),
        frequency_penalty=request.frequency_score,
        presence_penalty=request.presence_score,
        logit_bias=request.logit_bias,
        end_token_ids=ends,
        logprobs=-1 if request.logprobs is None else request.logprobs,
        prompt_logprobs=-1 if request.prompt_logprobs is None else request.prompt_logprobs,
        speculation=request.speculation,
    )


def _first(given: float | None, default: float) -> float:
    return default if given is None else given


def _usable(model_defaults: Mapping[str, float]) -> dict[str, float]:
    """generation_config.json, as far as its values are allowed."""
    return {name: value for name, value in model_defaults.items()
            if name in _BOUNDS and _BOUNDS[name][0] <= value <= _BOUNDS[name][1]}


def check_ids(request: Request, limits: Limits) -> None:
    """Every id that a request brings must be in the vocabulary."""
    for name in ("input_ids", "eos_token_ids"):
        check_range(name, getattr(request, name) or (), limits.vocab_size)
    check_range("logit_bias", tuple(request.logit_bias), limits.vocab_size)
    for token_ids in request.generated_token_ids:
        check_range("generated_token_ids", token_ids, limits.vocab_size)


def check_range(name: str, token_ids: list[int] | tuple[int, ...], vocab_size: int) -> None:
    """Refuse ids that the vocabulary lacks. Raises InvalidRequest."""
    if token_ids and max(token_ids) >= vocab_size:
        message = f"{name}: token id {max(token_ids)} is not in the vocabulary of {vocab_size}"
        raise InvalidRequest(message, field=name)


def _lengths(request: Request, num_input: int, limits: Limits) -> tuple[int, int]:
    """Most and least output tokens."""
    if not num_input:
        raise InvalidRequest("the prompt has no tokens", field=_prompt_field(request))
    if num_input > limits.max_seq_len:
        message = f"input ({num_input} tokens) exceeds MAX_SEQ_LEN ({limits.max_seq_len})"
        raise ContextLengthExceeded(message, field=_prompt_field(request))
    room = min(limits.context_length, limits.cache_tokens) - num_input
    if room < 1:
        whole = "the model's context" if limits.context_length <= limits.cache_tokens else "the cache"
        size = min(limits.context_length, limits.cache_tokens)
        message = f"input ({num_input} tokens) leaves no room for output in {whole} ({size} tokens)"
        raise ContextLengthExceeded(message, field=_prompt_field(request))
    if request.dialect == "openai":
        most = min(request.max_dec_len or limits.max_dec_len, limits.max_dec_len, room)
        least = request.min_dec_len or 0  # the first token may be an end token
        if least > (request.max_dec_len or most) or least > limits.max_dec_len:
            raise InvalidRequest(f"min_tokens ({least}) exceeds max_tokens ({most})", field="min_dec_len")
        return most, min(least, most)
    return _native_lengths(request, num_input, limits, room)


def _native_lengths(request: Request, num_input: int, limits: Limits, room: int) -> tuple[int, int]:
    for name in ("max_dec_len", "min_dec_len"):
        value = getattr(request, name) or 0
        if value > limits.max_dec_len:
            raise InvalidRequest(f"{name} ({value}) exceeds MAX_DEC_LEN ({limits.max_dec_len})", field=name)
    most = request.max_dec_len or min(limits.max_dec_len, room)
    if most > limits.context_length - num_input:
        message = (f"input ({num_input} tokens) + max_dec_len ({most}) exceeds the model's context "
                   f"({limits.context_length})")
        raise ContextLengthExceeded(message, field="max_dec_len")
    if most > room:
        message = (f"input ({num_input} tokens) + max_dec_len ({most}) can never fit the cache "
                   f"({limits.cache_tokens} tokens)")
        raise ContextLengthExceeded(message, field="max_dec_len")
    least = request.min_dec_len or 1
    if least > most:
        raise InvalidRequest(f"min_dec_len ({least}) exceeds max_dec_len ({most})", field="min_dec_len")
    return most, least


def _prompt_field(request: Request) -> str:
    return "input_ids" if request.input_ids is not None else "text" if request.text is not None else "messages"


def mix(seed: int, index: int) -> int:
    """The seed of choice `index`: the seed itself for 0, else a splitmix64 step away."""
    if index == 0:
        return seed & _MASK
    value = (seed + index * 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
