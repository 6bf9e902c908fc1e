"""A client that fills the waiting queue does not keep others out, and nobody who is in is put out."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from frontend.conftest import House, Inbox, wait_for
from frontend.test_requests import check_stream
from octavo.frontend.queue_bound import QueueBound


def queued(bound: QueueBound, client: str, count: int) -> int:
    """How many of so many single sequences get in."""
    entered = 0
    while entered < count and bound.admits(client, 1, told=0):
        bound.enter(client)
        entered += 1
    return entered


def test_alone_a_client_has_the_whole_queue_and_no_more() -> None:
    assert queued(QueueBound(batch_size=4, max_waiting=12), "a", 100) == 16


def test_behind_a_full_queue_each_further_client_has_its_share() -> None:
    bound = QueueBound(batch_size=4, max_waiting=12)
    assert queued(bound, "a", 100) == 16
    assert queued(bound, "b", 100) == 6
    assert queued(bound, "c", 100) == 4
    assert queued(bound, "a", 100) == queued(bound, "b", 100) == 0
    assert queued(bound, "d", 100) == 2, "twice the bound is the end for everybody"
    assert bound.num_waiting(0) == 24


def test_who_has_more_than_its_share_gets_in_again_once_it_is_below() -> None:
    bound = QueueBound(batch_size=1, max_waiting=4)
    assert (queued(bound, "a", 100), queued(bound, "b", 100)) == (5, 2)
    for _ in range(4):
        bound.start("a")
        bound.leave("a", started=True)
    assert queued(bound, "a", 100) == 2, "the queue is open to anyone again, up to the bound"


def test_many_choices_count_against_the_share() -> None:
    bound = QueueBound(batch_size=1, max_waiting=8)
    queued(bound, "a", 100)
    assert not bound.admits("b", 5, told=0)
    assert bound.admits("b", 4, told=0)


def test_without_a_queue_nobody_waits() -> None:
    bound = QueueBound(batch_size=1, max_waiting=0)
    assert (queued(bound, "a", 5), queued(bound, "b", 5)) == (1, 0)


@given(st.lists(st.tuples(st.sampled_from(["enter", "start", "leave"]), st.sampled_from("abcdefg"), st.integers(1, 3)),
                max_size=200), st.integers(1, 6), st.integers(0, 12))
def test_the_bounds_hold_whatever_comes_and_goes(steps: list[tuple[str, str, int]], batch: int, most: int) -> None:
    bound = QueueBound(batch_size=batch, max_waiting=most)
    alive: list[tuple[str, bool]] = []  # client, started
    for what, client, count in steps:
        mine = [one for one in alive if one[0] == client]
        if what == "enter":
            unstarted = Counter(name for name, started in alive if not started)
            admitted = bound.admits(client, count, told=0)
            after = len(alive) + count - batch
            share = most // len({*unstarted, client})
            if after <= most:
                assert admitted
            elif after <= 2 * most and len({*unstarted, client}) > 1 and unstarted[client] + count <= share:
                assert admitted, "a client below its share is never kept out by others"
            if admitted:
                alive += [(client, False)] * count
                for _ in range(count):
                    bound.enter(client)
        elif what == "start" and (client, False) in mine:
            alive[alive.index((client, False))] = (client, True)
            bound.start(client)
        elif what == "leave" and mine:
            alive.remove(mine[0])
            bound.leave(client, started=mine[0][1])
        assert bound.num_waiting(0) == max(0, len(alive) - batch)
        assert bound.num_waiting(0) <= 2 * most


def fill(house: House, client: str, count: int) -> list[Inbox]:
    return [house.send(text="hi", req_id=f"{client}-{at}", key=client, max_dec_len=2) for at in range(count)]


def test_one_client_with_500_queued_requests_does_not_keep_another_out(house: House) -> None:
    house.environ |= {"BATCH_SIZE": "4", "MAX_CACHED_TASK_NUM": "500"}
    house.ready()
    engine = house.engines[0]
    engine.faults.paused = True
    crowd = fill(house, "greedy", 504)
    wait_for(lambda: house.frontend.registry.num_accepted == 504)
    (refused,) = house.ask(text="hi", req_id="one too many", key="greedy")
    assert refused["error_code"] == 429
    other = house.send(text="hi", req_id="other", key="modest", max_dec_len=2)
    wait_for(lambda: house.frontend.registry.num_accepted == 505)
    engine.faults.paused = False
    for inbox in [other, *crowd]:
        assert check_stream(inbox.all())["tokens_all_num"] == 2, "nobody who is in is put out"


def test_the_share_survives_a_new_engine(house: House) -> None:
    house.environ |= {"BATCH_SIZE": "1", "MAX_CACHED_TASK_NUM": "4"}
    house.ready()
    house.engines[0].faults.paused = True
    crowd = fill(house, "greedy", 5)
    wait_for(lambda: house.frontend.registry.num_accepted == 5)
    house.engines[0].die()
    engine = house.engine()
    engine.faults.paused = True
    wait_for(lambda: len(engine.submitted) == 5)
    assert house.ask(text="hi", req_id="more", key="greedy")[-1]["error_code"] == 429
    others = fill(house, "modest", 2)
    assert house.ask(text="hi", req_id="third", key="modest")[-1]["error_code"] == 429
    engine.faults.paused = False
    for inbox in [*crowd, *others]:
        check_stream(inbox.all())
