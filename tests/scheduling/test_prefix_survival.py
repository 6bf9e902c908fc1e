"""Prefixes in the cache outlive preemption, cancellation and idle time; the least recently used go first."""

from __future__ import annotations

from scheduling.factories import Machine, make_scheduler, submit, tokens
from scheduling.fake_runner import expected


def chat(seq_id: int, first: int, length: int = 200, **params):
    return submit(seq_id, tokens(length, first=first), **params)


def test_a_preempted_sequence_finds_its_own_prefix_again():
    machine = Machine(make_scheduler(num_blocks=8))
    early, late = chat(1, 0, 130, max_tokens=200), chat(2, 300, 200, max_tokens=120)
    machine.add(early, late)
    seen, starts = set(), []
    while machine.scheduler.has_unfinished or machine.plans:
        plan = machine.plan() if len(machine.plans) < 2 else None
        for step in plan.sequences if plan is not None else ():
            if step.fresh and step.seq_id in seen:
                starts.append(step.start)
            seen.add(step.seq_id)
        if machine.plans and (plan is None or len(machine.plans) == 2):
            machine.commit()
    assert machine.scheduler.stats().num_preemptions > 0
    assert starts
    assert max(starts) >= 64  # not from the beginning
    for one in (early, late):
        assert machine.tokens_of(one.seq_id) == expected(one.prompt_token_ids, one.params)[0]


def test_a_prefix_survives_idle_time_and_smaller_neighbours():
    machine = Machine(make_scheduler(num_blocks=16))
    machine.add(chat(1, 0))
    machine.run()
    for seq_id in range(2, 6):  # 4 blocks each in turn, two of them kept
        machine.add(chat(seq_id, 100 * seq_id, 130, max_tokens=2))
        machine.run()
    machine.add(chat(9, 0))
    machine.run()
    assert machine.outputs[9][0].cached_tokens == 192


def test_the_prefix_used_last_is_kept_longest():
    machine = Machine(make_scheduler(num_blocks=8))
    for seq_id, first in ((1, 0), (2, 500), (3, 0)):  # the first one is used again
        machine.add(chat(seq_id, first))
        machine.run()
    machine.add(chat(4, 250))  # takes the blocks that are free, and the oldest
    machine.run()
    machine.add(chat(5, 0))
    machine.run()
    assert machine.outputs[5][0].cached_tokens == 192
    machine.add(chat(6, 500))
    machine.run()
    assert machine.outputs[6][0].cached_tokens < 192


def test_a_cancelled_sequence_leaves_its_full_blocks():
    machine = Machine(make_scheduler())
    machine.add(chat(1, 0, max_tokens=500))
    machine.plan()
    machine.commit()
    machine.abort(1)
    machine.add(chat(2, 0))
    machine.run()
    assert machine.outputs[2][0].cached_tokens == 192
