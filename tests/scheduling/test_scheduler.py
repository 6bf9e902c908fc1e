"""Behaviours of the scheduler, one by one; the fake runner checks the cache at every step."""

from __future__ import annotations

import time

import pytest

from octavo.protocol.messages import SamplingParams, Submit
from octavo.scheduling.plan import PENDING, Sampled, StepResult
from scheduling.factories import Machine, make_scheduler, submit, tokens
from scheduling.fake_runner import draw, expected


def check_all(machine: Machine, submits: list[Submit]) -> None:
    """Every sequence ended as if it had been alone."""
    limits = machine.scheduler.limits
    for one in submits:
        capacity = machine.scheduler.pool.num_blocks * 64
        want, reason = expected(one.prompt_token_ids, one.params, context=limits.context_length, capacity=capacity)
        assert machine.tokens_of(one.seq_id) == want[len(one.generated_token_ids) :]
        assert machine.finish_of(one.seq_id) == reason


# ---- planning


def test_an_idle_scheduler_plans_nothing():
    assert make_scheduler().schedule(0.0) is None


def test_a_prompt_is_computed_and_then_tokens_one_by_one():
    machine = Machine(make_scheduler())
    machine.add(submit(1, 10))
    first, second = machine.plan().sequences[0], machine.plan().sequences[0]
    assert (first.fresh, first.start, first.num_tokens) == (True, 0, 10)
    assert first.history == tuple(tokens(10, first=1))
    assert (second.fresh, second.start, second.token_ids) == (False, 10, [PENDING])
    assert (first.num_outputs, second.num_outputs) == (0, 1)


def test_without_a_step_ahead_the_token_is_known():
    machine = Machine(make_scheduler())
    machine.add(submit(1, 10))
    machine.plan()
    (output,) = machine.commit()
    assert machine.plan().sequences[0].token_ids == output.token_ids


@pytest.mark.parametrize("ahead", [1, 2])
def test_outputs_do_not_depend_on_planning_ahead(ahead):
    machine = Machine(make_scheduler())
    submits = [submit(seq_id, 30 + 40 * seq_id, max_tokens=9, seed=seq_id) for seq_id in range(5)]
    machine.add(*submits)
    machine.run(ahead=ahead)
    check_all(machine, submits)


def test_a_long_prompt_is_cut_into_chunks_and_sampled_once():
    machine = Machine(make_scheduler(budget=64))
    machine.add(submit(1, 150))
    plans = [machine.plan(), machine.plan()]
    machine.commit()
    plans.append(machine.plan())
    steps = [plan.sequences[0] for plan in plans]
    cuts = [(step.start, step.num_tokens, step.sample) for step in steps]
    assert cuts == [(0, 64, False), (64, 64, False), (128, 22, True)]
    assert [step.fresh for step in steps] == [True, False, False]


def test_decodes_come_before_prompts_and_share_one_budget():
    machine = Machine(make_scheduler(budget=64))
    machine.add(submit(1, 10), submit(2, 200))
    machine.plan()
    plan = machine.plan()
    assert [(step.seq_id, step.num_tokens) for step in plan.sequences] == [(1, 1), (2, 63)]


def test_prompts_run_in_order_of_priority_then_arrival():
    machine = Machine(make_scheduler(batch_size=3))
    machine.add(submit(1), submit(2), submit(3, priority=-1), submit(4))
    assert [step.seq_id for step in machine.plan().sequences] == [3, 1, 2]


def test_no_more_sequences_run_than_there_are_slots():
    machine = Machine(make_scheduler(batch_size=2))
    machine.add(*(submit(seq_id) for seq_id in range(5)))
    assert len(machine.plan().sequences) == 2
    assert machine.scheduler.stats().num_waiting == 3


def test_no_more_sequences_run_than_the_budget_can_serve():
    machine = Machine(make_scheduler(batch_size=8, budget=2))
    submits = [submit(seq_id, 3) for seq_id in range(5)]
    machine.add(*submits)
    machine.run()
    check_all(machine, submits)


def test_nobody_overtakes_the_first_in_the_queue():
    machine = Machine(make_scheduler(num_blocks=4))
    machine.add(submit(1, 100, max_tokens=50), submit(2, 190), submit(3, 5))
    machine.plan()
    assert [step.seq_id for step in machine.plan().sequences] == [1]


def test_a_sequence_that_will_end_by_length_is_not_planned_again():
    machine = Machine(make_scheduler())
    machine.add(submit(1, 10, max_tokens=2))
    assert machine.plan()
    assert machine.plan()
    machine.commit()
    assert machine.plan() is None
    machine.commit()
    assert machine.finish_of(1) == "length"


def test_evicted_slots_are_named_once_and_not_when_filled_anew():
    machine = Machine(make_scheduler(batch_size=2))
    machine.add(submit(1, max_tokens=1), submit(2, max_tokens=9))
    slot = machine.plan().sequences[0].slot
    machine.commit()
    assert machine.plan().evicted_slots == [slot]
    machine.add(submit(3, max_tokens=1))
    assert machine.plan().evicted_slots == []
    machine.commit()
    machine.commit()
    machine.add(submit(4))
    plan = machine.plan()
    assert plan.sequences[-1].slot == slot
    assert plan.evicted_slots == []


# ---- finishing


def test_an_end_token_ends_the_sequence_and_is_its_last_token():
    end = draw(tokens(10, first=1), 0, 0)
    machine = Machine(make_scheduler())
    machine.add(submit(1, 10, end_token_ids=(end,)))
    machine.run()
    assert machine.tokens_of(1) == [end]
    assert machine.finish_of(1) == "stop"


def test_end_tokens_do_not_count_before_min_tokens():
    prompt = tokens(10, first=1)
    end = draw(prompt, 0, 0)
    machine = Machine(make_scheduler())
    machine.add(submit(1, 10, end_token_ids=(end,), min_tokens=2, max_tokens=3))
    machine.run()
    assert machine.tokens_of(1)[0] == end
    assert len(machine.tokens_of(1)) == 3


def test_the_overshoot_after_an_end_token_is_dropped_and_its_blocks_wait():
    end = draw(tokens(10, first=1), 0, 0)
    machine = Machine(make_scheduler(prefix_cache=False))
    machine.add(submit(1, 10, end_token_ids=(end,)))
    machine.plan()
    machine.plan()
    assert machine.commit()[0].finish_reason == "stop"
    assert machine.scheduler.pool.num_used == 1
    assert machine.commit() == []
    assert machine.scheduler.pool.num_free == 16


def test_the_context_bounds_the_output():
    machine = Machine(make_scheduler(context=12))
    machine.add(submit(1, 10, max_tokens=100))
    machine.run()
    assert len(machine.tokens_of(1)) == 2
    assert machine.finish_of(1) == "length"


def test_the_whole_cache_bounds_the_output():
    machine = Machine(make_scheduler(num_blocks=2))
    one = submit(1, 100, max_tokens=100)
    machine.add(one)
    machine.run()
    check_all(machine, [one])
    assert len(machine.tokens_of(1)) == 29


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ([], "empty"),
        ([1000], "outside"),
        ([-1], "outside"),
        (tokens(300), "exceed the cache"),
        (tokens(4096), "no room"),
    ],
)
def test_what_can_never_run_is_an_error_at_once(prompt, word):
    machine = Machine(make_scheduler(num_blocks=4))
    machine.add(submit(1, prompt))
    assert machine.finish_of(1) == "error"
    assert word in machine.outputs[1][0].error
    assert not machine.scheduler.has_unfinished


def test_an_id_in_use_is_refused():
    scheduler = make_scheduler()
    scheduler.add(submit(1))
    with pytest.raises(ValueError, match="exists"):
        scheduler.add(submit(1))


def test_the_first_output_carries_the_queue_time_and_the_cached_tokens():
    machine = Machine(make_scheduler())
    machine.add(submit(1, 130, max_tokens=1))
    machine.plan(now=5.0)
    assert machine.commit()[0].scheduled_at == 5.0
    machine.add(submit(2, tokens(130, first=1), max_tokens=2))
    machine.plan(now=7.0)
    first = machine.commit()[0]
    assert (first.scheduled_at, first.cached_tokens) == (7.0, 128)
    machine.plan(now=8.0)
    assert machine.commit()[0].scheduled_at == 0.0


# ---- resuming


def test_resumed_tokens_count_as_outputs_and_are_not_sent_again():
    one = submit(1, 20, max_tokens=8, seed=3)
    want, _ = expected(one.prompt_token_ids, one.params)
    machine = Machine(make_scheduler())
    resumed = submit(1, 20, max_tokens=8, seed=3, resumed=want[:5])
    machine.add(resumed)
    step = machine.plan().sequences[0]
    assert (step.num_outputs, step.prompt_len, len(step.history)) == (5, 20, 25)
    machine.run()
    assert machine.tokens_of(1) == want[5:]


@pytest.mark.parametrize(("extra", "reason"), [({"end_token_ids": (7,)}, "stop"), ({"max_tokens": 2}, "length")])
def test_resumed_tokens_that_end_the_sequence_end_it_at_once(extra, reason):
    machine = Machine(make_scheduler())
    machine.add(submit(1, 20, resumed=[3, 7], **extra))
    assert (machine.tokens_of(1), machine.finish_of(1)) == ([], reason)


# ---- the prefix cache


def test_a_prefix_is_computed_once():
    machine = Machine(make_scheduler())
    submits = [submit(seq_id, tokens(200, first=5), max_tokens=3) for seq_id in (1, 2)]
    for one in submits:
        machine.add(one)
        machine.run()
    check_all(machine, submits)
    stats = machine.scheduler.stats()
    assert (stats.prefix_hit_tokens, stats.prefix_query_tokens, stats.prompt_tokens) == (192, 400, 208)


def test_a_hit_never_covers_the_last_token_of_the_prompt():
    machine = Machine(make_scheduler())
    for seq_id in (1, 2):
        machine.add(submit(seq_id, tokens(128, first=5)))
        machine.run()
    assert machine.outputs[2][0].cached_tokens == 64


def test_outputs_are_cached_for_the_next_turn_of_a_conversation():
    machine = Machine(make_scheduler())
    one = submit(1, 100, max_tokens=60)
    machine.add(one)
    machine.run()
    machine.add(submit(2, one.prompt_token_ids + machine.tokens_of(1) + [1, 2, 3]))
    machine.run()
    assert machine.outputs[2][0].cached_tokens == 128


def test_prompt_logprobs_take_no_hit_and_cover_the_prompt_once():
    machine = Machine(make_scheduler(budget=64))
    for seq_id in (1, 2):
        machine.add(submit(seq_id, tokens(150, first=5), prompt_logprobs=0, max_tokens=3))
        machine.run()
    first, *rest = machine.outputs[2]
    assert first.cached_tokens == 0
    assert [entry.token_id for entry in first.prompt_logprobs] == tokens(150, first=5)[1:]
    assert all(output.prompt_logprobs is None for output in rest)


def test_logprobs_ride_with_their_tokens():
    machine = Machine(make_scheduler())
    machine.add(submit(1, logprobs=0, max_tokens=2), submit(2, max_tokens=2))
    machine.run()
    assert [[entry.token_id for entry in output.logprobs] for output in machine.outputs[1]] == [
        output.token_ids for output in machine.outputs[1]
    ]
    assert machine.outputs[2][0].logprobs is None


def test_without_the_prefix_cache_nothing_is_kept():
    machine = Machine(make_scheduler(prefix_cache=False))
    for seq_id in (1, 2):
        machine.add(submit(seq_id, tokens(200)))
        machine.run()
    stats = machine.scheduler.stats()
    assert (stats.num_cached_blocks, stats.num_free_blocks, stats.prefix_hit_tokens) == (0, 16, 0)


# ---- preemption


def test_the_newest_is_preempted_and_nothing_is_lost():
    machine = Machine(make_scheduler(num_blocks=4))
    submits = [submit(seq_id, 60, max_tokens=80, seed=seq_id) for seq_id in range(3)]
    machine.add(*submits)
    machine.run()
    check_all(machine, submits)
    assert machine.scheduler.stats().num_preemptions > 0
    ends = [machine.outputs[seq_id][-1] for seq_id in range(3)]
    assert all(end.finish_reason == "length" for end in ends)


def test_the_lowest_priority_is_preempted_first():
    machine = Machine(make_scheduler(num_blocks=2))
    machine.add(submit(1, 60, max_tokens=20, priority=5), submit(2, 60, max_tokens=20))
    while not machine.scheduler.stats().num_preemptions:
        machine.plan()
        machine.commit()
    machine.run()
    last = {seq_id: machine.outputs[seq_id][-1].finish_reason for seq_id in (1, 2)}
    assert last == {1: "length", 2: "length"}
    assert list(machine.outputs) == [2, 1]  # 2 sent first, and was never behind


def test_a_preempted_sequence_comes_back_before_those_that_never_ran():
    machine = Machine(make_scheduler(num_blocks=3, batch_size=2, prefix_cache=False))
    submits = [submit(1, 60, max_tokens=70), submit(2, 60, max_tokens=70), submit(3, 60, max_tokens=2)]
    machine.add(*submits)
    started: list[int] = []
    while machine.scheduler.has_unfinished:
        plan = machine.plan()
        started += [step.seq_id for step in plan.sequences if step.fresh]
        machine.commit()
    assert started == [1, 2, 2, 3]
    check_all(machine, submits)


def test_a_rescheduled_sequence_gets_its_whole_history():
    machine = Machine(make_scheduler(num_blocks=3, prefix_cache=False))
    machine.add(submit(1, 60, max_tokens=80), submit(2, 60, max_tokens=80))
    histories = []
    while machine.scheduler.has_unfinished:
        sent = machine.tokens_of(2)
        plan = machine.plan()
        histories += [(step.history, list(sent)) for step in plan.sequences if step.fresh and step.seq_id == 2]
        machine.commit()
    assert len(histories) > 1
    for history, outputs in histories:
        assert list(history) == tokens(60, first=2) + outputs


def test_a_token_pending_at_preemption_is_sent_once_and_recomputed():
    machine = Machine(make_scheduler(num_blocks=2))
    submits = [submit(1, 63, max_tokens=30), submit(2, 63, max_tokens=30)]
    machine.add(*submits)
    machine.plan()  # both sample
    machine.plan()  # both take position 63
    machine.commit()
    machine.plan()  # 1 needs a block: 2 is preempted, its token is pending
    assert machine.scheduler.stats().num_preemptions == 1
    machine.commit()
    assert len(machine.tokens_of(2)) == 2
    machine.run()
    check_all(machine, submits)


def test_a_preempted_sequence_whose_pending_token_ends_it_leaves_the_queue():
    prompt = tokens(63, first=2)
    second = draw([*prompt, draw(prompt, 0, 0)], 1, 0)
    machine = Machine(make_scheduler(num_blocks=2))
    machine.add(submit(1, 63, max_tokens=30), submit(2, prompt, max_tokens=30, end_token_ids=(second,)))
    machine.plan()
    machine.plan()
    machine.commit()
    machine.plan()
    machine.commit()
    assert machine.finish_of(2) == "stop"
    assert machine.scheduler.stats().num_waiting == 0
    machine.run()
    assert machine.finish_of(1) == "length"


def test_prompt_logprobs_survive_a_preemption_at_the_first_token():
    machine = Machine(make_scheduler(num_blocks=2, budget=64))
    machine.add(submit(1, 62, max_tokens=30))
    machine.plan()
    machine.add(submit(2, 64, max_tokens=5, prompt_logprobs=0))
    machine.plan()  # 63 of 64 tokens of the prompt
    machine.commit()
    plan = machine.plan()  # 1 takes position 63, 2 samples its first token
    assert [step.sample for step in plan.sequences] == [True, True]
    machine.commit()
    machine.plan()  # 1 needs a block: 2 is preempted while its first token is pending
    assert machine.scheduler.stats().num_preemptions == 1
    machine.run()
    assert [entry.token_id for entry in machine.outputs[2][0].prompt_logprobs] == tokens(64, first=2)[1:]
    assert [output.prompt_logprobs for output in machine.outputs[2][1:]] == [None] * 4


def test_prompt_logprobs_of_a_prompt_cut_short_are_collected_anew():
    machine = Machine(make_scheduler(num_blocks=3, budget=64))
    machine.add(submit(1, 63, max_tokens=30))
    machine.plan()
    machine.add(submit(2, 128, max_tokens=2, prompt_logprobs=0))
    machine.plan()
    machine.commit()
    machine.plan()  # 1 needs a block: 2 is preempted in the middle of its prompt
    assert machine.scheduler.stats().num_preemptions == 1
    machine.run()
    assert [entry.token_id for entry in machine.outputs[2][0].prompt_logprobs] == tokens(128, first=2)[1:]


def test_room_to_grow_is_left_for_those_that_run():
    machine = Machine(make_scheduler(num_blocks=16, budget=2048))
    machine.add(submit(1, 10), submit(2, 15 * 64), submit(3, 5))
    assert [step.seq_id for step in machine.plan().sequences] == [1]
    machine.run()
    assert [machine.finish_of(seq_id) for seq_id in (1, 2, 3)] == ["length"] * 3
    assert machine.scheduler.stats().num_preemptions == 0


# ---- aborting


def test_a_waiting_sequence_is_cancelled():
    machine = Machine(make_scheduler(batch_size=1))
    machine.add(submit(1), submit(2))
    machine.plan()
    machine.abort(2)
    assert machine.finish_of(2) == "cancelled"
    assert machine.scheduler.stats().num_waiting == 0
    machine.run()
    assert machine.finish_of(1) == "length"


@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_running_sequence_is_cancelled_at_once_and_its_blocks_are_free_within_two_commits(in_flight):
    machine = Machine(make_scheduler(prefix_cache=False))
    machine.add(submit(1, 200, max_tokens=50))
    for _ in range(in_flight):
        machine.plan()
    machine.abort(1)
    assert machine.finish_of(1) == "cancelled"
    assert machine.scheduler.pool.num_used == 4
    assert machine.plan() is None if in_flight == 1 else True
    for _ in range(in_flight):
        assert machine.commit() == []
    assert machine.scheduler.pool.num_free == 16
    assert machine.tokens_of(1) == []


def test_aborting_what_has_ended_says_nothing():
    machine = Machine(make_scheduler())
    machine.add(submit(1, max_tokens=1))
    machine.run()
    assert machine.scheduler.abort(1) is None
    assert machine.scheduler.abort(99) is None


def test_an_id_may_be_used_again_while_the_old_plan_is_in_flight():
    machine = Machine(make_scheduler())
    machine.add(submit(1, 20, max_tokens=50))
    machine.plan()
    machine.abort(1)
    machine.outputs.clear()
    again = submit(1, 30, max_tokens=5, seed=9)
    machine.add(again)
    machine.run()
    check_all(machine, [again])


# ---- failed steps


def test_a_failed_step_ends_its_sequences_and_no_others():
    machine = Machine(make_scheduler(batch_size=2, budget=64))
    third = submit(3, 50, max_tokens=5)
    machine.add(submit(1, 20, max_tokens=20), submit(2, 20, max_tokens=20), third)
    plan = machine.plan()
    machine.plan()
    machine.runner.queue.popleft()
    machine.plans.pop(0)
    machine.runner.slots.clear()
    machine.record(machine.scheduler.fail(plan, "step failed (id 1)"))
    machine.scheduler.check_integrity()
    assert [machine.finish_of(seq_id) for seq_id in (1, 2)] == ["error", "error"]
    machine.run()
    check_all(machine, [third])


def test_plans_are_committed_in_order():
    machine = Machine(make_scheduler())
    machine.add(submit(1))
    machine.plan()
    second = machine.plan()
    with pytest.raises(AssertionError, match="in order"):
        machine.scheduler.commit(second, StepResult(second.step_id, [Sampled(1)], [None]))


# ---- speed


def schedule_seconds(*, running: int, waiting: int, steps: int = 200) -> tuple[float, float]:
    """Median seconds of schedule() and of commit() with a full batch and a long queue."""
    scheduler = make_scheduler(num_blocks=running * 40, batch_size=running, budget=1 << 16, context=1 << 20)
    params = SamplingParams(max_tokens=2000, end_token_ids=(999,), temperature=0.7, seed=1)
    for seq_id in range(running + waiting):
        scheduler.add(Submit(seq_id, tokens(50 + seq_id % 40, first=seq_id), params))
    planning, committing, plans = [], [], []
    for _ in range(steps):
        begin = time.perf_counter()
        plans.append(scheduler.schedule(0.0))
        planning.append(time.perf_counter() - begin)
        if len(plans) < 2:
            continue
        plan = plans.pop(0)
        drawn = [Sampled(5) if step.sample else None for step in plan.sequences]
        result = StepResult(plan.step_id, drawn, [None] * len(drawn))
        begin = time.perf_counter()
        outputs = scheduler.commit(plan, result)
        committing.append(time.perf_counter() - begin)
        assert len(outputs) == running
    assert scheduler.stats().num_running == running
    assert scheduler.stats().num_waiting == waiting
    return sorted(planning)[steps // 2], sorted(committing)[len(committing) // 2]


def test_planning_a_full_batch_over_a_long_queue_is_fast():
    planning, committing = schedule_seconds(running=128, waiting=10_000)
    print(f"schedule {planning * 1e3:.3f} ms, commit {committing * 1e3:.3f} ms")
    assert planning < 5e-3
    assert committing < 5e-3


def test_aborting_a_long_queue_takes_no_longer_per_sequence_than_a_short_one():
    scheduler = make_scheduler(batch_size=1)
    for seq_id in range(10_000):
        scheduler.add(submit(seq_id, 5))
    begin = time.perf_counter()
    for seq_id in reversed(range(10_000)):
        scheduler.abort(seq_id)
    assert time.perf_counter() - begin < 2.0
    assert not scheduler.has_unfinished
    scheduler.check_integrity()
