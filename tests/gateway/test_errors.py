"""Errors before and after the first byte, in both dialects' shapes."""

from __future__ import annotations

import json

import openai
import pytest
import requests

from gateway.conftest import Stack
from octavo.protocol.errors import KINDS

HELLO = [{"role": "user", "content": "hi"}]
NATIVE = {"text": "hi"}
OPENAI = {"model": "m", "messages": HELLO}


def post(stack: Stack, body: object, path: str = "/v1/chat/completions", **headers: str) -> requests.Response:
    raw = body if isinstance(body, (bytes, str)) else json.dumps(body)
    return requests.post(stack.url + path, data=raw, headers=headers, timeout=10)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", sorted(KINDS))
def test_an_error_before_the_first_byte_has_its_real_status(stack: Stack, status: int, stream: bool) -> None:
    stack.fake.error = {"error_msg": "no luck", "error_code": status, "error_field": "topp", "error_type": "why"}
    native = post(stack, {**NATIVE, "req_id": "r", "stream": stream})
    assert native.status_code == status
    assert native.json() == {
        "error_msg": "no luck", "error_code": status, "req_id": "r", "error_field": "topp", "error_type": "why"
    }  # fmt: skip
    other = post(stack, {**OPENAI, "stream": stream})
    assert other.status_code == status
    error = {"message": "no luck", "type": KINDS[status].openai_type, "param": "top_p", "code": "why"}
    assert other.json() == {"error": error}
    for answer in (native, other):
        assert answer.headers["content-type"] == "application/json"
        assert ("retry-after" in answer.headers) == (status in (429, 503))
        assert answer.headers.get("x-should-retry") == ("false" if status in (408, 409) else None)
    assert not stack.fake.aborts, "a refused request must not be aborted: its id may belong to another one"


def test_an_error_after_the_first_byte_is_the_last_line(stack: Stack) -> None:
    stack.fake.error, stack.fake.error_at = {"error_msg": "engine down", "error_code": 503}, 2
    native = post(stack, {**NATIVE, "stream": True})
    *said, last = [json.loads(line) for line in native.text.splitlines()]
    assert [one["token"] for one in said] == ["Hello", ","]
    assert (native.status_code, last["error_msg"], last["error_code"], last["is_end"]) == (200, "engine down", 503, 1)


def test_an_error_in_mid_stream_raises_in_the_client(stack: Stack) -> None:
    stack.fake.error, stack.fake.error_at = {"error_msg": "engine down", "error_code": 503}, 2
    client = openai.Client(base_url=f"{stack.url}/v1", api_key="none", max_retries=0)
    stream = client.chat.completions.create(**OPENAI, stream=True)
    said = [next(stream).choices[0].delta.content for _ in range(3)]
    with pytest.raises(openai.APIError, match="engine down"):
        next(stream)
    assert said == ["", "Hello", ","]


@pytest.mark.parametrize("body", [NATIVE, OPENAI])
def test_an_error_in_mid_answer_is_the_whole_answer(stack: Stack, body: dict) -> None:
    stack.fake.error, stack.fake.error_at = {"error_msg": "too late", "error_code": 408}, 2
    answer = post(stack, body)
    assert answer.status_code == 408
    assert "too late" in answer.text


def test_the_first_failing_prompt_fails_all_of_them(stack: Stack) -> None:
    stack.fake.error = {"error_msg": "queue full", "error_code": 429}
    answer = post(stack, {"model": "m", "prompt": ["a", "b", "c"]}, "/v1/completions")
    assert (answer.status_code, answer.json()["error"]["message"]) == (429, "queue full")


def test_an_error_of_triton_itself_is_unavailable(stack: Stack) -> None:
    stack.fake.triton_error = "Request for unknown model: 'model' has no available versions"
    answer = post(stack, NATIVE)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    assert requests.get(f"{stack.url}/health", timeout=5).status_code == 503


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"),
        (b"{", "not valid JSON"),
        (b'{"text": "a",}', "byte 13"),
        (b"[1]", "must be a JSON object"),
        (b'"x"', "must be a JSON object"),
        (b'{"text": NaN}', "byte 9"),
        (b'{"text": "\xff"}', "UTF-8"),
        (b'{"text": "\\ud800"}', "not valid JSON"),
        (b'{"a": 1e999}', "out of range"),
        (b'{"a": ' + b"9" * 5000 + b"}", "out of range"),
        (b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "deeper than 64"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "deeper than 64"),
    ],
)
def test_malformed_bodies_are_400_in_both_shapes(stack: Stack, body: bytes, words: str) -> None:
    answer = post(stack, body)
    assert answer.status_code == 400
    assert words in answer.json()["error_msg"]
    assert answer.json()["error"]["message"] == answer.json()["error_msg"]
    assert not stack.fake.requests


def test_wide_bodies_are_not_deep(stack: Stack) -> None:
    assert post(stack, {"text": "a", "wide": [[1]] * 1000}).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": ["x"]}, "messages[0]"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({}, "messages"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens"),
        ({"max_tokens": "4"}, "max_tokens"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"seed": 1 << 64}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": 1}}, "stream_options"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"functions": [{}]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "alloy"}}, "audio"),
        ({"echo": True}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"guided_json": {}}, "guided_json"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
    ],
)
def test_what_is_wrong_or_not_served_in_chat_is_named(stack: Stack, body: dict, param: str) -> None:
    whole = {"model": "m", **({"messages": HELLO} if body else {}), **body}
    answer = post(stack, whole)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert param.split("[")[0] in error["message"]
    assert not stack.fake.requests


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": [[1], ["a"]]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": ["a"] * 1025}, "prompt"),
        ({"prompt": ["a"] * 100, "n": 11}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3, "n": 2}, "best_of"),
    ],
)
def test_what_is_wrong_or_not_served_in_text_is_named(stack: Stack, body: dict, param: str) -> None:
    answer = post(stack, {"model": "m", "prompt": "x", **body}, "/v1/completions")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert not stack.fake.requests


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"text": "a", "req_id": 5}, "req_id"),
        ({"text": "a", "req_id": ""}, "req_id"),
        ({"text": "a", "req_id": "x" * 257}, "req_id"),
        ({"text": "a", "stream": 1}, "stream"),
        ({"text": "a", "response_type": "xml"}, "response_type"),
    ],
)
def test_the_gateways_own_native_fields_are_checked(stack: Stack, body: dict, field: str) -> None:
    answer = post(stack, body)
    assert (answer.status_code, answer.json()["error_field"]) == (400, field)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/", 404),
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/chat/completions/nothing", 404),
        ("GET", "/v1/chat/completions", 404),
        ("DELETE", "/v1/models", 404),
        ("POST", "/v1/completions/", 404),
    ],
)
def test_unknown_routes_and_methods_are_json(stack: Stack, method: str, path: str, status: int) -> None:
    answer = requests.request(method, stack.url + path, timeout=5)
    assert answer.status_code == status
    body = answer.json()
    assert body["error"]["message"]
    if not path.startswith(("/v1/chat/completions/", "/v1/models")):
        assert body["error_code"] == status


def test_request_ids_are_echoed_clean_or_made(stack: Stack) -> None:
    assert post(stack, NATIVE, **{"x-request-id": "abc-1.2"}).headers["x-request-id"] == "abc-1.2"
    assert (
        post(stack, NATIVE, **{"x-request-id": "a b;\tc<é>" + "x" * 500}).headers["x-request-id"] == "abc" + "x" * 125
    )
    assert len(post(stack, b"{").headers["x-request-id"]) == 32


def test_api_keys_are_asked_for_on_every_route_but_health(make_stack) -> None:
    stack = make_stack(API_KEYS="first,second")
    paths = [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/abort",
        "/tokenize",
        "/v1/chat/completions/completions",
        "/no",
    ]
    for path in paths:
        answer = post(stack, NATIVE, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    for path in ("/v1/models", "/openapi.json", "/docs"):
        assert requests.get(stack.url + path, timeout=5).status_code == 401
    assert requests.get(stack.url + "/health", timeout=5).status_code == 200
    for headers in ({"authorization": "Bearer second"}, {"authorization": "bearer first"}, {"x-api-key": "first"}):
        assert post(stack, NATIVE, **headers).status_code == 200
    for headers in (
        {"authorization": "Bearer firs"},
        {"authorization": "Basic first"},
        {"authorization": "first"},
        {"x-api-key": "first,second"},
        {"x-api-key": "\xe9"},
        {"x-api-key": ""},
    ):
        assert post(stack, NATIVE, **headers).status_code == 401
    with pytest.raises(openai.AuthenticationError):
        openai.Client(base_url=f"{stack.url}/v1", api_key="wrong").models.list()
    assert len(openai.Client(base_url=f"{stack.url}/v1", api_key="second").models.list().data) == 1
