"""The client's memory of a stream: resuming, duplicates, gaps, deadlines."""

from __future__ import annotations

import pytest

from octavo.protocol.errors import InvalidRequest, QueueFull, RequestTimeout, Unavailable
from octavo_client.options import Options
from octavo_client.stream_state import StreamState
from octavo_client.transport import TransportLost


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def token(index: int, *, text: str = "a", end: bool = False) -> dict[str, object]:
    message: dict[str, object] = {"token": text, "token_ids": [index + 10], "send_idx": index, "is_end": int(end)}
    if end:
        message |= {"finish_reason": "stop", "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}}
    return message


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def state(clock: Clock) -> StreamState:
    return StreamState("hi", Options(infer_seed=7, timeout=60), req_id="r", clock=clock, patience=5.0)


def test_first_request_carries_id_and_seed_but_nothing_to_resume(state: StreamState) -> None:
    body = state.request()
    assert (body["req_id"], body["infer_seed"], body["text"]) == ("r", 7, "hi")
    assert not {"generated_token_ids", "send_idx", "attempt"} & set(body)


def test_a_seed_is_drawn_when_none_is_given_so_that_a_resume_repeats_the_same_randomness(clock: Clock) -> None:
    state = StreamState("hi", Options(), req_id=None, clock=clock, patience=5.0)
    first = state.request()["infer_seed"]
    state.lost(TransportLost("gone"))
    assert state.request()["infer_seed"] == first


def test_after_a_loss_the_request_holds_what_was_received(state: StreamState, clock: Clock) -> None:
    state.feed({**token(0), "fingerprint": "f"})
    state.feed(token(1))
    clock.now += 20
    state.lost(TransportLost("gone"))
    body = state.request()
    assert body["generated_token_ids"] == [10, 11]
    assert (body["send_idx"], body["attempt"], body["fingerprint"], body["timeout"]) == (2, 1, "f", 40)


def test_a_message_seen_before_is_not_given_twice(state: StreamState) -> None:
    assert state.feed(token(0)) is not None
    assert state.feed(token(0)) is None
    assert state.result.text == "a"


def test_a_gap_is_a_loss(state: StreamState) -> None:
    with pytest.raises(TransportLost):
        state.feed(token(1))


def test_the_last_message_finishes_the_result(state: StreamState) -> None:
    state.feed(token(0))
    delta = state.feed(token(1, text="b", end=True))
    assert delta is not None
    assert delta.finish_reason == "stop"
    assert state.done
    assert (state.result.text, state.result.token_ids, state.result.finish_reason) == ("ab", [10, 11], "stop")
    assert state.result.usage is not None
    assert state.result.usage.total_tokens == 7


def test_an_error_message_raises_its_error(state: StreamState) -> None:
    with pytest.raises(InvalidRequest, match="too long"):
        state.feed({"error_msg": "too long", "error_code": 400})


@pytest.mark.parametrize("error", [InvalidRequest("no"), QueueFull("full")])
def test_what_the_server_refuses_is_not_tried_again(state: StreamState, error: InvalidRequest) -> None:
    with pytest.raises(type(error)):
        state.lost(error)


def test_delays_grow_and_patience_ends(state: StreamState, clock: Clock) -> None:
    delays = []
    for _ in range(6):
        delays.append(state.lost(Unavailable("down")))
        clock.now += 0.9
    assert delays == sorted(delays)
    assert delays[0] < delays[-1] <= 2.0
    clock.now += 1.0
    with pytest.raises(Unavailable):
        state.lost(Unavailable("down"))


def test_progress_renews_patience(state: StreamState, clock: Clock) -> None:
    state.lost(TransportLost("gone"))
    clock.now += 4.9
    state.feed(token(0))
    clock.now += 4.9
    assert state.lost(TransportLost("gone")) == pytest.approx(0.1)


def test_no_request_is_sent_when_the_time_is_up(state: StreamState, clock: Clock) -> None:
    clock.now += 61
    with pytest.raises(RequestTimeout):
        state.request()
