"""Who was running when engines died is tried alone. The real front end, with engines that die on command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from frontend.conftest import House as Front
from frontend.conftest import wait_for

TOKENS = 40


@pytest.fixture
def front(tmp_path: Path) -> Iterator[Front]:
    made = Front(tmp_path / "run")
    yield made
    made.close()


def die_and_replace(front: Front, *, rate: float = 200.0) -> None:
    front.engines[-1].die()
    wait_for(lambda: front.op("info")["state"] == "down")
    front.engine(rate=rate)
    wait_for(lambda: bool(front.engines[-1].submitted))


def test_after_two_deaths_each_runs_alone_for_a_few_tokens_and_then_all_go_on(front: Front) -> None:
    front.ready(rate=200)
    expected = front.ask(text="hi", req_id="x", infer_seed=9, max_dec_len=TOKENS)[-1]["tokens_all"]
    inboxes = [front.send(text="hi", req_id=f"r{k}", infer_seed=9, max_dec_len=TOKENS) for k in range(4)]
    wait_for(lambda: len(front.engines[0].submitted) == 5)
    die_and_replace(front)
    assert len(front.engines[1].submitted) == 4
    die_and_replace(front, rate=20)
    assert len(front.engines[2].submitted) == 1, "the first suspect is alone"
    late = front.send(text="hi", req_id="late", infer_seed=9, max_dec_len=TOKENS)
    assert len(front.engines[2].submitted) == 1, "and nobody joins it"
    front.engines[2].rate = 500
    for inbox in [*inboxes, late]:
        assert inbox.all()[-1]["tokens_all"] == expected


def test_the_third_death_ends_only_the_one_that_was_alone(front: Front) -> None:
    front.ready(rate=200)
    inboxes = [front.send(text="hi", req_id=f"r{k}", max_dec_len=TOKENS, min_dec_len=TOKENS) for k in range(4)]
    wait_for(lambda: len(front.engines[0].submitted) == 4)
    die_and_replace(front)
    die_and_replace(front, rate=0.5)
    die_and_replace(front, rate=500)
    lasts = [inbox.all()[-1] for inbox in inboxes]
    assert (lasts[0]["error_code"], lasts[0]["error_msg"]) == (500, "the engine failed again and again on this request")
    assert [last["tokens_all_num"] for last in lasts[1:]] == [TOKENS] * 3


def test_a_suspect_that_is_aborted_makes_way(front: Front) -> None:
    front.ready(rate=200)
    inboxes = [front.send(text="hi", req_id=f"r{k}", max_dec_len=TOKENS, min_dec_len=TOKENS) for k in range(2)]
    wait_for(lambda: len(front.engines[0].submitted) == 2)
    die_and_replace(front)
    die_and_replace(front, rate=0.5)
    front.op("abort", req_id="r0")
    front.engines[-1].rate = 500
    assert inboxes[0].all()[-1]["finish_reason"] == "cancelled"
    assert inboxes[1].all()[-1]["tokens_all_num"] == TOKENS


def test_a_lost_link_to_a_living_engine_is_no_death(front: Front) -> None:
    front.ready(rate=20)
    inbox = front.send(text="hi", req_id="a", max_dec_len=200, min_dec_len=200)
    inbox.next()
    front.engines[0].faults.stalled = True
    wait_for(lambda: front.op("info")["state"] == "down", timeout=6)
    front.engines[0].faults.stalled = False
    wait_for(lambda: front.op("info")["state"] == "ready")
    (state,) = front.frontend.registry.all_requests()
    assert [sequence.num_deaths for sequence in state.sequences] == [0]


def test_who_was_accepted_may_come_back_while_the_server_drains(front: Front) -> None:
    front.ready(rate=200)
    front.op("drain")
    (refused,) = front.ask(text="hi", req_id="new")
    assert refused["error_code"] == 503
    back = front.ask(text="hi", req_id="back", resume_inside=True, attempt=1, max_dec_len=4)
    assert back[-1]["is_end"] == 1


def test_the_end_of_a_drain_ends_everything_with_the_reason(front: Front) -> None:
    front.ready(rate=20)
    inbox = front.send(text="hi", req_id="a", max_dec_len=400)
    inbox.next()
    front.op("drain", end=True, reason="the server gives up: no luck")
    last = inbox.all()[-1]
    assert (last["error_code"], last["error_msg"]) == (503, "the server gives up: no luck")
    (back,) = front.ask(text="hi", req_id="back", resume_inside=True, attempt=1)
    assert (back["error_code"], back["error_msg"]) == (503, "the server gives up: no luck")


def test_only_users_requests_that_end_well_count_as_served(front: Front) -> None:
    front.ready(rate=50)
    front.ask(text="hi", req_id="proof", owner="node", max_dec_len=1)
    inbox = front.send(text="hi", req_id="gone", max_dec_len=400)
    inbox.next()
    front.op("abort", req_id="gone")
    inbox.all()
    assert front.op("info")["frontend"]["finished"] == 0
    front.ask(text="hi", req_id="user", max_dec_len=1)
    assert front.op("info")["frontend"]["finished"] == 1
