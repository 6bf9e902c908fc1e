"""A client that fills the waiting queue cannot keep it: what becomes free goes to who was refused with less. Nobody who
is in is put out, and no more than the bound ever wait.
"""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from frontend.conftest import House, Inbox, wait_for
from frontend.test_requests import check_stream
from octavo.frontend.queue_bound import CLAIM_SECONDS, QueueBound


def queued(bound: QueueBound, client: str, count: int, *, now: float = 0.0) -> int:
    """How many of so many single sequences get in."""
    entered = 0
    while entered < count:
        if not bound.admits(client, 1, told=0, now=now):
            bound.refused(client, 1, now=now)
            break
        bound.enter(client)
        entered += 1
    return entered


def run(bound: QueueBound, client: str, count: int) -> None:
    """So many of its sequences start and end: places become free."""
    for _ in range(count):
        bound.start(client)
        bound.leave(client, started=True)


def test_a_client_has_the_whole_queue_and_no_more() -> None:
    bound = QueueBound(batch_size=4, max_waiting=12)
    assert queued(bound, "a", 100) == 16
    assert queued(bound, "a", 1) == queued(bound, "b", 1) == 0, "full is full, for everybody"
    assert bound.num_waiting(0) == 12


def test_what_becomes_free_goes_to_who_was_refused_with_less() -> None:
    bound = QueueBound(batch_size=1, max_waiting=6)
    assert (queued(bound, "a", 100), queued(bound, "b", 1)) == (7, 0)
    run(bound, "a", 2)
    assert queued(bound, "a", 1) == 0, "b was here"
    assert queued(bound, "b", 100) == 2
    run(bound, "a", 1)
    assert queued(bound, "a", 1) == 0, "b was refused with two of its three"
    assert queued(bound, "b", 100) == 1
    run(bound, "a", 2)
    assert queued(bound, "b", 100) == 2, "b has its share and more, but nobody has a claim"


def test_who_does_not_come_back_keeps_nobody_out_for_long() -> None:
    bound = QueueBound(batch_size=1, max_waiting=4)
    assert (queued(bound, "a", 100), queued(bound, "b", 1)) == (5, 0)
    run(bound, "a", 1)
    assert queued(bound, "a", 1, now=CLAIM_SECONDS - 0.1) == 0
    assert queued(bound, "a", 1, now=CLAIM_SECONDS) == 1


def test_who_waits_for_nobody_gets_in_whoever_has_a_claim() -> None:
    bound = QueueBound(batch_size=2, max_waiting=1)
    assert (queued(bound, "a", 100), queued(bound, "b", 1)) == (3, 0)
    run(bound, "a", 3)
    assert queued(bound, "a", 2) == 2, "the batch has room"


def test_many_choices_count_against_the_share() -> None:
    bound = QueueBound(batch_size=1, max_waiting=8)
    queued(bound, "a", 100)
    bound.refused("b", 5, now=0.0)
    run(bound, "a", 1)
    assert bound.admits("a", 1, told=0, now=0.0), "five of eight are more than b may claim"
    bound.refused("b", 4, now=0.0)
    assert not bound.admits("a", 1, told=0, now=0.0)


def test_without_a_queue_nobody_waits() -> None:
    bound = QueueBound(batch_size=1, max_waiting=0)
    assert (queued(bound, "a", 5), queued(bound, "b", 5)) == (1, 0)


@given(st.lists(st.tuples(st.sampled_from(["enter", "start", "leave"]), st.sampled_from("abcdefg"), st.integers(1, 3)),
                max_size=200), st.integers(1, 6), st.integers(0, 12))
def test_the_bounds_hold_whatever_comes_and_goes(steps: list[tuple[str, str, int]], batch: int, most: int) -> None:
    bound = QueueBound(batch_size=batch, max_waiting=most)
    alive: list[tuple[str, bool]] = []  # client, started
    for now, (what, client, count) in enumerate(steps):
        mine = [one for one in alive if one[0] == client]
        if what == "enter":
            unstarted = Counter(name for name, started in alive if not started)
            admitted = bound.admits(client, count, told=0, now=now)
            room = len(alive) + count - batch <= most
            assert room or not admitted, "no more than the bound wait"
            claims = bound._claims.keys() - {client}
            if room and unstarted[client] + count <= most // len({*unstarted, *claims, client}):
                assert admitted, "a client within its share is kept out by a full queue alone"
            assert admitted or not room or claims
            if admitted:
                alive += [(client, False)] * count
                for _ in range(count):
                    bound.enter(client)
            else:
                bound.refused(client, count, now=now)
        elif what == "start" and (client, False) in mine:
            alive[alive.index((client, False))] = (client, True)
            bound.start(client)
        elif what == "leave" and mine:
            alive.remove(mine[0])
            bound.leave(client, started=mine[0][1])
        assert bound.num_waiting(0) == max(0, len(alive) - batch) <= most


def fill(house: House, client: str, count: int) -> list[Inbox]:
    return [house.send(text="hi", req_id=f"{client}-{at}", key=client, max_dec_len=2) for at in range(count)]


def leave(house: House, crowd: list[Inbox], count: int) -> None:
    """So many give up: one place becomes free for each beyond the batch, whose first tokens are still to come."""
    num_left = len(crowd) - count
    while len(crowd) > num_left:
        crowd.pop().gone.set()
    wait_for(lambda: sum(house.frontend.registry.counts()) == num_left)


def refused(house: House, client: str) -> bool:
    return house.ask(text="hi", req_id="one too many", key=client)[-1].get("error_code") == 429


def test_one_client_with_500_queued_requests_does_not_keep_another_out(house: House) -> None:
    house.environ |= {"BATCH_SIZE": "4", "MAX_CACHED_TASK_NUM": "500"}
    house.ready()
    house.engines[0].faults.paused = True
    crowd = fill(house, "greedy", 504)
    wait_for(lambda: house.frontend.registry.num_accepted == 504)
    assert refused(house, "greedy")
    assert refused(house, "modest"), "the queue is full"
    leave(house, crowd, 5)
    assert refused(house, "greedy"), "it is not for who has all the others"
    other = house.send(text="hi", req_id="other", key="modest", max_dec_len=2)
    wait_for(lambda: house.frontend.registry.num_accepted == 505)
    house.engines[0].faults.paused = False
    for inbox in [other, *crowd]:
        assert check_stream(inbox.all())["tokens_all_num"] == 2, "nobody who is in is put out"


def test_a_claim_survives_a_new_engine(house: House) -> None:
    house.environ |= {"BATCH_SIZE": "1", "MAX_CACHED_TASK_NUM": "4"}
    house.ready()
    house.engines[0].faults.paused = True
    crowd = fill(house, "greedy", 5)
    wait_for(lambda: house.frontend.registry.num_accepted == 5)
    assert refused(house, "modest")
    house.engines[0].die()
    engine = house.engine()
    engine.faults.paused = True
    wait_for(lambda: len(engine.submitted) == 5)
    leave(house, crowd, 2)
    assert refused(house, "greedy")
    others = fill(house, "modest", 1)
    wait_for(lambda: house.frontend.registry.num_accepted == 6)
    engine.faults.paused = False
    for inbox in [*crowd, *others]:
        check_stream(inbox.all())
