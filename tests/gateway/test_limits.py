"""Bounds on what a client may send: bytes and seconds of heads and bodies; and what a slow reader may cost."""

from __future__ import annotations

import json
import socket
import time

import pytest
import requests

from gateway.conftest import Stack
from octavo.gateway import bodies, http_protocol


def connect(stack: Stack) -> socket.socket:
    return socket.create_connection(("127.0.0.1", stack.port), timeout=10)


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_large_is_413(make_stack, declared: bool) -> None:
    stack = make_stack(MAX_BODY_BYTES="2048")
    body = json.dumps({"text": "x" * 3000}).encode()
    answer = requests.post(f"{stack.url}/v1/completions", data=body if declared else iter([body]), timeout=10)
    assert answer.status_code == 413
    assert "2048" in answer.json()["error_msg"]
    assert requests.post(f"{stack.url}/v1/completions", json={"text": "x" * 2000}, timeout=10).status_code == 200


def test_a_client_that_waits_for_continue_is_refused_without_its_body(make_stack) -> None:
    stack = make_stack(MAX_BODY_BYTES="2048")
    with connect(stack) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 999999999\r\nexpect: 100-continue\r\n\r\n"
        connection.sendall(head)
        assert b" 413 " in read_all(connection).split(b"\r\n")[0]


def test_a_body_that_does_not_arrive_is_408(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies.read_object, "__kwdefaults__", {"seconds": 0.2})
    with connect(stack) as connection:
        connection.sendall(b'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"text"')
        answer = read_all(connection)
    assert b" 408 " in answer.split(b"\r\n")[0]
    assert b"x-should-retry: false" in answer


@pytest.mark.parametrize("finished", [True, False])
def test_a_head_that_is_too_large_is_431(stack: Stack, finished: bool) -> None:
    with connect(stack) as connection:
        connection.sendall(
            b"GET /health HTTP/1.1\r\nhost: x\r\nbig: " + b"x" * 70_000 + (b"\r\n\r\n" if finished else b"")
        )
        answer = read_all(connection)
    assert b" 431 " in answer.split(b"\r\n")[0]
    assert json.loads(answer.split(b"\r\n\r\n")[1])["error_code"] == 431


def test_many_headers_are_fine_up_to_the_limit(stack: Stack) -> None:
    headers = {f"h{number}": "x" * 1000 for number in range(60)}
    assert requests.get(f"{stack.url}/health", headers=headers, timeout=5).status_code == 200


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nhos"])
def test_a_head_that_does_not_arrive_ends_the_connection(stack: Stack, monkeypatch, sent: bytes) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.2)
    with connect(stack) as connection:
        connection.sendall(sent)
        start = time.monotonic()
        assert read_all(connection) == b""
        assert time.monotonic() - start < 3


def test_a_large_body_passes(stack: Stack) -> None:
    answer = requests.post(
        f"{stack.url}/v1/completions", json={"input_ids": [7] * 1_000_000, "max_dec_len": 1}, timeout=20
    )
    assert answer.status_code == 200
    assert len(stack.fake.requests[0]["input_ids"]) == 1_000_000


def test_a_slow_reader_slows_nobody_else(make_stack) -> None:
    stack = make_stack()
    stack.fake.words = ["word " * 200] * 4000  # 4 MB, far beyond the socket's and the gateway's buffers
    body = json.dumps({"text": "x", "stream": True, "req_id": "slow"}).encode()
    with connect(stack) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        slow.recv(1000)
        time.sleep(0.5)
        for _ in range(3):
            start = time.monotonic()
            answer = requests.post(f"{stack.url}/v1/completions", json={"text": "x", "max_dec_len": 300}, timeout=10)
            assert answer.json()["tokens_all_num"] == 300
            assert time.monotonic() - start < 3
        assert "slow" in stack.fake._running, "the slow request was read to its end: nothing held it back"
