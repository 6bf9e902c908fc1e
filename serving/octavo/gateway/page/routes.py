"""Routes of the page: / and its files below /static/, and /docs with Swagger UI, all served from this machine.

Runs on the event loop of a gateway worker. The files hold nothing of the server or of its users, so they are open even
where keys are asked for (a page must be there to type a key into); what they fetch is not. No script but these files
may run: see `POLICY`. Knows files and headers only.
"""

from __future__ import annotations

import hashlib
import importlib.util
import mimetypes
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.responses import FileResponse, Response

from octavo.protocol.errors import NotFound

FILES = Path(__file__).resolve().parent / "static"
NAMES = (
    *("page.css", "page.js", "chat.js", "settings.js", "render.js", "words.js", "theme.js", "icon.svg"),
    *("api.html", "api.css", "api.js"),
)
SWAGGER_NAMES = ("swagger-ui-bundle.js", "swagger-ui.css")
OPEN_PATHS = frozenset({"/", *(f"/static/{name}" for name in (*NAMES, *SWAGGER_NAMES))})

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
# Swagger UI builds its page with innerHTML and style attributes; scripts from elsewhere stay shut out
SWAGGER_POLICY = POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'").partition("; require-")[0]
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
LASTING = "public, max-age=86400"  # Swagger UI's files, which change with its version only

Handler = Callable[[Request], Awaitable[Response]]


def mount(app: FastAPI) -> None:
    """Add the page's routes to the application."""
    app.get("/", include_in_schema=False)(_file(FILES / "index.html"))
    app.get("/docs", include_in_schema=False)(_file(FILES / "api.html", policy=SWAGGER_POLICY))
    for name in NAMES:
        policy = SWAGGER_POLICY if name == "api.html" else POLICY
        app.get(f"/static/{name}", include_in_schema=False)(_file(FILES / name, policy=policy))
    swagger = _swagger_folder()
    for name in SWAGGER_NAMES:
        handler = _missing if swagger is None else _file(swagger / name, cache=LASTING)
        app.get(f"/static/{name}", include_in_schema=False)(handler)


def _file(path: Path, *, policy: str = POLICY, cache: str = "no-cache") -> Handler:
    """A handler that sends one file, or 304 to a browser that has it."""
    media = "text/javascript" if path.suffix == ".js" else mimetypes.guess_type(path.name)[0]
    tag = f'"{hashlib.sha256(path.read_bytes()).hexdigest()[:32]}"'
    headers = {**HEADERS, "content-security-policy": policy, "cache-control": cache, "etag": tag}

    async def send(request: Request) -> Response:
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return FileResponse(path, media_type=media, headers=headers)

    return send


def _swagger_folder() -> Path | None:
    """Where the package that carries Swagger UI keeps its files; it is looked for, not imported."""
    found = importlib.util.find_spec("fastapi_offline")
    if found is None or found.origin is None:
        return None
    folder = Path(found.origin).parent / "static"
    return folder if all((folder / name).is_file() for name in SWAGGER_NAMES) else None


async def _missing(_: Request) -> Response:
    raise NotFound("Swagger UI is not installed here: pip install fastapi-offline")
