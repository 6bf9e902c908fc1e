"""The page's files as any HTTP client sees them: headers, caching, keys, nothing but the files, Swagger UI offline."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest
import requests

from gateway.conftest import Stack
from octavo.gateway.page.routes import FILES, NAMES, OPEN_PATHS, SWAGGER_NAMES

OURS = ["/", *(f"/static/{name}" for name in NAMES)]


def get(stack: Stack, path: str, **headers: str) -> requests.Response:
    return requests.get(stack.url + path, headers=headers, timeout=5)


@pytest.mark.parametrize("path", sorted(OPEN_PATHS))
def test_every_file_is_there_with_its_type_and_a_policy(stack: Stack, path: str) -> None:
    answer = get(stack, path)
    assert answer.status_code == 200
    kinds = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
    assert answer.headers["content-type"].startswith(kinds.get(path.rpartition(".")[2], "text/html"))
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "unsafe-eval" not in policy


def test_every_file_of_the_folder_is_served() -> None:
    assert {path.name for path in FILES.iterdir()} == {"index.html", *NAMES}


@pytest.mark.parametrize("path", OURS)
def test_nothing_is_fetched_from_elsewhere(stack: Stack, path: str) -> None:
    """Neither by a link nor by an import; a namespace is no address."""
    found = set(re.findall(r"https?://[^\s\"'`)]+|[\"'(]//[a-z][^\s\"'`)]+", get(stack, path).text))
    assert found <= {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("path", ["/", "/static/api.html", "/docs"])
def test_no_script_and_no_style_stands_in_the_html(stack: Stack, path: str) -> None:
    html = get(stack, path).text
    assert re.findall(r"<script\b[^>]*>", html)
    assert all(" src=" in tag for tag in re.findall(r"<script\b[^>]*>", html))
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|javascript:", html)


def test_what_the_browser_has_is_not_sent_again(stack: Stack) -> None:
    first = get(stack, "/static/page.js")
    again = get(stack, "/static/page.js", **{"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert get(stack, "/static/page.js", **{"if-none-match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "path", ["/static/", "/static/x.js", "/static/../routes.py", "/static/%2e%2e/routes.py", "/redoc"]
)
def test_there_is_nothing_else(stack: Stack, path: str) -> None:
    session = requests.Session()
    prepared = session.prepare_request(requests.Request("GET", stack.url))
    prepared.url = stack.url + path  # as it stands, dots and all
    assert session.send(prepared, timeout=5).status_code == 404


def test_the_page_is_open_where_keys_are_asked_for_and_nothing_else_is(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack(API_KEYS="secret")
    for path in OPEN_PATHS:
        assert get(stack, path).status_code == 200
    for path in ("/docs", "/openapi.json", "/v1/models", "/static/", "/static/nothing"):
        assert get(stack, path).status_code == 401
    assert get(stack, "/docs", authorization="Bearer secret").status_code == 200


def test_swagger_ui_comes_from_here(stack: Stack) -> None:
    html = get(stack, "/docs").text
    assert all(f"/static/{name}" in html for name in SWAGGER_NAMES)
    assert b"SwaggerUIBundle" in get(stack, "/static/swagger-ui-bundle.js").content


def test_health_tells_how_far_the_load_is_only_while_loading(stack: Stack) -> None:
    stack.fake.info = {"progress": {"stage": "weights", "fraction": 0.5}}
    assert "progress" not in until_state(stack, "ready")
    stack.fake.state = "loading"
    assert until_state(stack, "loading")["progress"] == {"stage": "weights", "fraction": 0.5}


def until_state(stack: Stack, state: str) -> dict:
    """The body of /health once it says so; it is up to a quarter of a second old."""
    for _ in range(100):
        body = get(stack, "/health").json()
        if body["status"] == state:
            return body
        time.sleep(0.02)
    raise AssertionError(f"the state never became {state}")
