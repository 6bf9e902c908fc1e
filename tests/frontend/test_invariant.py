"""Whatever happens, every request ends exactly once, its stream has no gap, and nothing is left behind."""

from __future__ import annotations

import random
import time

from frontend.conftest import House, wait_for


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
    registry = house.frontend.registry
    wait_for(lambda: registry.counts() == (0, 0))
    assert not registry.all_requests()
    assert registry._num_started == 0
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
