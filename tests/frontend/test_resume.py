"""Engine deaths, replays and resumption from outside: nothing is lost, nothing is said twice."""

from __future__ import annotations

import time

import pytest

from frontend.conftest import House, wait_for
from frontend.test_requests import END, check_stream, script


def whole_answer(house: House, **body: object) -> list[dict]:
    return house.ask(text="hi", req_id="whole", infer_seed=9, **body)


def test_requests_while_the_engine_loads_are_503(house: House) -> None:
    (error,) = house.ask(text="hi", req_id="a")
    assert error["error_code"] == 503
    engine = house.engine()
    engine.faults.loading = 0.5
    wait_for(lambda: house.op("info")["progress"] == {"stage": "weights", "fraction": 0.5})
    (error,) = house.ask(text="hi", req_id="a")
    assert error["error_msg"] == "the model is loading: weights (50%)"
    assert house.op("info")["state"] == "loading"
    engine.faults.loading = 0.0
    house.wait_ready()
    check_stream(house.ask(text="hi", req_id="a", max_dec_len=2))


def test_requests_in_flight_survive_an_engine_death(house: House) -> None:
    house.ready(rate=400)
    expected = whole_answer(house, max_dec_len=60)[-1]["tokens_all"]
    inboxes = [house.send(text="hi", req_id=f"r{k}", infer_seed=9, max_dec_len=60) for k in range(12)]
    first = inboxes[0].next()
    house.engines[0].die()
    wait_for(lambda: house.op("info")["state"] == "down")
    held = house.send(text="hi", req_id="held", infer_seed=9, max_dec_len=60)
    house.engine(rate=400)
    for inbox, seen in zip([*inboxes, held], [[first], *[[] for _ in range(12)]]):
        last = check_stream([*seen, *inbox.all()])
        assert last["tokens_all"] == expected
    assert any(submit.generated_token_ids for submit in house.engines[1].submitted)
    assert len(house.engines[1].submitted) == 13


def test_an_engine_that_ends_in_order_cancels_nothing_for_good(house: House) -> None:
    house.ready(rate=100)
    inbox = house.send(text="hi", req_id="a", infer_seed=9, max_dec_len=40)
    first = inbox.next()
    house.engines[0].end()
    house.engine()
    last = check_stream([first, *inbox.all()])
    assert (last["tokens_all_num"], last["finish_reason"]) == (40, "length")


def test_n_choices_and_stop_strings_survive_too(house: House) -> None:
    house.ready(rate=200, token_of=script("some words and STOP more", end=False))
    inbox = house.send(text="hi", req_id="a", n=2, stop="STOP")
    first = inbox.next()
    house.engines[0].die()
    house.engine(token_of=script("some words and STOP more", end=False))
    messages = [first, *inbox.all()]
    for index in range(2):
        last = check_stream([message for message in messages if message["index"] == index])
        assert (last["tokens_all"], last["finish_reason"]) == ("some words and ", "stop")


def test_a_silent_engine_counts_as_gone(house: House) -> None:
    house.ready(rate=50)
    inbox = house.send(text="hi", req_id="a", infer_seed=9, max_dec_len=30)
    first = inbox.next()
    house.engines[0].faults.stalled = True
    wait_for(lambda: house.op("info")["state"] == "down", timeout=6)
    assert "silent" in house.op("info")["reason"]
    house.engines[0].die()
    house.engine()
    assert check_stream([first, *inbox.all()])["tokens_all_num"] == 30


def test_an_engine_with_another_model_does_not_continue(house: House) -> None:
    house.ready(rate=50)
    inbox = house.send(text="hi", req_id="a")
    inbox.next()
    house.engines[0].die()
    house.engine(fingerprint="fake-2")
    error = inbox.all()[-1]
    assert (error["error_code"], error["error_msg"]) == (503, "the engine came back with another model")


def test_a_request_that_kills_engines_is_given_up(house: House) -> None:
    house.ready(rate=50)
    inbox = house.send(text="hi", req_id="a")
    inbox.next()
    for _ in range(2):
        house.engines[-1].die()
        house.engine(rate=50)
        wait_for(lambda: bool(house.engines[-1].submitted))
    house.engines[-1].die()
    house.engine(rate=50)
    assert inbox.all()[-1]["error_msg"] == "the engine failed again and again on this request"


def test_a_long_outage_is_503_for_new_requests(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.frontend.admission.HOLD_SECONDS", 0.1)
    house.ready()
    house.engines[0].die()
    wait_for(lambda: house.op("info")["state"] == "down")
    time.sleep(0.15)
    (error,) = house.ask(text="hi", req_id="a")
    assert error["error_code"] == 503
    assert error["error_msg"].startswith("the engine is down")


def test_an_engine_that_refuses_is_tried_again(house: House) -> None:
    engine = house.engine()
    engine.faults.refuse = "not now"
    wait_for(lambda: "not now" in house.op("info")["reason"])
    engine.faults.refuse = None
    house.wait_ready()


@pytest.mark.parametrize("have", [0, 1, 5, 19])
def test_resumption_from_outside_goes_on_where_it_stopped(house: House, have: int) -> None:
    house.ready(rate=2000)
    messages = whole_answer(house, max_dec_len=20)
    seen, held = [], []
    for message in messages:
        if len(held) + len(message["token_ids"]) > have:
            break
        seen.append(message)
        held += message["token_ids"]
    rest = house.ask(text="hi", req_id="whole", infer_seed=9, max_dec_len=20, generated_token_ids=held,
                     send_idx=len(seen), attempt=1, fingerprint="fake-1")
    last = check_stream([*seen, *rest])
    assert last["tokens_all"] == messages[-1]["tokens_all"]
    assert last["usage"] == messages[-1]["usage"]


def test_resumption_that_is_complete_ends_at_once(house: House) -> None:
    house.ready(end_token_ids=(END,))
    ids = list(b"abcdef")
    cases = [
        ({"max_dec_len": 6}, "length", "abcdef"),
        ({"stop": "de"}, "stop", "abc"),
        ({"eos_token_ids": [102]}, "stop", "abcde"),
    ]
    for more, reason, text in cases:
        (message,) = house.ask(text="hi", req_id="a", generated_token_ids=ids, send_idx=6, **more)
        assert (message["finish_reason"], message["tokens_all"]) == (reason, text)
        assert (message["token"], message["token_ids"], message["send_idx"]) == ("", [], 6)
    assert not house.engines[0].submitted


def test_resumption_of_choices(house: House) -> None:
    house.ready()
    messages = house.ask(text="hi", req_id="a", n=2, infer_seed=4, max_dec_len=6)
    texts = {m["index"]: m["tokens_all"] for m in messages if m["is_end"]}
    held = [list(texts[0].encode())[:6], list(texts[1].encode())[:2]]
    rest = house.ask(text="hi", req_id="a", n=2, infer_seed=4, max_dec_len=6, generated_token_ids=held,
                     send_idx=[6, 2], attempt=1)
    assert {m["index"]: m["tokens_all"] for m in rest if m["is_end"]} == texts
    assert len(house.engines[0].submitted) == 3
    (error,) = house.ask(text="hi", req_id="a", n=2, generated_token_ids=[1, 2])
    assert error["error_code"] == 400


def test_resumption_inside_skips_the_queue_bound(house: House) -> None:
    house.environ |= {"BATCH_SIZE": "1", "MAX_CACHED_TASK_NUM": "0"}
    house.ready(rate=100)
    running = house.send(text="hi", req_id="a", max_dec_len=20)
    assert house.ask(text="hi", req_id="b", generated_token_ids=[65])[-1]["error_code"] == 429
    inside = house.ask(text="hi", req_id="b", generated_token_ids=[65], resume_inside=True, max_dec_len=5)
    assert inside[-1]["tokens_all_num"] == 5
    running.all()
