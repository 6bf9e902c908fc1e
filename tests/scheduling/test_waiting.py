"""Whose turn it is: priority, then the preempted, then tenants in turn, then arrival."""

from __future__ import annotations

import time

import pytest

from octavo.scheduling.sequence import Sequence, State, from_submit
from octavo.scheduling.waiting import WaitingQueue
from scheduling.factories import Machine, make_scheduler, submit


def waiting(seq_id: int, tenant: str = "", *, priority: int = 0) -> Sequence:
    return from_submit(submit(seq_id, tenant=tenant, priority=priority), arrival=seq_id, max_tokens_total=4096)


def queue_of(*sequences: Sequence) -> WaitingQueue:
    queue = WaitingQueue()
    for seq in sequences:
        queue.push(seq)
    return queue


def drained(queue: WaitingQueue) -> list[int]:
    return [queue.pop().seq_id for _ in range(len(queue))]


def test_an_empty_queue_shows_nobody():
    assert WaitingQueue().peek() is None
    with pytest.raises(IndexError):
        WaitingQueue().pop()


def test_within_a_tenant_it_is_first_come_first_served():
    assert drained(queue_of(*[waiting(seq_id, "a") for seq_id in range(5)])) == [0, 1, 2, 3, 4]


def test_tenants_take_turns():
    sequences = [waiting(seq_id, "a") for seq_id in range(4)] + [waiting(10, "b"), waiting(11, "b"), waiting(20, "c")]
    assert drained(queue_of(*sequences)) == [0, 10, 20, 1, 11, 2, 3]


def test_a_tenant_that_comes_late_waits_for_one_turn_of_each():
    queue = queue_of(*[waiting(seq_id, "a") for seq_id in range(4)], *[waiting(10 + i, "b") for i in range(4)])
    assert [queue.pop().seq_id for _ in range(3)] == [0, 10, 1]
    queue.push(waiting(99, "late"))
    assert [queue.pop().seq_id for _ in range(3)] == [11, 2, 99]


def test_priority_goes_before_turns():
    queue = queue_of(waiting(1, "a"), waiting(2, "b", priority=1), waiting(3, "a", priority=-1), waiting(4, "b"))
    assert drained(queue) == [3, 1, 4, 2]


def test_the_preempted_come_first_within_their_priority_in_order_of_arrival():
    old, older = waiting(7, "b"), waiting(5, "a")
    old.cached_tokens = older.cached_tokens = 0
    queue = queue_of(waiting(1, "a"), old, older, waiting(9, "c", priority=-1))
    assert drained(queue) == [9, 5, 7, 1]


def test_who_ends_while_waiting_is_gone():
    sequences = [waiting(seq_id, "ab"[seq_id % 2]) for seq_id in range(6)]
    queue = queue_of(*sequences)
    for seq_id in (0, 3, 5):
        sequences[seq_id].state = State.FINISHED
        queue.discard(sequences[seq_id])
    assert len(queue) == 3
    assert drained(queue) == [2, 1, 4]


def test_a_client_with_a_long_queue_does_not_starve_another():
    machine = Machine(make_scheduler(num_blocks=32, batch_size=4))
    machine.add(*[submit(seq_id, 10, tenant="greedy", max_tokens=3) for seq_id in range(500)])
    for _ in range(3):
        machine.plan()
        machine.commit()
    machine.add(submit(1000, 10, tenant="modest", max_tokens=3))
    admitted = []
    while 1000 not in admitted:
        plan = machine.plan() if len(machine.plans) < 2 else None
        if plan is not None:
            admitted += [step.seq_id for step in plan.sequences if step.fresh]
        if machine.plans and (plan is None or len(machine.plans) == 2):
            machine.commit()
    assert admitted.index(1000) <= 1
    machine.run()
    assert all(machine.finish_of(seq_id) == "length" for seq_id in [*range(500), 1000])


def test_operations_do_not_slow_down_with_the_queue():
    def seconds(count: int) -> float:
        sequences = [waiting(seq_id, str(seq_id % 100), priority=seq_id % 3) for seq_id in range(count)]
        begin = time.perf_counter()
        queue = queue_of(*sequences)
        drained(queue)
        return (time.perf_counter() - begin) / count

    assert min(seconds(20_000) for _ in range(2)) < 4 * min(seconds(2_000) for _ in range(3))
