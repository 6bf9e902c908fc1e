"""Everything but generation: health, models, tokenize, detokenize, abort.

Handlers of a gateway worker. Each is one op to the front end; only /health and /v1/models answer when nothing is there.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from octavo.gateway.bodies import read_object
from octavo.gateway.context import Context
from octavo.gateway.native_routes import key_of
from octavo.gateway.responses import json_response, while_connected
from octavo.protocol.errors import InvalidRequest, NotFound
from octavo.protocol.fields import wrong_type
from octavo.protocol.openai_answers import model_object
from octavo.protocol.openai_messages import chat_messages

TOKENIZE_SECONDS = 30.0


async def health(context: Context) -> Response:
    """200 while requests are taken, else 503 with the state and its reason."""
    info = await context.info()
    state = str(info.get("state", "down"))
    ready = state == "ready"
    body: dict[str, object] = {"status": state}
    if info.get("reason"):
        body["reason"] = info["reason"]
    if info.get("progress") and not ready:
        body["progress"] = info["progress"]
    return json_response(body, status=200 if ready else 503, headers={} if ready else {"retry-after": "2"})


async def models(context: Context) -> Response:
    return json_response({"object": "list", "data": [await _model(context)]})


async def model(context: Context, name: str) -> Response:
    if name != context.settings.served_model_name:
        raise NotFound(f"the model {name[:200]!r} does not exist", field="model", code="model_not_found")
    return json_response(await _model(context))


async def _model(context: Context) -> dict[str, object]:
    await context.info()
    name = context.settings.served_model_name
    return model_object(name, created=context.created, max_model_len=context.max_model_len)


async def tokenize(request: Request, context: Context) -> Response:
    """Token ids of a text (`prompt` or `text`) or of messages through the template."""
    body = await read_object(request, max_bytes=context.settings.max_body_bytes)
    context.check_model(body.get("model"))
    op: dict[str, object] = {"op": "tokenize", "req_id": context.new_id()}
    texts = [name for name in ("prompt", "text", "messages") if body.get(name) is not None]
    if len(texts) != 1:
        raise InvalidRequest("one of prompt, text and messages is needed", field="prompt")
    if texts == ["messages"]:
        op["messages"] = chat_messages(body["messages"])
    elif not isinstance(body[texts[0]], str):
        raise wrong_type(texts[0], "a string", body[texts[0]])
    else:
        op["text"] = body[texts[0]]
    special = body.get("add_special_tokens")
    if special is not None:
        if not isinstance(special, bool):
            raise wrong_type("add_special_tokens", "true or false", special)
        op["add_special_tokens"] = special
    answer = await while_connected(request, context.upstream.ask(op, timeout=TOKENIZE_SECONDS))
    return json_response({name: value for name, value in answer.items() if name != "req_id"})


async def detokenize(request: Request, context: Context) -> Response:
    """The text of token ids."""
    body = await read_object(request, max_bytes=context.settings.max_body_bytes)
    context.check_model(body.get("model"))
    tokens = body.get("tokens")
    if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens):
        raise InvalidRequest("tokens must be an array of token ids (integers from 0)", field="tokens")
    op: dict[str, object] = {"op": "detokenize", "tokens": tokens, "req_id": context.new_id()}
    answer = await while_connected(request, context.upstream.ask(op, timeout=TOKENIZE_SECONDS))
    return json_response({"prompt": answer.get("text", ""), "text": answer.get("text", "")})


async def abort(request: Request, context: Context) -> Response:
    """End a request by its req_id (for an OpenAI answer: its id)."""
    body = await read_object(request, max_bytes=context.settings.max_body_bytes)
    req_id = body.get("req_id")
    if not isinstance(req_id, str) or not 1 <= len(req_id) <= 256:
        raise InvalidRequest("req_id must be a string of 1 to 256 characters", field="req_id")
    answer = await context.upstream.ask({"op": "abort", "req_id": req_id} | key_of(request))
    aborted = bool(answer.get("aborted"))
    return json_response({"req_id": req_id, "aborted": aborted, "error_msg": "", "error_code": 0})
