"""Bounds on connections and on requests that are slow to arrive; every limit is an error that names field and limit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from gateway.conftest import Stack, running, until
from gateway.test_worker import environ
from octavo.gateway import http_protocol
from octavo.gateway.__main__ import room_for

POST = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running() as made:
        yield made


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def read_all(connection: socket.socket) -> bytes:
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def answer_of(raw: bytes) -> tuple[int, dict]:
    head, _, body = raw.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), json.loads(body)


# ---- connections


@pytest.fixture
def worker(stack: Stack) -> Iterator[Callable[..., int]]:
    """Starts real workers; gives the port."""
    started: list[subprocess.Popen[bytes]] = []

    def start(**more: str) -> int:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            command = [sys.executable, "-m", "octavo.gateway", "--fd", str(listener.fileno())]
            started.append(
                subprocess.Popen(
                    command, env=environ(stack, port, **more), pass_fds=[listener.fileno()], stderr=subprocess.DEVNULL
                )
            )
        return port

    yield start
    for process in started:
        process.send_signal(signal.SIGTERM)
        process.wait(15)


def test_a_connection_too_many_is_told_so_and_not_left_waiting(stack: Stack, worker: Callable[..., int]) -> None:
    port = worker(MAX_CONNECTIONS="4")
    url = f"http://127.0.0.1:{port}"
    assert requests.get(f"{url}/health", timeout=20).status_code == 200
    with contextlib.ExitStack() as opened:
        idle = [opened.enter_context(connect(port)) for _ in range(4)]
        time.sleep(0.2)
        began = time.monotonic()
        refused = requests.post(f"{url}/v1/completions", json={"text": "x" * 100_000}, timeout=10)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
        assert refused.json()["error_msg"] == "too many connections (MAX_CONNECTIONS 4)"
        assert refused.json()["error"]["type"] == "service_unavailable_error"
        assert time.monotonic() - began < 3
        assert requests.get(f"{url}/health", timeout=5).status_code == 200, "whoever watches still gets an answer"
        idle[0].close()
        until(lambda: requests.post(f"{url}/v1/completions", json={"text": "x"}, timeout=5).status_code == 200)


def test_far_too_many_connections_are_dropped_at_once(stack: Stack, worker: Callable[..., int]) -> None:
    port = worker(MAX_CONNECTIONS="2")
    assert requests.get(f"http://127.0.0.1:{port}/health", timeout=20).status_code == 200
    with contextlib.ExitStack() as opened:
        for _ in range(2 + http_protocol.SURPLUS):
            opened.enter_context(connect(port))
        time.sleep(0.2)
        last = opened.enter_context(connect(port))
        assert read_all(last) == b""


def test_a_worker_takes_all_descriptors_it_may_have_and_no_more_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(256, 1024)]
    monkeypatch.setattr("resource.getrlimit", lambda _: limits[-1])
    monkeypatch.setattr("resource.setrlimit", lambda _, pair: limits.append(pair))
    assert room_for(4096) == 1024 - 256
    assert limits[-1] == (1024, 1024)
    assert room_for(100) == 100


# ---- slow and half-open


@pytest.mark.parametrize("path", [b"/health", b"/nowhere", b"/v1/completions"])
def test_a_body_that_drips_ends_the_connection_whoever_reads_it(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, path: bytes
) -> None:
    """Also where no handler waits for it: each byte would keep the connection alive for another minute."""
    monkeypatch.setattr(http_protocol, "MESSAGE_SECONDS", 0.6)
    with connect(stack.port) as connection:
        connection.sendall(POST % (path, 1000))
        began = time.monotonic()
        connection.settimeout(0.1)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() - began < 5:
                connection.sendall(b" ")
                with contextlib.suppress(TimeoutError):
                    if not connection.recv(1 << 16):
                        break
        assert time.monotonic() - began < 3


def test_a_second_head_on_a_connection_has_its_own_deadline(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.5)
    with connect(stack.port) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += connection.recv(1 << 16)
        connection.sendall(b"GET /health HTTP/1.1\r\nho")
        began = time.monotonic()
        assert read_all(connection) == b""
        assert time.monotonic() - began < 3


def test_a_long_answer_outlives_the_deadline_of_its_request(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "MESSAGE_SECONDS", 0.3)
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.3)
    stack.fake.reset()
    stack.fake.delay = 0.2
    answer = requests.post(f"{stack.url}/v1/completions", json={"text": "x"}, timeout=10)
    assert (answer.status_code, answer.elapsed.total_seconds() > 0.5) == (200, True)
    stack.fake.reset()


def test_a_peer_that_is_gone_without_a_word_is_noticed(stack: Stack) -> None:
    """TCP keepalive on every connection, and a bound on what the kernel buffers for one that does not read."""
    with connect(stack.port) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        connection.recv(1 << 16)
        (protocol,) = [one for one in stack.server.server_state.connections if one.client == connection.getsockname()]
        theirs = protocol.transport.get_extra_info("socket")
        assert theirs.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        seconds = sum(
            theirs.getsockopt(socket.IPPROTO_TCP, option) * times
            for option, times in ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 4))
        )
        assert seconds <= 120
        assert theirs.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 2 * http_protocol.SEND_BUFFER_BYTES


@pytest.mark.parametrize("raw", [b"\x16\x03\x01\x02\x00", b"GET / HTTP/9.9\r\n\r\n", b"GET http://[ HTTP/1.1\r\n\r\n"])
def test_what_is_not_http_is_400_in_json(stack: Stack, raw: bytes) -> None:
    with connect(stack.port) as connection:
        connection.sendall(raw)
        status, body = answer_of(read_all(connection))
    assert (status, body["error_code"]) == (400, 400)


# ---- every limit names its field

TOO_MUCH = {
    "messages": ({"messages": [{"role": "user", "content": "x"}] * 4097}, "4097", "4096"),
    "stop": ({"text": "x", "stop": ["a"] * 17}, "17", "16"),
    "logit_bias": ({"text": "x", "logit_bias": {str(key): 1 for key in range(1025)}}, "1025", "1024"),
    "n": ({"text": "x", "n": 129, "stream": True}, "129", "128"),
    "max_dec_len": ({"text": "x", "max_dec_len": 65}, "65", "MAX_DEC_LEN (64)"),
    "input_ids": ({"input_ids": [5] * 1025}, "1025", "MAX_SEQ_LEN (1024)"),
    "text": ({"text": "so many words " * 2000}, "tokens", "MAX_SEQ_LEN (1024)"),
    "timeout": ({"text": "x", "timeout": 100_000}, "100000", "86400"),
    "eos_token_ids": ({"text": "x", "eos_token_ids": [1] * 65}, "65", "64"),
    "chat_template_kwargs": ({"text": "x", "chat_template_kwargs": {f"k{k}": 1 for k in range(17)}}, "17", "16"),
    "req_id": ({"text": "x", "req_id": "r" * 257}, "257", "256"),
    "logprobs": ({"text": "x", "logprobs": 21}, "21", "20"),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_a_limit_names_the_field_and_itself(fuzzed, name: str) -> None:
    body, given, limit = TOO_MUCH[name]
    answer = requests.post(f"{fuzzed.gateway}/v1/chat/completions", json=body, timeout=20)
    error = answer.json()
    assert (answer.status_code, error["error_field"]) == (400, name), error
    assert given in error["error_msg"]
    assert limit in error["error_msg"]


def test_depth_and_size_name_their_limits(fuzzed) -> None:
    url = f"{fuzzed.gateway}/v1/chat/completions"
    deep = requests.post(url, data=b'{"text":' + b"[" * 100 + b"]" * 100 + b"}", timeout=20)
    assert (deep.status_code, "deeper than 64 levels" in deep.json()["error_msg"]) == (400, True)
    large = requests.post(url, data=b'{"text": "' + b"x" * (5 << 20) + b'"}', timeout=20)
    assert (large.status_code, "MAX_BODY_BYTES" in large.json()["error_msg"]) == (413, True)


def test_a_full_queue_is_429_and_the_wait_counts_to_the_deadline(tmp_path: Path) -> None:
    """One runs, one waits until its time is over, the third is refused at once."""
    from chaos.conftest import start
    from server.conftest import make_server

    server = make_server(tmp_path, BATCH_SIZE="1", MAX_CACHED_TASK_NUM="1", MAX_DEC_LEN="8000")
    victim = start(server)
    try:
        url = f"{server.gateway}/v1/chat/completions"
        long = {"text": "x", "max_dec_len": 7900, "min_dec_len": 7900, "ignore_eos": True, "stream": True}
        with requests.post(url, json={**long, "req_id": "runs"}, stream=True, timeout=60) as runs:
            assert runs.status_code == 200
            lines = runs.iter_lines()  # kept: the connection ends with it
            next(lines)
            began = time.monotonic()
            with connect(server.port("PUSH_MODE_HTTP_PORT")) as waits:
                body = json.dumps({"text": "x", "timeout": 1.5}).encode()
                waits.sendall(POST % (b"/v1/completions", len(body)) + body)
                time.sleep(0.5)
                refused = requests.post(url, json={"text": "x"}, timeout=10)
                assert refused.status_code == 429, refused.text
                assert refused.headers["retry-after"] == "1"
                assert "MAX_CACHED_TASK_NUM 1" in refused.json()["error_msg"]
                assert b" 408 " in waits.recv(1 << 16).split(b"\r\n")[0]
                assert 1.0 < time.monotonic() - began < 4
    finally:
        victim.close()
        assert server.script("stop_server.sh").returncode == 0


# ---- what a worker says to its parent


def test_a_worker_says_whether_it_reaches_the_model_server(stack: Stack) -> None:
    """+ while it does, - as soon as it does not, + again by itself."""
    read, write = os.pipe2(os.O_NONBLOCK)

    def said() -> bytes:
        with contextlib.suppress(BlockingIOError):
            return os.read(read, 4096)
        return b""

    with running() as own, socket.create_server(("127.0.0.1", 0)) as listener:
        command = [sys.executable, "-m", "octavo.gateway", "--fd", str(listener.fileno()), "--beat", str(write)]
        env = environ(own, listener.getsockname()[1])
        process = subprocess.Popen(command, env=env, pass_fds=[listener.fileno(), write], stderr=subprocess.DEVNULL)
        try:
            until(lambda: b"+" in said(), 20)
            own.run(own.fake.stop())
            until(lambda: b"-" in said(), 5)
            own.run(own.fake.start())
            until(lambda: b"+" in said(), 5)
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(15) == 0
            os.close(read)
            os.close(write)
