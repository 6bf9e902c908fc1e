"""Whatever a body holds, the answer is an object with a status below 500."""

from __future__ import annotations

import json
from collections.abc import Callable

import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.conftest import Stack
from octavo.gateway.bodies import NATIVE_WORDS, parse_object
from octavo.protocol import native
from octavo.protocol.errors import InvalidRequest
from octavo.protocol.openai import CHAT, FIELDS, NOT_SERVED, TEXT, parse

PATHS = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/chat/completions/chat/completions",
    "/tokenize",
    "/detokenize",
    "/v1/abort",
]
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20)
)
messages = st.just([{"role": "user", "content": "x"}])
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
names = st.sampled_from(
    sorted({field.name for field in FIELDS} | set(NOT_SERVED) | NATIVE_WORDS | {"messages", "prompt", "tokens"})
)
numbers = st.integers(-2, 40) | st.sampled_from([1 << 24, 1 << 40, 1 << 63, 0.5, 2.0])
bodies = st.builds(
    lambda base, some: {**base, **some},
    st.fixed_dictionaries(
        {}, optional={"messages": messages, "prompt": st.sampled_from(["x", ["a", "b"], [1, 2], [[1], [-2]]])}
    ),
    st.dictionaries(names, values | numbers | st.booleans(), max_size=4),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(PATHS), body=bodies | values)
def test_any_json_gets_an_answer(stack: Stack, path: str, body: object) -> None:
    answer = requests.post(stack.url + path, json=body, timeout=10)
    assert answer.status_code in (200, 400)
    for line in answer.text.splitlines():
        if not line.startswith("data:") and line:
            assert isinstance(json.loads(line), dict)


def outcome(work: Callable[[], object]) -> object:
    """What it returns, or the InvalidRequest it raises; nothing else may come."""
    try:
        return work()
    except InvalidRequest as error:
        return error


@settings(max_examples=300, deadline=None)
@given(raw=st.binary(max_size=40) | values.map(lambda value: json.dumps(value).encode()[:-1]))
def test_any_bytes_are_an_object_or_an_invalid_request(raw: bytes) -> None:
    result = outcome(lambda: parse_object(raw))
    assert isinstance(result, dict) or result.message


@settings(max_examples=500, deadline=None)
@given(body=bodies, route=st.sampled_from([CHAT, TEXT]))
def test_any_object_is_a_request_or_an_invalid_request(body: dict, route: str) -> None:
    result = outcome(lambda: parse(body, route))
    if isinstance(result, InvalidRequest):
        assert result.field
        assert len(result.message) < 400
    else:
        assert all(native.parse_request(one) for one in result.bodies), "what this table takes, the native one takes"
