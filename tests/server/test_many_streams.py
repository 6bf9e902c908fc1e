"""Many streams at once: complete, in order, the same bytes as alone; cancels free blocks; slow readers harm nobody."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from urllib.request import urlopen

import httpx
import pytest

from octavo_client import AsyncClient, Client, Generation, Options
from server.conftest import Server

pytestmark = pytest.mark.server

PROMPTS = ["hello, llm", "写一个故事", "List 3 countries and their capitals.", "你好!", "晚上睡不着觉怎么办？"]


def stats(server: Server) -> dict[str, int]:
    """The engine's gauges, from the health page."""
    body = json.load(urlopen(f"{server.health}/v2/health", timeout=5))
    return body["engine"]


def wait_until_idle(server: Server, *, seconds: float = 10.0) -> dict[str, int]:
    """Gauges once nothing runs and no block is held."""
    deadline = time.monotonic() + seconds
    while True:
        now = stats(server)
        if now.get("num_running", 0) == now.get("num_waiting", 0) == now.get("num_used_blocks", 0) == 0:
            return now
        assert time.monotonic() < deadline, now
        time.sleep(0.1)


def wait_for_running(server: Server, count: int) -> None:
    """The health page is polled: it may be half a second behind the stream."""
    deadline = time.monotonic() + 5.0
    while stats(server).get("num_running", 0) != count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def options_of(index: int) -> Options:
    return Options(
        infer_seed=index, temperature=1.0 + index % 3 / 2, max_dec_len=8 + 13 * index % 120, ignore_eos=index % 2 == 0
    )


async def generate_all(server: Server, count: int) -> list[Generation]:
    async with AsyncClient(server.gateway) as client:
        jobs = (client.generate(PROMPTS[index % len(PROMPTS)], options=options_of(index)) for index in range(count))
        return list(await asyncio.gather(*jobs))


def test_48_streams_of_mixed_lengths_all_finish_and_leave_no_block(server: Server) -> None:
    answers = asyncio.run(generate_all(server, 48))
    assert all(answer.finish_reason in ("stop", "length") for answer in answers)
    assert all(answer.num_resumes == 0 for answer in answers)
    wait_until_idle(server)


def test_a_request_gets_the_same_bytes_alone_as_in_a_crowd(server: Server) -> None:
    crowd = asyncio.run(generate_all(server, 24))
    with Client(server.gateway) as client:
        for index in (0, 1, 7, 13, 23):
            alone = client.generate(PROMPTS[index % len(PROMPTS)], options=options_of(index))
            assert alone.token_ids == crowd[index].token_ids
            assert alone.text == crowd[index].text


def test_the_first_line_leaves_before_the_last_token_exists(server: Server) -> None:
    body = {"text": "写一个故事", "stream": True, "max_dec_len": 4000, "ignore_eos": True}
    started = time.monotonic()
    arrivals = []
    with httpx.stream("POST", f"{server.gateway}/v1/chat/completions", json=body, timeout=60) as response:
        for _ in response.iter_lines():
            arrivals.append(time.monotonic() - started)
    assert len(arrivals) > 5  # 4000 if the sender is never behind
    assert arrivals[0] < arrivals[-1] / 4


def test_a_client_that_leaves_frees_its_blocks(server: Server) -> None:
    body = {"text": "写一个故事", "stream": True, "max_dec_len": 8000, "min_dec_len": 8000, "ignore_eos": True}
    with httpx.stream("POST", f"{server.gateway}/v1/chat/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()  # kept: dropping it would close the stream
        next(lines)
        wait_for_running(server, 1)
    wait_until_idle(server, seconds=2.0)


def test_a_client_that_leaves_an_unary_request_frees_its_blocks(server: Server) -> None:
    body = {"text": "写一个故事", "max_dec_len": 8000, "min_dec_len": 8000, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.gateway}/v1/chat/completions", json=body, timeout=0.5)
    wait_until_idle(server, seconds=2.0)


def test_abort_ends_a_request_as_cancelled(server: Server) -> None:
    last: list[dict[str, object]] = []

    def read() -> None:
        body = {"text": "写一个故事", "req_id": "to-abort", "stream": True, "max_dec_len": 8000, "ignore_eos": True}
        with httpx.stream("POST", f"{server.gateway}/v1/chat/completions", json=body, timeout=60) as response:
            last.extend(json.loads(line) for line in response.iter_lines())

    reader = threading.Thread(target=read)
    reader.start()
    time.sleep(0.3)
    answer = httpx.post(f"{server.gateway}/v1/abort", json={"req_id": "to-abort"}, timeout=10).json()
    reader.join(10)
    assert answer["aborted"] is True
    assert (last[-1]["is_end"], last[-1]["finish_reason"]) == (1, "cancelled")
    wait_until_idle(server, seconds=2.0)
    assert httpx.post(f"{server.gateway}/v1/abort", json={"req_id": "to-abort"}, timeout=10).json()["aborted"] is False


def test_a_req_id_in_flight_is_a_conflict_and_free_once_it_ends(server: Server) -> None:
    url = f"{server.gateway}/v1/chat/completions"
    body = {"text": "写一个故事", "req_id": "twice", "stream": True, "max_dec_len": 8000, "ignore_eos": True}
    with httpx.stream("POST", url, json=body, timeout=60) as response:
        lines = response.iter_lines()  # kept: dropping it would close the stream
        next(lines)
        assert httpx.post(url, json={"text": "x", "req_id": "twice"}, timeout=10).status_code == 409
    wait_until_idle(server, seconds=2.0)
    assert httpx.post(url, json={"text": "hello, llm", "req_id": "twice"}, timeout=60).status_code == 200


def test_a_client_that_does_not_read_slows_nobody(server: Server) -> None:
    body = json.dumps({"text": "写一个故事", "stream": True, "max_dec_len": 8000, "ignore_eos": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    silent = []
    for _ in range(8):
        connection = socket.create_connection(("127.0.0.1", server.port("PUSH_MODE_HTTP_PORT")))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(head.encode() + body)
        silent.append(connection)
    with Client(server.gateway) as client:
        started = time.monotonic()
        answer = client.generate("hello, llm", options=Options(max_dec_len=32))
        seconds = time.monotonic() - started
    assert answer.finish_reason in ("stop", "length")
    assert seconds < 10.0
    for connection in silent:
        connection.close()
    wait_until_idle(server)
