"""A client that leaves: its request is cancelled and aborted by name, in every phase."""

from __future__ import annotations

import json
import socket

import pytest
import requests

from gateway.conftest import Stack, until


def send(stack: Stack, body: dict, path: str = "/v1/completions") -> socket.socket:
    raw = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", stack.port), timeout=10)
    connection.sendall(b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (path.encode(), len(raw), raw))
    return connection


NATIVE = {"text": "x", "req_id": "left"}
OPENAI = {"model": "m", "prompt": "x"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("body", [NATIVE, OPENAI], ids=["native", "openai"])
@pytest.mark.parametrize("phase", ["waiting", "running"])
def test_leaving_aborts(stack: Stack, body: dict, stream: bool, phase: str) -> None:
    stack.fake.delay = 0.2
    stack.fake.words = ["a"] * 100
    if phase == "waiting":
        stack.fake.first_delay = 30.0
    with send(stack, {**body, "stream": stream}) as connection:
        until(lambda: stack.fake.requests)
        if phase == "running" and stream:
            connection.recv(100)
    req_id = stack.fake.requests[0]["req_id"]
    until(lambda: stack.fake.aborts == [req_id])
    until(lambda: stack.fake.cancelled == [req_id] or req_id not in stack.fake._running)


def test_leaving_aborts_every_prompt(stack: Stack) -> None:
    stack.fake.delay = 30.0
    with send(stack, {**OPENAI, "prompt": ["a", "b", "c"]}):
        until(lambda: len(stack.fake.requests) == 3)
    ids = sorted(one["req_id"] for one in stack.fake.requests)
    until(lambda: sorted(stack.fake.aborts) == ids)


def test_a_finished_request_is_neither_cancelled_nor_aborted(stack: Stack) -> None:
    for body in (NATIVE, {**NATIVE, "stream": True}, OPENAI, {**OPENAI, "stream": True, "n": 2, "prompt": ["a", "b"]}):
        answer = requests.post(f"{stack.url}/v1/completions", json=body, timeout=10)
        assert answer.status_code == 200
    requests.get(f"{stack.url}/health", timeout=5)
    assert stack.fake.aborts == []
    assert stack.fake.cancelled == []
