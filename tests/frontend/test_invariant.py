"""Whatever happens, every request ends exactly once, its stream has no gap, and nothing is left behind."""

from __future__ import annotations

import random
import time

import pytest

from frontend.conftest import House, wait_for
from frontend.test_carriers import Orders
from octavo.frontend import compose


def test_every_request_ends_once(house: House) -> None:
    """Cancellations, aborts, timeouts, stops, choices, overload and engine deaths in a random mix."""
    rng = random.Random(7)
    house.environ |= {"BATCH_SIZE": "16", "MAX_CACHED_TASK_NUM": "40"}
    house.ready(rate=6000, tokens_per_step=2)
    inboxes = []
    for k in range(240):
        body = {"text": "hi" * rng.randint(1, 9), "req_id": f"r{k % 200}", "max_dec_len": rng.randint(1, 60)}
        if rng.random() < 0.2:
            body["n"] = rng.randint(2, 4)
        if rng.random() < 0.3:
            body["stop"] = rng.choice(["A", "zz", ["q", "Q"]])
        if rng.random() < 0.1:
            body["timeout"] = 0.05
        if rng.random() < 0.5:
            body["tenant"] = rng.choice(["a", "b", "c"])
        inbox = house.send(**body)
        inboxes.append((body, inbox))
        if rng.random() < 0.1:
            inbox.gone.set()
        if rng.random() < 0.1:
            house.op("abort", req_id=f"r{rng.randint(0, k)}")
        if k in (80, 160):
            house.engines[-1].die()
            house.engine(rate=6000, tokens_per_step=2)
        time.sleep(rng.random() * 0.01)
    ends = [check(body, inbox.all()) for body, inbox in inboxes]
    assert {"length", "stop", "cancelled"} <= set(ends)
    check_nothing_is_left(house)


def test_every_carried_request_ends_once_however_it_is_read(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers that pause, come back, leave or stay away for long, while engines die; pieces are small."""
    monkeypatch.setattr(compose, "PIECE_BYTES", 300)
    rng = random.Random(11)
    house.environ |= {"BATCH_SIZE": "16", "MAX_CACHED_TASK_NUM": "200"}
    house.ready(rate=6000, tokens_per_step=2)
    orders = Orders(house)
    bodies: dict[int, dict] = {}
    left: set[int] = set()
    for tag in range(1, 121):
        bodies[tag] = {"max_dec_len": rng.randint(1, 200), "n": rng.choice([1, 1, 1, 3])}
        if rng.random() < 0.5:
            bodies[tag]["timeout"] = 0.1
        if rng.random() < 0.3:
            bodies[tag]["logprobs"] = 2
        orders.run(tag, **bodies[tag])
        for op in rng.choices(["pause", "resume", "pause", "leave", "abort"], weights=[4, 3, 3, 1, 1], k=4):
            about = rng.randint(1, tag)
            if op == "abort":
                house.op("abort", req_id=f"r{about}")
            else:
                orders.send(op, about)
                left |= {about} if op == "leave" else set()
        if tag in (40, 80):
            house.engines[-1].die()
            house.engine(rate=6000, tokens_per_step=2)
        time.sleep(rng.random() * 0.01)
    waiting = set(bodies) - left
    end = time.monotonic() + 30
    while waiting := {tag for tag in waiting if not is_over(orders, tag, bodies[tag])}:
        assert time.monotonic() < end, waiting
        for tag in waiting:
            orders.send("resume", tag)
        time.sleep(0.01)
    check_nothing_is_left(house)
    assert sum(message.more for batch in orders.stream.batches for message in batch) > 20, "there were pieces"
    ends = {check(bodies[tag], orders.stream.whole(tag)) for tag in bodies if tag not in left}
    assert {"length", 408} <= ends


def is_over(orders: Orders, tag: int, body: dict) -> bool:
    messages = orders.stream.whole(tag)
    return bool(messages) and ("error_code" in messages[-1] or sum(one["is_end"] for one in messages) == body["n"])


def check_nothing_is_left(house: House) -> None:
    registry = house.frontend.registry
    wait_for(lambda: registry.counts() == (0, 0))
    wait_for(lambda: not registry.all_requests())
    bound = registry._bound
    assert (bound._num_all, bound._num_unstarted, dict(bound._unstarted)) == (0, 0, {})
    assert not registry._owner
    assert not registry._by_req_id


def check(body: dict, messages: list[dict]) -> str | int:
    """The rules for one stream; how it ended."""
    for index in range(body.get("n", 1)):
        own = [message for message in messages if "send_idx" in message and message.get("index", 0) == index]
        assert [message["send_idx"] for message in own] == list(range(len(own)))
        assert all(message["is_end"] == 0 for message in own[:-1])
    last = messages[-1]
    if "error_code" in last:
        assert last["error_code"] in (408, 409, 429)
        return last["error_code"]
    ends = [message for message in messages if message["is_end"]]
    assert len(ends) == body.get("n", 1)
    for end in ends:
        own = [message for message in messages if message.get("index", 0) == end.get("index", 0)]
        assert "".join(message["token"] for message in own) == end["tokens_all"]
        assert sum(len(message["token_ids"]) for message in own) == end["tokens_all_num"] <= body["max_dec_len"]
    return last["finish_reason"]
