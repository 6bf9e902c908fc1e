"""The native request: one table of fields, from which come parsing, the JSON schema and the documentation's table.

Used by the gateway, the front end and the client. Unknown fields are ignored and null counts as absent; everything
else is checked strictly. What depends on the model or on settings (context, MAX_DEC_LEN, vocabulary) is for the
front end to check.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from octavo.protocol import fields as kinds
from octavo.protocol.errors import InvalidRequest
from octavo.protocol.fields import Kind

MAX_MESSAGES = 4096
MAX_CHOICES = 128
MAX_TOKENS = 1 << 24
ROLES = ("system", "user", "assistant", "developer")
LOW_SEED, HIGH_SEED = -(1 << 63), (1 << 64) - 1


class Message(msgspec.Struct, frozen=True):
    """One turn of a conversation; content parts are joined."""

    role: str  # system, user, assistant
    content: str


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A request that passed the table. None: not given (its default depends on dialect, model or settings)."""

    req_id: str | None = None
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    input_ids: list[int] | None = None
    system: str | None = None
    max_dec_len: int | None = None
    min_dec_len: int | None = None
    topp: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_score: float = 0.0
    presence_score: float = 0.0
    penalty_score: float | None = None
    logit_bias: dict[int, float] = {}
    infer_seed: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    n: int = 1
    stream: bool = False
    timeout: float = 300.0
    return_usage: bool = False
    return_all_tokens: bool = False
    benchmark: bool = False
    response_type: str | None = None
    model: str | None = None
    dialect: str = "native"
    raw_text: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_prompt: bool = False
    priority: int = 0
    speculation: bool | None = None
    tenant: str | None = None
    generated_token_ids: tuple[list[int], ...] = ()
    send_idx: tuple[int, ...] = ()
    fingerprint: str | None = None
    attempt: int = 0
    resume_inside: bool = False
    owner: str | None = None
    key: str | None = None


@dataclass(frozen=True)
class Field:
    """A row of the table."""

    name: str
    kind: Kind
    default: str  # for people
    doc: str
    aliases: tuple[str, ...] = ()
    internal: bool = False  # for gRPC alone: the gateway and tools


def _messages() -> Kind:
    def parse(name: str, value: object) -> tuple[Message, ...]:
        kinds.check_list(name, value, MAX_MESSAGES, 1)
        assert isinstance(value, (list, tuple))
        return tuple(_message(f"{name}[{index}]", entry) for index, entry in enumerate(value))

    properties = {"type": {"const": "text"}, "text": {"type": "string"}}
    part = {"type": "object", "properties": properties, "required": ["type", "text"]}
    content = {"anyOf": [{"type": "string"}, {"type": "array", "items": part, "maxItems": MAX_MESSAGES}]}
    item = {
        "type": "object",
        "properties": {"role": {"type": "string", "enum": list(ROLES)}, "content": content},
        "required": ["role", "content"],
    }
    schema = {"type": "array", "items": item, "minItems": 1, "maxItems": MAX_MESSAGES}
    return Kind(parse, schema, "list of {role, content}", f"1 to {MAX_MESSAGES}")


def _message(name: str, value: object) -> Message:
    if not isinstance(value, dict):
        raise kinds.wrong_type(name, "an object with role and content", value)
    role = value.get("role")
    if not isinstance(role, str):
        raise kinds.wrong_type(f"{name}.role", "a string", role)
    if role in ("tool", "function") or value.get("tool_calls") or value.get("function_call"):
        raise InvalidRequest(f"{name}: tool calls are not served", field="messages")
    if role not in ROLES:
        raise InvalidRequest(f"{name}.role ({role[:40]!r}) must be one of {', '.join(ROLES)}", field="messages")
    return Message("system" if role == "developer" else role, _content(f"{name}.content", value.get("content")))


def _content(name: str, value: object) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple)):
        raise kinds.wrong_type(name, "a string or a list of text parts", value)
    kinds.check_list(name, value, MAX_MESSAGES)
    return "".join(_part(f"{name}[{index}]", part) for index, part in enumerate(value))


def _part(name: str, part: object) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise kinds.wrong_type(name, "an object", part)
    kind = part.get("type", "text")
    if kind != "text":
        raise InvalidRequest(f"{name}: parts of type {str(kind)[:40]!r} are not served, only text", field="messages")
    text = part.get("text")
    if not isinstance(text, str):
        raise kinds.wrong_type(f"{name}.text", "a string", text)
    return text


_ANY_TEXT = kinds.string(0, 1 << 30)
_LENGTH = kinds.whole(1, MAX_TOKENS)
_TOKENS = kinds.token_ids(MAX_TOKENS)

FIELDS: tuple[Field, ...] = (
    Field("text", _ANY_TEXT, "-",
          "The prompt; goes through the chat template if there is one. One of text, messages, input_ids is needed"),
    Field("messages", _messages(), "-",
          "A conversation; content is a string or a list of text parts; developer counts as system"),
    Field("input_ids", kinds.token_ids(MAX_TOKENS, least=1), "-", "The prompt as token ids; goes in as it is"),
    Field("req_id", kinds.string(1, 256), "random", "Names the request; unique among those in flight"),
    Field("max_dec_len", _LENGTH, "min(MAX_DEC_LEN, context − input)", "Most output tokens", ("seq_len", "max_tokens")),
    Field("min_dec_len", _LENGTH, "1", "No end token and no stop string before this many output tokens",
          ("min_tokens",)),
    Field("topp", kinds.number(0, 1), "0.7",
          "Sample among the most probable tokens that add up to this; 0: the most probable", ("top_p",)),
    Field("temperature", kinds.number(0, 100), "0.95", "Randomness; 0: greedy"),
    Field("frequency_score", kinds.number(-2, 2), "0", "Penalty for each earlier occurrence in the output",
          ("frequency_penalty",)),
    Field("presence_score", kinds.number(-2, 2), "0", "Penalty for any earlier occurrence in the output",
          ("presence_penalty",)),
    Field("penalty_score", kinds.number(0, 2, above_low=True), "1",
          "Repetition penalty over prompt and output; 1: off", ("repetition_penalty",)),
    Field("top_k", kinds.whole(-1, MAX_TOKENS), "0", "Sample among this many most probable tokens; 0 or −1: all"),
    Field("min_p", kinds.number(0, 1), "0", "Drop tokens less probable than this share of the most probable one"),
    Field("infer_seed", kinds.whole(LOW_SEED, HIGH_SEED), "random",
          "Same request and seed, same answer; taken modulo 2^64", ("seed",)),
    Field("eos_token_ids", kinds.list_of(kinds.whole(0, MAX_TOKENS), 64, or_one=True), "[]",
          "End tokens besides the model's"),
    Field("stop", kinds.list_of(kinds.string(1, 256), 16, or_one=True), "[]",
          "Strings that end the output; not part of it"),
    Field("stream", kinds.flag(), "false", "One JSON object a line as tokens come (HTTP)"),
    Field("timeout", kinds.number(0, 86_400, above_low=True), "300",
          "Seconds for all of the request, the wait included"),
    Field("return_usage", kinds.flag(), "false", "Add usage to an answer that is not streamed"),
    Field("return_all_tokens", kinds.flag(), "false",
          "Add tokens_all_ids, the ids of the whole output, to the last message"),
    Field("system", _ANY_TEXT, "-", "A system message put first"),
    Field("benchmark", kinds.flag(), "false", "Add times to the last message"),
    Field("response_type", kinds.choice("fastdeploy", "openai"), "-", "Dialect of the answer (HTTP)"),
    Field("model", kinds.string(0, 512), "-", "Name of the served model"),
    Field("ignore_eos", kinds.flag(), "false", "End tokens do not end the output"),
    Field("logit_bias", kinds.bias_map(1024, 100), "{}", "Added to the logits of tokens"),
    Field("logprobs", kinds.whole(0, 20), "-", "Log probability of each token and of this many most probable ones"),
    Field("prompt_logprobs", kinds.whole(0, 20), "-", "The same for the tokens of the prompt"),
    Field("n", kinds.whole(1, MAX_CHOICES), "1", "Number of choices"),
    Field("priority", kinds.whole(-100, 100), "0", "Lower runs first"),
    Field("speculation", kinds.flag(), "as SPECULATION says",
          "Guess tokens that follow what occurred before and verify several a step; the output is the same"),
    Field("chat_template_kwargs", kinds.scalar_map(16), "{}", "More variables for the chat template"),
    Field("add_generation_prompt", kinds.flag(), "true", "Whether the template opens the assistant's turn"),
    Field("continue_final_message", kinds.flag(), "false", "Go on with the last message in place of opening a turn"),
    Field("dialect", kinds.choice("native", "openai"), "native", "Whose defaults and limits count", internal=True),
    Field("raw_text", kinds.flag(), "false", "text bypasses the chat template", internal=True),
    Field("return_prompt", kinds.flag(), "false", "The first message carries prompt and prompt_token_ids",
          internal=True),
    Field("generated_token_ids", kinds.one_or_lists(_TOKENS, MAX_CHOICES), "[]", "Resume: tokens received so far",
          internal=True),
    Field("send_idx", kinds.list_of(kinds.whole(0, MAX_TOKENS), MAX_CHOICES, or_one=True), "0",
          "Resume: index of the next message", internal=True),
    Field("fingerprint", kinds.string(0, 256), "-", "Resume: the fingerprint that came with the tokens", internal=True),
    Field("attempt", kinds.whole(0, 1 << 30), "0", "Resume: a higher one supersedes the same req_id", internal=True),
    Field("owner", kinds.string(0, 64), "-", "Names this very request to its own abort, whoever has its req_id",
          internal=True),
    Field("key", kinds.string(0, 64), "-", "Names the API key: only the same one may supersede or abort",
          internal=True),
    Field("tenant", kinds.string(0, 64), "key",
          "Whose request it is: those who wait with equal priority take turns by it", internal=True),
    Field("resume_inside", kinds.flag(), "false", "Resume inside the server: skips the queue limit", internal=True),
)


def parse_request(body: Mapping[str, object]) -> Request:
    """Check a native request object. Raises InvalidRequest; ignores unknown fields."""
    values: dict[str, Any] = {}
    for field in FIELDS:
        given = [name for name in (field.name, *field.aliases) if body.get(name) is not None]
        if len(given) > 1:
            raise InvalidRequest(f"{given[0]} and {given[1]} name the same field; give one of them", field=given[0])
        if given:
            values[field.name] = field.kind.parse(given[0], body[given[0]])
    _check_together(values)
    return Request(**values)


def _check_together(values: dict[str, Any]) -> None:
    """Rules over several fields."""
    prompts = [name for name in ("text", "messages", "input_ids") if name in values]
    if not prompts:
        raise InvalidRequest("one of text, messages, input_ids is needed", field="text")
    if len(prompts) > 1:
        raise InvalidRequest(f"{prompts[0]} and {prompts[1]} were both given; give one of them", field=prompts[1])
    if "system" in values and (prompts[0] == "input_ids" or values.get("raw_text")):
        raise InvalidRequest("system needs text or messages, and a chat template", field="system")
    choices = values.get("n", 1)
    for name in ("generated_token_ids", "send_idx"):
        if name in values and len(values[name]) not in (1, choices):
            raise InvalidRequest(f"{name} has {len(values[name])} entries for n={choices} choices", field=name)
    if "generated_token_ids" in values and len(values["generated_token_ids"]) != choices:
        message = f"generated_token_ids needs one list for each of n={choices} choices"
        raise InvalidRequest(message, field="generated_token_ids")
    if values.get("top_k") == -1:
        values["top_k"] = 0


def decode_body(body: bytes | str) -> dict[str, Any]:
    """The object in the tensor IN: a list of one object, or the bare object. Raises InvalidRequest."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the request is not valid JSON: {str(error)[:200]}") from None
    if isinstance(value, list):
        if len(value) != 1:
            raise InvalidRequest(f"IN must hold one request, not {len(value)}")
        value = value[0]
    if not isinstance(value, dict):
        raise InvalidRequest(f"the request must be a JSON object, not {kinds.type_name(value)}")
    return value


def request_schema(*, internal: bool = False) -> dict[str, Any]:
    """JSON schema of a native request; with `internal` the fields that only gRPC understands too."""
    properties: dict[str, Any] = {}
    for field in FIELDS:
        if field.internal and not internal:
            continue
        for name in (field.name, *field.aliases):
            doc = field.doc if name == field.name else f"Alias of {field.name}"
            properties[name] = {**field.kind.schema, "description": f"{doc} (default: {field.default})"}
    one_of = [{"required": [name]} for name in ("text", "messages", "input_ids")]
    return {"title": "NativeRequest", "type": "object", "properties": properties, "oneOf": one_of}


def markdown_table(*, internal: bool = False) -> str:
    """The table for the documentation."""
    lines = ["| field | type | allowed | default | meaning |", "|---|---|---|---|---|"]
    for field in FIELDS:
        if field.internal and not internal:
            continue
        names = ", ".join(f"`{name}`" for name in (field.name, *field.aliases))
        lines.append(f"| {names} | {field.kind.type_name} | {field.kind.allowed} | {field.default} | {field.doc} |")
    return "\n".join(lines) + "\n"
