"""One stream carries all requests of a worker: they share it, and nothing else."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from gateway.conftest import Stack, until
from gateway.fake_triton import WORDS
from octavo.gateway import carrier, upstream
from octavo.protocol.carrier import Carried
from octavo.protocol.errors import RequestTimeout


def ops(stack: Stack) -> list[str]:
    return [order["op"] for order in stack.fake.orders]


def lines(stack: Stack, **body: object) -> list[dict]:
    answer = requests.post(f"{stack.url}/v1/completions", json={"text": "x", "stream": True, **body}, timeout=20)
    assert answer.status_code == 200
    return [json.loads(line) for line in answer.text.splitlines()]


def test_requests_share_one_stream_and_have_a_tag_each(make_stack) -> None:
    stack = make_stack()
    stack.fake.delay = 0.05
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: lines(stack, req_id=str(number)), range(8)))
    assert [[one["token"] for one in said] for said in answers] == [WORDS] * 8
    assert [[one["req_id"] for one in said] for said in answers] == [[str(at)] * 6 for at in range(8)]
    assert ops(stack).count("open") == 1
    assert len({order["tag"] for order in stack.fake.orders if order["op"] == "carry"}) == 8


def test_an_idle_stream_is_closed_and_the_next_request_opens_another(make_stack, monkeypatch) -> None:
    monkeypatch.setattr(carrier, "IDLE_SECONDS", 0.1)
    stack = make_stack()
    lines(stack)
    until(lambda: "end" in ops(stack))
    assert len(lines(stack)) == len(WORDS)
    assert ops(stack)[:4] == ["open", "carry", "end", "open"]
    assert stack.fake.cancelled == []


def test_a_stream_is_not_closed_under_a_request(make_stack, monkeypatch) -> None:
    monkeypatch.setattr(carrier, "IDLE_SECONDS", 0.1)
    stack = make_stack()
    lines(stack)
    stack.fake.delay = 0.1
    assert [one["token"] for one in lines(stack)] == WORDS
    assert ops(stack)[:3] == ["open", "carry", "carry"]


def test_a_worker_that_ends_asks_for_the_end_of_its_stream(make_stack) -> None:
    stack = make_stack()
    lines(stack)
    stack.run(stack._stop())
    assert ops(stack)[-1] == "end"
    stack._stop = lambda: stack.fake.stop()  # the rest of what close() does


def test_a_stream_that_has_carried_enough_is_replaced_without_harm(make_stack, monkeypatch) -> None:
    """Triton keeps every response of a stream until it ends."""
    monkeypatch.setattr(carrier, "WORN_BYTES", 3000)
    stack = make_stack()
    stack.fake.words, stack.fake.delay = ["a"] * 40, 0.02
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(lines, stack, req_id="long")
        until(lambda: stack.fake.requests)
        time.sleep(0.4)
        assert len(lines(stack, max_dec_len=3)) == 3
        assert "end" not in ops(stack), "the first stream still has a request"
        assert [one["send_idx"] for one in long.result()] == list(range(40))
    until(lambda: "end" in ops(stack))
    assert ops(stack).count("open") == 2
    first = stack.fake.orders[0]["carrier"]
    assert [order["op"] for order in stack.fake.orders if order["carrier"] == first] == ["open", "carry", "end"]


def test_every_request_goes_on_when_the_stream_breaks(make_stack) -> None:
    stack = make_stack()
    stack.fake.delay = 0.05
    stack.fake.breaks = [3]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda number: lines(stack, req_id=str(number)), range(4)))
    for said in answers:
        assert [one["token"] for one in said] == WORDS
        assert [one["send_idx"] for one in said] == list(range(6))
    assert ops(stack).count("open") == 2
    assert sum(request.get("attempt", 0) for request in stack.fake.requests) == 4


def test_a_front_end_that_has_lost_the_stream_gets_another_one(make_stack) -> None:
    """As after a restart of the model behind a Triton that went on: orders are answered with an error."""
    stack = make_stack()
    lines(stack)
    stack.fake.lost_carriers = 1
    assert [one["token"] for one in lines(stack)] == WORDS
    assert ops(stack).count("open") == 2


def test_who_leaves_is_taken_off_the_stream_and_others_stay(stack: Stack) -> None:
    stack.fake.words, stack.fake.delay = ["a"] * 30, 0.05
    others: list[list[dict]] = []
    reader = threading.Thread(target=lambda: others.append(lines(stack, req_id="stays")))
    reader.start()
    until(lambda: stack.fake.requests)
    body = json.dumps({"text": "x", "req_id": "leaves", "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", stack.port), timeout=10) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
        connection.sendall(head + body)
        connection.recv(100)
    until(lambda: stack.fake.cancelled == ["leaves"])
    reader.join(20)
    assert len(others[0]) == 30
    (left,) = [order for order in stack.fake.orders if order["op"] == "leave"]
    assert [
        order["body"]["req_id"] for order in stack.fake.orders if order.get("tag") == left["tag"] and "body" in order
    ] == ["leaves"]


def test_a_reader_that_is_behind_has_its_request_paused_and_loses_nothing(make_stack) -> None:
    stack = make_stack()
    stack.fake.words = ["word " * 200] * 4000
    body = json.dumps({"text": "x", "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", stack.port), timeout=20) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        slow.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        )
        slow.sendall(body)
        until(lambda: "pause" in ops(stack))
        time.sleep(0.2)
        assert ops(stack).count("resume") < 20, "it is not read"
        received = b""
        while part := slow.recv(1 << 20):
            received += part
    said = [json.loads(line) for line in received.splitlines() if line.startswith(b"{")]
    assert [one["send_idx"] for one in said] == list(range(4000))
    assert said[-1]["is_end"] == 1
    assert "resume" in ops(stack)


def test_a_request_too_large_for_the_stream_fails_alone(make_stack, monkeypatch) -> None:
    monkeypatch.setattr(upstream, "ORDER_BYTES", (64 << 20) - 2000)
    stack = make_stack()
    stack.fake.delay = 0.05
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(lines, stack)
        until(lambda: stack.fake.requests)
        answer = requests.post(f"{stack.url}/v1/completions", json={"text": "x" * 3000}, timeout=10)
        assert answer.status_code == 500
        assert [one["token"] for one in good.result()] == WORDS
    assert ops(stack).count("open") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_whose_time_is_over_is_taken_off_the_stream(make_stack, monkeypatch, stream: bool) -> None:
    monkeypatch.setattr(upstream, "DEADLINE_MARGIN", 0.1)
    stack = make_stack()
    stack.fake.first_delay = 30.0
    body = {"text": "x", "timeout": 0.2, "stream": stream}
    answer = requests.post(f"{stack.url}/v1/completions", json=body, timeout=10)
    assert answer.status_code == 408
    until(lambda: "leave" in ops(stack))


class Orders:
    """Stands for a carrier: what its mailboxes ask of it."""

    def __init__(self) -> None:
        self.given: list[tuple[str, int]] = []

    def order(self, op: str, tag: int) -> None:
        self.given.append((op, tag))


def mailbox() -> tuple[carrier.Mailbox, list[tuple[str, int]]]:
    orders = Orders()
    return carrier.Mailbox(orders, 1), orders.given  # type: ignore[arg-type]


async def test_a_piece_is_followed_by_the_next_one_once_it_is_taken() -> None:
    box, orders = mailbox()
    for number in range(3):
        box.put([Carried(1, whole=b"x", more=True)])
        assert orders == [("resume", 1)] * number, "not before it is taken"
        assert len(await box.take()) == 1
    box.put([Carried(1, whole=b"last")])
    assert (await box.take())[0].whole == b"last"
    assert orders == [("resume", 1)] * 3


async def test_a_reader_that_waits_for_a_piece_asks_for_the_next_one() -> None:
    box, orders = mailbox()
    taking = asyncio.ensure_future(box.take())
    await asyncio.sleep(0)
    box.put([Carried(1, whole=b"x", more=True)])
    assert len(await taking) == 1
    assert orders == [("resume", 1)]


async def test_the_time_of_a_request_that_waits_for_its_reader_is_not_over() -> None:
    box, _ = mailbox()
    box.put([Carried(1, whole=b"x", more=True)])
    box.expire()
    await box.take()
    box.put([Carried(1, whole=b"last")])
    assert (await box.take())[0].whole == b"last"
    box.expire()
    with pytest.raises(RequestTimeout):
        await box.take()


def test_a_slow_reader_costs_this_process_little(make_stack) -> None:
    """What a connection that is not read can make the gateway take from the model."""
    stack = make_stack()
    stack.fake.words = ["word " * 50] * 4000
    body = json.dumps({"text": "x", "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", stack.port), timeout=20) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        until(lambda: "pause" in ops(stack))
        time.sleep(0.3)
        assert stack.fake.num_bytes <= 300_000, "of the million and more that it asked for"


def test_an_order_that_triton_cannot_pass_on_concerns_its_request_alone(make_stack) -> None:
    stack = make_stack()
    stack.fake.words, stack.fake.delay = ["a"] * 30, 0.03
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(lines, stack, req_id=str(number)) for number in range(3)]
        until(lambda: len(stack.fake.requests) == 3)
        stack.fake.refused_orders = ["carry"]
        said = lines(stack, req_id="unlucky")
        assert [one["send_idx"] for one in said] == list(range(30))
        assert all(len(other.result()) == 30 for other in others)
    attempts = {request["req_id"]: request.get("attempt", 0) for request in stack.fake.requests}
    assert attempts == {"0": 0, "1": 0, "2": 0, "unlucky": 1}
    assert ops(stack).count("open") == 1


def test_the_end_of_an_unlucky_request_that_stays_unlucky_is_503(make_stack) -> None:
    stack = make_stack()
    lines(stack)
    stack.fake.refused_orders = ["carry"] * 100
    answer = requests.post(f"{stack.url}/v1/completions", json={"text": "x"}, timeout=20)
    assert answer.status_code == 503
    stack.fake.refused_orders = []
    assert [one["token"] for one in lines(stack)] == WORDS


@pytest.mark.parametrize("op", ["pause", "resume"])
def test_a_pause_or_resume_that_was_lost_is_given_again(make_stack, op: str) -> None:
    stack = make_stack()
    stack.fake.words = ["word " * 200] * 1000
    stack.fake.refused_orders = [op]
    body = json.dumps({"text": "x", "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", stack.port), timeout=20) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
                     b"content-length: %d\r\n\r\n%s" % (len(body), body))
        until(lambda: "pause" in ops(stack))
        assert not stack.fake.refused_orders or op == "resume"
        received = b""
        while part := slow.recv(1 << 20):
            received += part
    said = [json.loads(line) for line in received.splitlines() if line.startswith(b"{")]
    assert [one["send_idx"] for one in said] == list(range(1000))
    assert stack.fake.refused_orders == []


def test_a_leave_that_was_lost_is_given_again(make_stack) -> None:
    stack = make_stack()
    stack.fake.words, stack.fake.delay = ["a"] * 300, 0.05
    stack.fake.refused_orders = ["leave"]
    body = json.dumps({"text": "x", "req_id": "leaves", "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", stack.port), timeout=10) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
        connection.sendall(head + body)
        connection.recv(100)
    until(lambda: "leave" in ops(stack))
    assert stack.fake.refused_orders == []
