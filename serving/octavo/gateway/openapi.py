"""What /openapi.json says: request schemas from the field tables, answers, errors.

Pure; used once when the app is made. Knows the tables of protocol/, no handler.
"""

from __future__ import annotations

from octavo.protocol import openai
from octavo.protocol.errors import KINDS

Schema = dict[str, object]

_INTEGER: Schema = {"type": "integer"}
_STRING: Schema = {"type": "string"}
_EVENT: Schema = {  # one server-sent event of a stream; the last one's data is [DONE]
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
}
_MAYBE: Schema = {"type": ["string", "null"]}
_NATIVE_ERROR: Schema = {
    "type": "object",
    "required": ["error_msg", "error_code"],
    "properties": {"error_msg": _STRING, "error_code": _INTEGER, "req_id": _STRING, "error_field": _STRING},
}
_OPENAI_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "properties": {"message": _STRING, "type": _STRING, "param": _MAYBE, "code": _MAYBE},
        }
    },
}
_USAGE: Schema = {
    "type": "object",
    "properties": {"prompt_tokens": _INTEGER, "completion_tokens": _INTEGER, "total_tokens": _INTEGER},
}
_NATIVE_ANSWER: Schema = {
    "type": "object",
    "description": "with stream: one such object a line, each with token, token_ids, send_idx and is_end",
    "properties": {
        "req_id": _STRING,
        "tokens_all": _STRING,
        "result": _STRING,
        "tokens_all_num": _INTEGER,
        "finish_reason": {"type": "string", "enum": ["stop", "length", "cancelled"]},
        "usage": _USAGE,
        "error_msg": _STRING,
        "error_code": _INTEGER,
    },
}


def _openai_answer(kind: str, choice: Schema) -> Schema:
    entry = {"type": "object", "properties": {"index": _INTEGER, "finish_reason": _STRING, **choice}}
    return {
        "type": "object",
        "properties": {
            "id": _STRING,
            "object": {"type": "string", "enum": [kind]},
            "created": _INTEGER,
            "model": _STRING,
            "choices": {"type": "array", "items": entry},
            "usage": _USAGE,
        },
    }


_CHAT_ANSWER = _openai_answer(
    "chat.completion", {"message": {"type": "object", "properties": {"role": _STRING, "content": _STRING}}}
)
_TEXT_ANSWER = _openai_answer("text_completion", {"text": _STRING})


def _extra(request: Schema, answers: Schema) -> Schema:
    """An operation's `openapi_extra`: the body, what 200 carries by content type, and the errors."""
    body = {"required": True, "content": {"application/json": {"schema": request}}}
    return {"requestBody": body, "responses": _responses(answers)}


def _responses(answers: Schema) -> Schema:
    """What 200 carries by content type, and the errors."""
    error = {"application/json": {"schema": {"anyOf": [_OPENAI_ERROR, _NATIVE_ERROR]}}}
    names = {400: "invalid value or JSON", 503: "starting, draining or down"}
    responses: dict[str, object] = {
        str(status): {"description": names.get(status, kind.openai_type.replace("_", " ")), "content": error}
        for status, kind in KINDS.items()
    }
    content = {media: {"schema": schema} for media, schema in answers.items()}
    responses["200"] = {"description": "the answer", "content": content}
    return responses


def generation(route: str, *, native: Schema | None) -> Schema:
    """For a generation route; `native` is the native body's schema where the route speaks both dialects."""
    ours = openai.request_schema(route)
    answer = _CHAT_ANSWER if route == openai.CHAT else _TEXT_ANSWER
    if native is None:
        return _extra(ours, {"application/json": answer, "text/event-stream": _EVENT})
    answers: Schema = {
        "application/json": {"anyOf": [answer, _NATIVE_ANSWER]},
        "text/event-stream": _EVENT,
        "application/x-ndjson": _NATIVE_ANSWER,
    }
    return _extra({"anyOf": [ours, native]}, answers)


def _json(properties: Schema, required: list[str], answer: Schema) -> Schema:
    request: Schema = {"type": "object", "properties": properties, "required": required}
    whole: Schema = {"type": "object", "properties": answer}
    return _extra(request, {"application/json": whole})


_TOKENS: Schema = {"type": "array", "items": _INTEGER}
_STRINGS: Schema = {"type": "array", "items": _STRING}
_MESSAGES: Schema = {"type": "array", "items": {"type": "object"}}
TOKENIZE = _json(
    {"prompt": _STRING, "messages": _MESSAGES, "add_special_tokens": {"type": "boolean"}},
    [],
    {"tokens": _TOKENS, "token_strs": _STRINGS, "count": _INTEGER, "max_model_len": _INTEGER},
)
DETOKENIZE = _json({"tokens": _TOKENS}, ["tokens"], {"prompt": _STRING, "text": _STRING})
ABORT = _json({"req_id": _STRING}, ["req_id"], {"req_id": _STRING, "aborted": {"type": "boolean"}})
_HEALTH_ANSWER: Schema = {
    "type": "object",
    "required": ["status"],
    "properties": {"status": _STRING, "reason": _STRING, "progress": {"type": "object"}},
}
HEALTH: Schema = {"responses": _responses({"application/json": _HEALTH_ANSWER})}
HEALTH["responses"]["503"] = {  # type: ignore[index]
    "description": "not ready, and why",
    "content": {"application/json": {"schema": _HEALTH_ANSWER}},
}
MODELS: Schema = {"responses": _responses({"application/json": {"type": "object"}})}
MODEL: Schema = {"parameters": [{"name": "name", "in": "path", "required": True, "schema": _STRING}], **MODELS}
