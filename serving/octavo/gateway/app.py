"""The FastAPI application of a gateway worker: routes, the edge around them, and the start and end of the way to the
model.

`create_app` makes one per worker; everything in it runs on that worker's event loop. Handlers take the raw request,
so FastAPI neither reads nor judges bodies and its own 422 never appears.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from octavo.gateway import openapi, tool_routes
from octavo.gateway.bodies import NATIVE, OPENAI, dialects_of, read_object
from octavo.gateway.context import Context
from octavo.gateway.edge import Edge
from octavo.gateway.native_routes import answer_native
from octavo.gateway.openai_routes import answer_native_as_openai, answer_openai
from octavo.gateway.page import routes as page
from octavo.gateway.responses import error_body, error_response, json_response
from octavo.gateway.upstream import Upstream
from octavo.protocol.errors import Cancelled, NotFound, OctavoError
from octavo.protocol.openai import CHAT, TEXT
from octavo.settings import Settings

if TYPE_CHECKING:
    from octavo.gateway.tracing import Tracing

ALIAS = "/v1/chat/completions"  # some clients take this for their base URL


def create_app(
    settings: Settings,
    upstream: Upstream,
    *,
    native_schema: dict[str, object] | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The application. It starts `upstream` with itself and closes it at the end; `native_schema` is for
    /openapi.json only; `tracing`, where it is on, goes around both ends.
    """
    if tracing is not None:
        upstream = tracing.around(upstream)
    context = Context(settings, upstream)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await upstream.start()
        yield
        await upstream.close()

    app = FastAPI(title="Octavo", version="1", lifespan=lifespan, redirect_slashes=False, docs_url=None, redoc_url=None)
    app.add_middleware(Edge, api_keys=settings.api_keys, new_id=context.new_id)
    if tracing is not None:
        app.add_middleware(tracing.routes)
    app.add_exception_handler(OctavoError, _on_octavo_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    _add_generation(app, context, native_schema or {"type": "object"})
    _add_tools(app, context)
    page.mount(app)
    return app


def _add_generation(app: FastAPI, context: Context, native_schema: dict[str, object]) -> None:
    for path, route in ((ALIAS, CHAT), ("/v1/completions", TEXT)):
        app.post(
            path,
            tags=["generation"],
            summary=f"{route}, in either dialect",
            operation_id=f"{route}_completion",
            openapi_extra=openapi.generation(route, native=native_schema),
        )(_both(context, route))
    for path, route in ((f"{ALIAS}/chat/completions", CHAT), (f"{ALIAS}/completions", TEXT)):
        app.post(path, include_in_schema=False)(_openai_only(context, route))


def _both(context: Context, route: str) -> Callable[[Request], Awaitable[Response]]:
    async def generate(request: Request) -> Response:
        body = await read_object(request, max_bytes=context.settings.max_body_bytes)
        fields, answers = dialects_of(body)
        try:
            if fields == OPENAI:
                return await answer_openai(request, body, context, route=route)
            if answers == OPENAI:
                return await answer_native_as_openai(request, body, context, route=route)
            return await answer_native(request, body, context)
        except OctavoError as error:
            req_id = body.get("req_id")
            return error_response(error, answers, req_id if isinstance(req_id, str) else None)

    return generate


def _openai_only(context: Context, route: str) -> Callable[[Request], Awaitable[Response]]:
    async def generate(request: Request) -> Response:
        try:
            body = await read_object(request, max_bytes=context.settings.max_body_bytes)
            return await answer_openai(request, body, context, route=route)
        except OctavoError as error:
            return error_response(error, OPENAI)

    return generate


def _add_tools(app: FastAPI, context: Context) -> None:
    @app.get("/health", tags=["server"], openapi_extra=openapi.HEALTH, summary="200 while requests are taken")
    async def health() -> Response:
        return await tool_routes.health(context)

    async def models() -> Response:
        return await tool_routes.models(context)

    async def model(request: Request) -> Response:
        return await tool_routes.model(context, request.path_params["name"])

    for base, shown in (("/v1", True), (ALIAS, False)):
        one, tags = f"{base}/models/{{name:path}}", ["models"]
        app.get(f"{base}/models", tags=tags, include_in_schema=shown, openapi_extra=openapi.MODELS)(models)
        app.get(one, tags=tags, include_in_schema=shown, openapi_extra=openapi.MODEL)(model)

    @app.post("/tokenize", tags=["tokens"], openapi_extra=openapi.TOKENIZE, summary="text or messages to token ids")
    async def tokenize(request: Request) -> Response:
        return await tool_routes.tokenize(request, context)

    @app.post("/detokenize", tags=["tokens"], openapi_extra=openapi.DETOKENIZE, summary="token ids to text")
    async def detokenize(request: Request) -> Response:
        return await tool_routes.detokenize(request, context)

    @app.post("/v1/abort", tags=["generation"], openapi_extra=openapi.ABORT, summary="end a request")
    async def abort(request: Request) -> Response:
        try:
            return await tool_routes.abort(request, context)
        except OctavoError as error:
            return error_response(error, NATIVE)


def _dialect_of_path(request: Request) -> str | None:
    return OPENAI if request.url.path.startswith((ALIAS + "/", "/v1/models")) else None


async def _on_octavo_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, OctavoError)
    return error_response(error, _dialect_of_path(request))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """The router's own: an unknown path, or a known one with another method; 404 both, as the list is closed."""
    assert isinstance(error, HTTPException)
    message = "there is no such route"
    if error.status_code == 405:
        message = f"{request.method} is not served on this route, but {(error.headers or {}).get('Allow', 'others')}"
    body = error_body(NotFound(message), _dialect_of_path(request))
    return json_response(body, status=404, headers=error.headers)


async def _on_disconnect(_: Request, __: Exception) -> Response:
    return error_response(Cancelled("the client has left"), None)
