"""Every accepted request ends once: timeouts, cancellations, aborts, duplicates, overload, drain, shutdown."""

from __future__ import annotations

import time

from frontend.conftest import House, wait_for
from frontend.test_requests import check_stream


def idle(house: House) -> bool:
    info = house.op("info")["frontend"]
    return info["running"] == info["waiting"] == 0


def test_a_timeout_is_408_and_frees_the_engine(house: House) -> None:
    house.ready(rate=20)
    messages = house.ask(text="hi", req_id="a", timeout=0.3)
    assert messages[-1]["error_code"] == 408
    assert messages[-1]["error_msg"] == "the request's time (0.3 s) is over"
    wait_for(lambda: house.engines[0].aborted == [1])
    assert idle(house)


def test_the_wait_counts_towards_the_timeout(house: House) -> None:
    house.ready()
    house.engines[0].faults.paused = True
    (error,) = house.ask(text="hi", req_id="a", timeout=0.2)
    assert error["error_code"] == 408


def test_a_receiver_that_left_ends_the_request(house: House) -> None:
    house.ready(rate=50)
    inbox = house.send(text="hi", req_id="a")
    inbox.next()
    inbox.gone.set()
    assert inbox.all()[-1]["finish_reason"] == "cancelled"
    assert idle(house)
    wait_for(lambda: house.engines[0].aborted == [1])


def test_a_waiting_request_is_cancelled_too(house: House) -> None:
    house.ready()
    house.engines[0].faults.paused = True
    inbox = house.send(text="hi", req_id="a")
    inbox.gone.set()
    last = inbox.all()[-1]
    assert (last["finish_reason"], last["tokens_all"]) == ("cancelled", "")


def test_abort_keeps_what_was_said(house: House) -> None:
    house.ready(rate=50)
    inbox = house.send(text="hi", req_id="a")
    first = inbox.next()
    assert house.op("abort", req_id="a") == {"req_id": "a", "aborted": True}
    last = check_stream([first, *inbox.all()])
    assert last["finish_reason"] == "cancelled"
    assert last["tokens_all_num"] >= 1
    assert house.op("abort", req_id="a") == {"req_id": "a", "aborted": False}


def test_an_abort_with_an_owner_ends_only_that_owners_request(house: House) -> None:
    house.ready(rate=50)
    inbox = house.send(text="hi", req_id="a", owner="first")
    first = inbox.next()
    assert house.op("abort", req_id="a", owner="second") == {"req_id": "a", "aborted": False}
    assert house.op("abort", req_id="a", owner="first") == {"req_id": "a", "aborted": True}
    assert check_stream([first, *inbox.all()])["finish_reason"] == "cancelled"


def test_a_req_id_in_flight_is_409(house: House) -> None:
    house.ready(rate=50)
    first = house.send(text="hi", req_id="a", max_dec_len=20)
    first.next()
    (error,) = house.ask(text="hi", req_id="a")
    assert error["error_code"] == 409
    assert first.all()[-1]["finish_reason"] == "length"
    check_stream(house.ask(text="hi", req_id="a", max_dec_len=2))


def test_a_higher_attempt_supersedes(house: House) -> None:
    house.ready(rate=100)
    first = house.send(text="hi", req_id="a", infer_seed=5)
    first.next()
    second = house.send(text="hi", req_id="a", infer_seed=5, attempt=1, max_dec_len=20)
    assert first.all()[-1]["error_code"] == 409
    assert check_stream(second.all())["tokens_all_num"] == 20
    assert idle(house)


def test_the_queue_bound_is_429(house: House) -> None:
    house.environ |= {"BATCH_SIZE": "2", "MAX_CACHED_TASK_NUM": "3"}
    house.ready()
    house.engines[0].faults.paused = True
    accepted = [house.send(text="hi", req_id=f"r{k}", max_dec_len=2) for k in range(5)]
    (error,) = house.ask(text="hi", req_id="late")
    assert error["error_code"] == 429
    assert "MAX_CACHED_TASK_NUM 3" in error["error_msg"]
    assert house.op("info")["frontend"]["waiting"] == 3
    house.engines[0].faults.paused = False
    for inbox in accepted:
        check_stream(inbox.all())
    check_stream(house.ask(text="hi", req_id="late", max_dec_len=2))


def test_no_queue_at_all(house: House) -> None:
    house.environ |= {"BATCH_SIZE": "1", "MAX_CACHED_TASK_NUM": "0"}
    house.ready(rate=50)
    running = house.send(text="hi", req_id="a", max_dec_len=10)
    (error,) = house.ask(text="hi", req_id="b")
    assert error["error_code"] == 429
    check_stream(running.all())
    check_stream(house.ask(text="hi", req_id="b", max_dec_len=2))


def test_each_choice_counts_in_the_queue(house: House) -> None:
    house.environ |= {"BATCH_SIZE": "2", "MAX_CACHED_TASK_NUM": "3"}
    house.ready()
    assert house.ask(text="hi", req_id="a", n=6)[-1]["error_code"] == 429
    assert len({message["index"] for message in house.ask(text="hi", req_id="a", n=5, max_dec_len=1)}) == 5


def test_what_the_engine_calls_waiting_counts(house: House) -> None:
    """The cache may be full long before the batch is."""
    house.environ |= {"BATCH_SIZE": "8", "MAX_CACHED_TASK_NUM": "2"}
    house.ready(batch_size=1, rate=20)
    first = house.send(text="hi", req_id="a", max_dec_len=100)
    first.next()
    waiting = [house.send(text="hi", req_id=f"w{k}") for k in range(2)]
    wait_for(lambda: house.op("info")["engine"]["num_waiting"] == 2)
    assert house.ask(text="hi", req_id="late")[-1]["error_code"] == 429
    for req_id in ("a", "w0", "w1"):
        house.op("abort", req_id=req_id)
    for inbox in (first, *waiting):
        inbox.all()


def test_drain_closes_admission_and_lets_the_rest_end(house: House) -> None:
    house.ready(rate=100)
    inbox = house.send(text="hi", req_id="a", max_dec_len=20)
    inbox.next()
    assert house.op("drain")["state"] == "draining"
    (error,) = house.ask(text="hi", req_id="b")
    assert (error["error_code"], error["error_msg"]) == (503, "the server is draining")
    assert inbox.all()[-1]["finish_reason"] == "length"
    assert house.op("info")["state"] == "draining"


def test_finalize_ends_everything_with_503(house: House) -> None:
    house.ready(rate=50)
    inboxes = [house.send(text="hi", req_id=f"r{k}", n=2) for k in range(10)]
    inboxes[0].next()
    begun = time.monotonic()
    house.frontend.finalize()
    assert time.monotonic() - begun < 5
    for inbox in inboxes:
        assert inbox.all()[-1]["error_code"] == 503
    house._frontend = None


def test_a_closed_sink_frees_everything(house: House) -> None:
    from octavo.frontend.sink import SinkClosed

    house.ready(rate=100)

    class Closed:
        def send(self, payload: bytes, final: bool) -> None:
            raise SinkClosed

        def cancelled(self) -> bool:
            return False

    house.frontend.submit(b'{"text": "hi", "req_id": "a"}', "", Closed())
    wait_for(lambda: house.engines[0].aborted == [1])
    wait_for(lambda: idle(house))


def test_a_failing_sink_fails_one_request_alone(house: House) -> None:
    house.ready(rate=100)

    class Broken:
        def __init__(self) -> None:
            self.last = b""

        def send(self, payload: bytes, final: bool) -> None:
            if not final:
                raise RuntimeError("bug")
            self.last = payload

        def cancelled(self) -> bool:
            return False

    broken = Broken()
    house.frontend.submit(b'{"text": "hi", "req_id": "a"}', "", broken)
    check_stream(house.ask(text="hi", req_id="b", max_dec_len=5))
    wait_for(lambda: b'"error_code":500' in broken.last)
    assert b"bug" not in broken.last
