"""The OpenAI dialect, chat and text: one field table for validation, for the request to the model and for the
schemas.

Runs in a gateway worker; pure. It turns a body into native requests (one per prompt) and says clearly what is not
served. Knows nothing of HTTP, of the tokenizer or of the model: token counts and templates are the front end's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from octavo.protocol import fields as kinds
from octavo.protocol.errors import InvalidRequest
from octavo.protocol.fields import Kind, type_name
from octavo.protocol.native import MAX_TOKENS
from octavo.protocol.openai_messages import MESSAGES_SCHEMA, chat_messages

CHAT, TEXT = "chat", "text"
MAX_PROMPTS = 1024
MAX_LOGPROBS = 20
DEFAULT_TEXT_TOKENS = 16


@dataclass(frozen=True)
class Field:
    """One field of a body. `native` is its name in the request to the model; None: the gateway's own business."""

    name: str
    kind: Kind
    doc: str
    native: str | None = None
    routes: tuple[str, ...] = (CHAT, TEXT)


def _switches(*names: str) -> Kind:
    """An object of the named booleans; other keys are ignored."""

    def parse(name: str, value: object) -> dict[str, bool]:
        if not isinstance(value, dict):
            raise kinds.wrong_type(name, "an object", value)
        for key in names:
            if value.get(key) is not None and not isinstance(value[key], bool):
                raise kinds.wrong_type(f"{name}.{key}", "true or false", value[key])
        return {key: bool(value.get(key)) for key in names}

    return Kind(parse, {"type": "object", "properties": {name: {"type": "boolean"} for name in names}}, "object")


_FLAG = kinds.flag()
_COUNT = kinds.whole(0, 1 << 53)
_IDS = kinds.token_ids(MAX_TOKENS, least=1)
_TOP = kinds.whole(0, MAX_LOGPROBS)
_OPTIONS = _switches("include_usage", "continuous_usage_stats")
_STOP = kinds.list_of(kinds.string(1, 256), 16, or_one=True)
_SEED = kinds.whole(-(1 << 63), (1 << 64) - 1)

FIELDS: tuple[Field, ...] = (
    Field("model", kinds.string(0, 512), "name of the model; any name is served unless STRICT_MODEL is set"),
    Field("stream", _FLAG, "server-sent events while tokens are made"),
    Field("stream_options", _OPTIONS, "usage in a last chunk, or in every one"),
    Field("max_tokens", _COUNT, "upper bound of output tokens; lowered to what the server allows", "max_dec_len"),
    Field("max_completion_tokens", _COUNT, "same as max_tokens", "max_dec_len"),
    Field("min_tokens", _COUNT, "no end before this many tokens", "min_dec_len"),
    Field("temperature", kinds.number(0, 100), "0: greedy", "temperature"),
    Field("top_p", kinds.number(0, 1), "nucleus sampling", "topp"),
    Field("top_k", kinds.whole(-1, MAX_TOKENS), "0 or -1: off", "top_k"),
    Field("min_p", kinds.number(0, 1), "least probability relative to the most probable token", "min_p"),
    Field("frequency_penalty", kinds.number(-2, 2), "per occurrence in the output", "frequency_score"),
    Field("presence_penalty", kinds.number(-2, 2), "once per token in the output", "presence_score"),
    Field("repetition_penalty", kinds.number(0, 2, above_low=True), "factor over prompt and output", "penalty_score"),
    Field("logit_bias", kinds.bias_map(1024, 100), "token id to a number that is added to its logit", "logit_bias"),
    Field("seed", _SEED, "same seed, same answer", "infer_seed"),
    Field("stop", _STOP, "strings that end the output; not part of it", "stop"),
    Field("stop_token_ids", kinds.token_ids(64), "token ids that end the output", "eos_token_ids"),
    Field("ignore_eos", _FLAG, "go on past end tokens", "ignore_eos"),
    Field("n", kinds.whole(1, 128), "choices per prompt", "n"),
    Field("priority", kinds.whole(-100, 100), "lower runs first", "priority"),
    Field("speculation", _FLAG, "guess tokens and verify several a step; the output is the same", "speculation"),
    Field("logprobs", _FLAG, "log probabilities of the output tokens", routes=(CHAT,)),
    Field("top_logprobs", _TOP, "most probable tokens per position", routes=(CHAT,)),
    Field("logprobs", _TOP, "log probabilities of the output tokens and of as many others", routes=(TEXT,)),
    Field("echo", _FLAG, "prompt first, then the output; with logprobs for both", routes=(TEXT,)),
    Field("add_generation_prompt", _FLAG, "open the assistant's turn", "add_generation_prompt", (CHAT,)),
    Field("continue_final_message", _FLAG, "go on with the last message", "continue_final_message", (CHAT,)),
    Field("chat_template_kwargs", kinds.scalar_map(16), "for the chat template", "chat_template_kwargs", (CHAT,)),
)

# Meaningful, not served: refused by name unless the value is one that asks for nothing.
NOT_SERVED: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "logits_processors": ([],),
    "chat_template": (),
    "documents": ([],),
    "prompt_embeds": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
}


@dataclass(frozen=True)
class OpenAIRequest:
    """A checked body. `bodies` are native requests, one per prompt, without req_id and seed."""

    route: str  # CHAT or TEXT
    model: str | None
    stream: bool
    include_usage: bool
    continuous_usage: bool
    n: int
    echo: bool
    logprobs: int | None  # top tokens per position, 0: only the sampled one's; None: not asked
    only_prompt: bool  # max_tokens 0: one token is made, none is shown
    bodies: list[dict[str, object]]


def parse(body: Mapping[str, object], route: str) -> OpenAIRequest:
    """Check a body for `route` (CHAT or TEXT). Raises InvalidRequest that names the field."""
    given = {name: value for name, value in body.items() if value is not None}
    _check_not_served(given)
    values = _checked(given, route)
    sampling = {
        field.native: values[field.name]
        for field in FIELDS
        if field.native and field.name in values and route in field.routes
    }
    common: dict[str, object] = {"dialect": "openai", **sampling}
    only_prompt = _limits(common, values, route)
    logprobs = _logprobs(values, route)
    if logprobs is not None:
        common["logprobs"] = logprobs
    options = values.get("stream_options")
    options = options if isinstance(options, dict) else {}
    if options.get("continuous_usage_stats") or values.get("echo"):
        common["return_prompt"] = True
    if values.get("echo") and logprobs is not None:
        common["prompt_logprobs"] = logprobs
    inputs: list[dict[str, object]]
    inputs = [{"messages": chat_messages(given.get("messages"))}] if route == CHAT else _prompts(given.get("prompt"))
    model, n = values.get("model"), values.get("n", 1)
    if isinstance(n, int) and n * len(inputs) > MAX_PROMPTS:
        raise _refuse("n", f"times the number of prompts is {n * len(inputs)}; at most {MAX_PROMPTS} are allowed")
    return OpenAIRequest(
        route=route,
        model=model if isinstance(model, str) and model else None,
        stream=bool(values.get("stream")),
        include_usage=bool(options.get("include_usage")),
        continuous_usage=bool(options.get("continuous_usage_stats")),
        n=n if isinstance(n, int) else 1,
        echo=bool(values.get("echo")),
        logprobs=logprobs,
        only_prompt=only_prompt,
        bodies=[{**one, **common} for one in inputs],
    )


def _refuse(name: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"{name} {message}", field=name)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_not_served(given: Mapping[str, object]) -> None:
    for name, harmless in NOT_SERVED.items():
        if name in given and given[name] not in harmless:
            raise InvalidRequest(f"{name} is not served", field=name, code="unsupported_parameter")
    n = given.get("n", 1)
    if given.get("best_of", n) != n:
        raise InvalidRequest("best_of other than n is not served", field="best_of", code="unsupported_parameter")


def _checked(given: Mapping[str, object], route: str) -> dict[str, object]:
    if route == CHAT and given.get("echo"):
        raise InvalidRequest("echo is not served for chat", field="echo", code="unsupported_parameter")
    return {
        field.name: field.kind.parse(field.name, given[field.name])
        for field in FIELDS
        if route in field.routes and field.name in given
    }


def _limits(common: dict[str, object], values: Mapping[str, object], route: str) -> bool:
    """Settle output lengths in `common`; True if no output is wanted at all."""
    asked = [values[name] for name in ("max_completion_tokens", "max_tokens") if name in values]
    if len(set(asked)) > 1:
        raise _refuse("max_completion_tokens", "and max_tokens contradict each other")
    if asked and asked[0] == 0 and route == CHAT:
        name = "max_completion_tokens" if "max_completion_tokens" in values else "max_tokens"
        raise _refuse(name, "must be at least 1")
    if route == TEXT and not asked:
        common["max_dec_len"] = DEFAULT_TEXT_TOKENS
    if common.get("min_dec_len") == 0:
        del common["min_dec_len"]  # what is not given is no lower bound here
    for name in ("max_dec_len", "min_dec_len"):
        value = common.get(name)
        if isinstance(value, int):
            common[name] = min(max(value, 1), MAX_TOKENS)
    return bool(asked) and asked[0] == 0


def _logprobs(values: Mapping[str, object], route: str) -> int | None:
    top = values.get("top_logprobs")
    if route == CHAT and values.get("logprobs"):
        return top if isinstance(top, int) else 0
    if route == CHAT:
        if top:
            raise _refuse("top_logprobs", "needs logprobs to be true")
        return None
    logprobs = values.get("logprobs")
    return logprobs if isinstance(logprobs, int) else None


def _prompts(prompt: object) -> list[dict[str, object]]:
    """Native inputs for a text, a list of texts, token ids or a list of them."""
    if prompt is None:
        raise InvalidRequest("prompt is required", field="prompt")
    if isinstance(prompt, str):
        return [{"text": prompt, "raw_text": True}]
    if not isinstance(prompt, list):
        raise _refuse("prompt", f"must be text, token ids or a list of either, not {type_name(prompt)}")
    if not prompt:
        raise _refuse("prompt", "must not be empty")
    if all(_is_integer(entry) for entry in prompt):
        return [{"input_ids": _IDS.parse("prompt", prompt)}]
    if len(prompt) > MAX_PROMPTS:
        raise _refuse("prompt", f"has {len(prompt)} entries; at most {MAX_PROMPTS} are allowed")
    if all(isinstance(entry, str) for entry in prompt):
        return [{"text": entry, "raw_text": True} for entry in prompt]
    if not all(isinstance(entry, list) for entry in prompt):
        raise _refuse("prompt", "must hold only strings, only token ids or only lists of token ids")
    return [{"input_ids": _IDS.parse(f"prompt[{at}]", entry)} for at, entry in enumerate(prompt)]


# ---- names and schemas

_BACK = {field.native: field.name for field in reversed(FIELDS) if field.native}
_BACK |= {"text": "prompt", "input_ids": "prompt"}

_PROMPT_SCHEMA: dict[str, object] = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ]
}


def openai_name(native: str | None) -> str | None:
    """The name that a field of the request to the model has in an OpenAI body."""
    return _BACK.get(native, native) if native is not None else None


def request_schema(route: str) -> dict[str, object]:
    """JSON schema of a request body for `route`. Unknown fields are ignored, null counts as absent."""
    properties = {
        field.name: {**field.kind.schema, "description": field.doc} for field in FIELDS if route in field.routes
    }
    required = {"messages": MESSAGES_SCHEMA} if route == CHAT else {"prompt": _PROMPT_SCHEMA}
    return {"type": "object", "properties": {**required, **properties}, "required": list(required)}
