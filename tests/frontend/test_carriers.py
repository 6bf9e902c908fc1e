"""Carriers: many requests answered on one stream, each message as it would be on a stream of its own."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import msgspec
import pytest

from frontend.conftest import House, Inbox, wait_for
from octavo.frontend import carriers, compose
from octavo.protocol.carrier import Carried, carried_decoder


class Stream:
    """The carrier's own sink: what was sent, batch by batch."""

    def __init__(self) -> None:
        self.batches: list[list[Carried]] = []
        self.num_finals = 0
        self.last_word: dict[str, Any] | None = None
        self.gone = threading.Event()

    def send(self, payload: bytes, final: bool) -> None:
        assert not self.num_finals, "a message after the final one"
        self.num_finals += final
        if payload.startswith(b"{"):
            self.last_word = json.loads(payload)
        elif payload:
            self.batches.append(carried_decoder().decode(payload))

    def cancelled(self) -> bool:
        return self.gone.is_set()

    def of(self, tag: int) -> list[Carried]:
        return [message for batch in list(self.batches) for message in batch if message.tag == tag]

    def whole(self, tag: int) -> list[dict[str, Any]]:
        """Every message of a request, as a stream of its own would have it."""
        out: list[dict[str, Any]] = []
        for message in self.of(tag):
            if message.whole:
                value = json.loads(message.whole)
                out.append(value[0] if isinstance(value, list) else value)
            else:
                same = {name: out[0][name] for name in ("req_id", "infer_seed")}
                said = {"token": message.token, "token_ids": message.token_ids, "send_idx": message.send_idx}
                out.append({**same, **said, "is_end": 0})
        return out

    def has_ended(self, tag: int) -> bool:
        messages = self.whole(tag)
        return bool(messages) and (messages[-1].get("is_end") == 1 or "error_msg" in messages[-1])


class Orders:
    """Sends orders as a gateway worker does; each is a Triton request of its own, kept in `inboxes`."""

    def __init__(self, house: House, name: str = "c") -> None:
        self._house, self._name = house, name
        self.inboxes: list[RawInbox] = []
        self.stream = Stream()
        house.frontend.submit(self._order("open"), "", self.stream)

    def _order(self, op: str, tag: int = 0, body: dict[str, Any] | None = None) -> bytes:
        order = {"carrier": self._name, "op": op, "tag": tag} | ({} if body is None else {"body": body})
        return msgspec.json.encode(order)

    def send(self, op: str, tag: int = 0, **body: Any) -> None:
        self.inboxes.append(RawInbox())
        self._house.frontend.submit(self._order(op, tag, body or None), "", self.inboxes[-1])

    def run(self, tag: int, **body: Any) -> None:
        self.send("carry", tag, **{"req_id": f"r{tag}", "text": "x", "infer_seed": 7, **body})


class RawInbox:
    def __init__(self) -> None:
        self.sent: list[tuple[bytes, bool]] = []

    def send(self, payload: bytes, final: bool) -> None:
        self.sent.append((payload, final))

    def cancelled(self) -> bool:
        return False


def test_a_carried_request_says_what_a_request_of_its_own_says(house: House) -> None:
    house.ready(rate=2000.0)
    body = {"max_dec_len": 40, "topp": 0.5, "return_all_tokens": True}
    alone = house.ask(req_id="r1", text="x", infer_seed=7, **body)
    orders = Orders(house)
    orders.run(1, **body)
    wait_for(lambda: orders.stream.has_ended(1))
    messages = orders.stream.whole(1)
    assert messages[-1] == alone[-1] | {"send_idx": messages[-1]["send_idx"], "token": messages[-1]["token"],
                                        "token_ids": messages[-1]["token_ids"]}
    assert [one["send_idx"] for one in messages] == list(range(len(messages)))
    assert "".join(one["token"] for one in messages) == alone[-1]["tokens_all"]
    assert [token for one in messages for token in one["token_ids"]] == alone[-1]["tokens_all_ids"]
    assert [bool(one.whole) for one in orders.stream.of(1)] == [True] + [False] * (len(messages) - 2) + [True]
    assert orders.inboxes[0].sent == [(b"", True)], "the order's own stream ends without a word"


def test_choices_and_log_probabilities_are_carried_whole(house: House) -> None:
    house.ready(rate=2000.0)
    orders = Orders(house)
    orders.run(1, n=2, max_dec_len=6)
    orders.run(2, logprobs=1, max_dec_len=6)
    wait_for(lambda: orders.stream.has_ended(2) and sum(one["is_end"] for one in orders.stream.whole(1)) == 2)
    assert all(message.whole for tag in (1, 2) for message in orders.stream.of(tag))
    assert {one["index"] for one in orders.stream.whole(1)} == {0, 1}
    assert all(len(one["logprobs"]) == len(one["token_ids"]) for one in orders.stream.whole(2))


def test_many_requests_share_batches_and_each_ends_once(house: House) -> None:
    house.ready(rate=4000.0)
    orders = Orders(house)
    for tag in range(1, 9):
        orders.run(tag, max_dec_len=100)
    wait_for(lambda: all(orders.stream.has_ended(tag) for tag in range(1, 9)))
    for tag in range(1, 9):
        messages = orders.stream.whole(tag)
        assert sum(one["is_end"] for one in messages) == 1
        assert messages[-1]["tokens_all_num"] == 100
    assert len(orders.stream.batches) < sum(map(len, orders.stream.batches)) / 4


def test_a_refusal_is_carried_too(house: House) -> None:
    house.ready()
    orders = Orders(house)
    orders.run(1, topp=9)
    wait_for(lambda: orders.stream.has_ended(1))
    assert (orders.stream.whole(1)[0]["error_code"], orders.stream.whole(1)[0]["req_id"]) == (400, "r1")


def test_a_paused_request_keeps_its_tokens_and_others_go_on(house: House) -> None:
    house.ready(rate=1000.0)
    orders = Orders(house)
    orders.run(1, max_dec_len=500)
    orders.run(2, max_dec_len=500)
    wait_for(lambda: len(orders.stream.of(1)) > 3)
    orders.send("pause", 1)
    time.sleep(0.05)
    at_pause, others = len(orders.stream.of(1)), len(orders.stream.of(2))
    time.sleep(0.2)
    assert len(orders.stream.of(1)) == at_pause
    assert len(orders.stream.of(2)) > others
    orders.send("resume", 1)
    wait_for(lambda: len(orders.stream.of(1)) > at_pause)
    late = orders.stream.of(1)[at_pause]
    assert len(late.token_ids) > 20, "all that waited comes in one message"
    wait_for(lambda: orders.stream.has_ended(1))
    messages = orders.stream.whole(1)
    assert "".join(one["token"] for one in messages) == messages[-1]["tokens_all"]


def held_end(house: House, orders: Orders, **body: Any) -> None:
    """Request 1 is paused and, at the engine, over."""
    orders.run(1, **body)
    wait_for(lambda: orders.stream.of(1))
    orders.send("pause", 1)
    wait_for(lambda: house.op("info")["frontend"]["unread"] == 1)


def read_on(orders: Orders, *, n: int = 1) -> list[dict[str, Any]]:
    """Ask for piece after piece until all choices of the request have ended."""
    read = len(orders.stream.of(1))
    while sum(one["is_end"] for one in orders.stream.whole(1)) < n:
        orders.send("resume", 1)
        wait_for(lambda so_far=read: len(orders.stream.of(1)) > so_far)
        read = len(orders.stream.of(1))
    return orders.stream.whole(1)


def test_the_end_of_a_paused_request_waits_for_its_reader(house: House) -> None:
    house.ready(rate=1000.0)
    orders = Orders(house)
    held_end(house, orders, max_dec_len=100)
    said = len(orders.stream.of(1))
    time.sleep(0.2)
    assert len(orders.stream.of(1)) == said, "nothing leaves"
    orders.send("resume", 1)
    wait_for(lambda: orders.stream.has_ended(1))
    messages = orders.stream.whole(1)
    assert messages[-1]["tokens_all_num"] == 100
    assert "".join(one["token"] for one in messages) == messages[-1]["tokens_all"]
    wait_for(lambda: house.op("info")["frontend"]["unread"] == 0)


@pytest.mark.parametrize("body", [{}, {"logprobs": 3}, {"stop": ["never said"]}, {"logprobs": 1, "n": 2}, {"n": 5}])
def test_what_was_held_back_comes_in_pieces(house: House, monkeypatch: pytest.MonkeyPatch,
                                            body: dict[str, Any]) -> None:
    monkeypatch.setattr(compose, "PIECE_BYTES", 1500)
    house.ready(rate=3000.0)
    alone = house.ask(req_id="r0", text="x", infer_seed=7, max_dec_len=400, return_all_tokens=True, **body)
    orders = Orders(house)
    held_end(house, orders, max_dec_len=400, return_all_tokens=True, **body)
    messages = read_on(orders, n=body.get("n", 1))
    pieces = [message for message in orders.stream.of(1) if message.more]
    assert len(pieces) >= 2 * body.get("n", 1)
    assert all(len(message.whole) < 4000 for message in pieces)
    for index in range(body.get("n", 1)):
        said, there = ([one for one in every if one.get("index", 0) == index] for every in (messages, alone))
        assert sum(one["is_end"] for one in said) == 1
        for name in ("tokens_all", "tokens_all_ids", "usage", "finish_reason"):
            assert said[-1][name] == there[-1][name]
        assert [one["send_idx"] for one in said] == list(range(len(said)))
        assert [token for one in said for token in one["token_ids"]] == there[-1]["tokens_all_ids"]
        if "logprobs" in body:
            assert [entry for one in said for entry in one["logprobs"]] == [
                entry for one in there for entry in one["logprobs"]
            ]


def test_a_reader_that_has_caught_up_gets_each_message_again(house: House) -> None:
    house.ready(rate=500.0)
    orders = Orders(house)
    orders.run(1, max_dec_len=500)
    wait_for(lambda: orders.stream.of(1))
    orders.send("pause", 1)
    orders.send("resume", 1)
    wait_for(lambda: len(orders.stream.of(1)) > 100)
    assert not any(message.more for message in orders.stream.of(1))


def test_a_reader_that_leaves_what_is_held_ends_it(house: House) -> None:
    house.ready(rate=1000.0)
    orders = Orders(house)
    held_end(house, orders, max_dec_len=50)
    assert house.op("abort", req_id="r1")["aborted"] is True, "its end was not sent"
    orders.send("leave", 1)
    wait_for(lambda: house.op("info")["frontend"]["unread"] == 0)
    assert house.op("abort", req_id="r1")["aborted"] is False
    assert not orders.stream.has_ended(1)


def test_a_receiver_that_is_gone_ends_what_is_held_for_it(house: House) -> None:
    house.ready(rate=1000.0)
    orders = Orders(house)
    held_end(house, orders, max_dec_len=50)
    orders.stream.gone.set()
    wait_for(lambda: house.op("info")["frontend"]["unread"] == 0)
    check = house.ask(req_id="r1", text="x", max_dec_len=2)
    assert check[-1]["is_end"] == 1, "the name is free"


def test_what_was_generated_in_time_waits_for_its_reader_beyond(house: House) -> None:
    house.ready(rate=1000.0)
    orders = Orders(house)
    held_end(house, orders, max_dec_len=50, timeout=0.3)
    time.sleep(0.5)
    assert read_on(orders)[-1]["tokens_all_num"] == 50


def test_a_paused_request_that_takes_too_long_ends_at_once(house: House) -> None:
    house.ready(rate=100.0)
    orders = Orders(house)
    orders.run(1, max_dec_len=500, timeout=0.4)
    wait_for(lambda: orders.stream.of(1))
    orders.send("pause", 1)
    wait_for(lambda: orders.stream.has_ended(1))
    assert orders.stream.whole(1)[-1]["error_code"] == 408
    assert house.op("info")["frontend"]["unread"] == 0


def test_draining_ends_what_nobody_reads_with_503(house: House) -> None:
    house.ready(rate=1000.0)
    orders = Orders(house)
    held_end(house, orders, max_dec_len=50)
    house.op("drain", end=True)
    wait_for(lambda: orders.stream.has_ended(1))
    assert orders.stream.whole(1)[-1]["error_code"] == 503


def test_a_request_that_is_left_is_aborted_and_says_no_more(house: House) -> None:
    house.ready(rate=200.0)
    orders = Orders(house)
    orders.run(1, max_dec_len=500)
    orders.run(2, max_dec_len=500)
    wait_for(lambda: orders.stream.of(1) and orders.stream.of(2))
    orders.send("leave", 1)
    wait_for(lambda: len(house.engines[0].aborted) == 1)
    said = len(orders.stream.of(1))
    time.sleep(0.1)
    assert len(orders.stream.of(1)) == said
    assert not orders.stream.has_ended(2)
    assert house.op("abort", req_id="r1")["aborted"] is False


def test_a_request_left_before_it_was_accepted_ends(house: House) -> None:
    house.ready(rate=200.0)
    orders = Orders(house)
    orders.run(1, text="x" * 2000, max_dec_len=500)
    orders.send("leave", 1)
    wait_for(lambda: house.op("info")["frontend"]["running"] == 0 and house.frontend.registry.num_accepted == 1)


def test_a_receiver_that_is_gone_ends_its_requests_and_frees_the_stream(house: House) -> None:
    house.ready(rate=200.0)
    orders, other = Orders(house), Orders(house, "other")
    orders.run(1, max_dec_len=500)
    other.run(2, max_dec_len=100)
    wait_for(lambda: orders.stream.of(1))
    orders.stream.gone.set()
    wait_for(lambda: len(house.engines[0].aborted) == 1)
    assert orders.stream.num_finals == 1
    wait_for(lambda: other.stream.has_ended(2))
    assert other.stream.num_finals == 0


def test_an_idle_carrier_whose_receiver_is_gone_is_let_go(house: House) -> None:
    house.ready()
    orders = Orders(house)
    orders.stream.gone.set()
    wait_for(lambda: orders.stream.num_finals == 1)


def test_a_carrier_that_nobody_uses_is_ended(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens one and goes to sleep does not hold it for ever."""
    monkeypatch.setattr(carriers, "IDLE_SECONDS", 0.2)
    house.ready(rate=20.0)
    used, idle = Orders(house, name="used"), Orders(house, name="idle")
    used.run(1, max_dec_len=40)
    wait_for(lambda: idle.stream.num_finals == 1)
    wait_for(lambda: used.stream.has_ended(1))
    assert idle.stream.last_word is None
    wait_for(lambda: used.stream.num_finals == 1)


def test_end_sends_what_is_pending_first(house: House) -> None:
    house.ready()
    orders = Orders(house)
    orders.run(1, max_dec_len=3)
    wait_for(lambda: orders.stream.has_ended(1))
    orders.send("end")
    assert (orders.stream.num_finals, orders.stream.last_word) == (1, None)
    assert orders.inboxes[-1].sent == [(b"", True)]


@pytest.mark.parametrize("op", ["carry", "leave", "pause"])
def test_an_order_to_a_carrier_that_is_not_there_is_an_error(house: House, op: str) -> None:
    inbox = Inbox()
    house.frontend.submit(msgspec.json.encode({"carrier": "never", "op": op, "tag": 1, "body": {}}), "", inbox)
    assert inbox.next()["error_code"] == 400


def test_a_message_too_large_for_the_stream_ends_its_request_only(house: House, monkeypatch) -> None:
    monkeypatch.setattr(carriers, "MAX_WHOLE_BYTES", 2000)
    house.ready(rate=2000.0)
    orders = Orders(house)
    orders.run(1, max_dec_len=500, return_all_tokens=True)
    orders.run(2, max_dec_len=20)
    wait_for(lambda: orders.stream.has_ended(1) and orders.stream.has_ended(2))
    assert orders.stream.whole(1)[-1]["error_code"] == 500
    assert orders.stream.whole(2)[-1]["tokens_all_num"] == 20


def test_finalize_lets_carriers_go(house: House) -> None:
    house.ready(rate=100.0)
    orders = Orders(house)
    orders.run(1, max_dec_len=500)
    wait_for(lambda: orders.stream.of(1))
    house.close()
    assert orders.stream.whole(1)[-1]["error_code"] == 503
    assert orders.stream.num_finals == 1
    assert orders.stream.last_word is not None, "a receiver that is still there would wait for ever"


def test_a_body_too_large_is_refused_to_its_own_request(house: House) -> None:
    house.ready(rate=2000.0)
    orders = Orders(house)
    orders.run(1, max_dec_len=100)
    orders.run(2, text="y" * house.settings.max_body_bytes)
    wait_for(lambda: orders.stream.has_ended(2) and orders.stream.has_ended(1))
    assert orders.stream.whole(2)[-1]["error_code"] == 413
    assert orders.stream.whole(1)[-1]["tokens_all_num"] == 100
    assert not orders.stream.num_finals
    assert orders.inboxes[-1].sent == [(b"", True)]


def test_a_name_that_is_taken_is_not_opened_again(house: House) -> None:
    house.ready(rate=2000.0)
    orders, other = Orders(house), Orders(house)
    assert (other.stream.num_finals, other.stream.last_word and other.stream.last_word["error_code"]) == (1, 400)
    orders.run(1, max_dec_len=5)
    wait_for(lambda: orders.stream.has_ended(1))


def test_carriers_are_bounded(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carriers, "MAX_CARRIERS", 3)
    opened = [Orders(house, name=f"c{number}") for number in range(5)]
    assert [each.stream.num_finals for each in opened] == [0, 0, 0, 1, 1]


class Broken(Stream):
    """Fails in a way that nobody foresaw."""

    def send(self, payload: bytes, final: bool) -> None:
        if payload and not payload.startswith(b"{"):
            raise RuntimeError("no room")
        super().send(payload, final)


def test_a_stream_that_fails_otherwise_harms_no_other(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.ready(rate=2000.0)
    with monkeypatch.context() as patch:
        patch.setattr(__name__ + ".Stream", Broken)
        bad = Orders(house, name="bad")
    good = Orders(house)
    bad.run(1, max_dec_len=5)
    good.run(2, max_dec_len=30)
    wait_for(lambda: good.stream.has_ended(2) and bad.stream.num_finals == 1)
    assert good.stream.whole(2)[-1]["tokens_all_num"] == 30
    assert bad.stream.last_word is not None
    assert bad.stream.last_word["error_code"] == 503
