"""Drafts: found by n-grams, verified in a step, the same tokens in fewer steps, and given up where they do not gain."""

from __future__ import annotations

import random

import pytest

from octavo.scheduling.ngrams import LONGEST, NgramIndex
from octavo.scheduling.plan import PENDING, Sampled
from octavo.scheduling.speculation import Drafter, Speculation, StepCosts, interpolate
from scheduling.factories import Machine, make_scheduler, submit, tokens
from scheduling.fake_runner import COPYING, NOISE, expected

# ---- the index


def looked_up(token_ids: list[int], count: int) -> tuple[int, list[int]]:
    index = NgramIndex()
    assert index.extend(token_ids, most=10**6)
    return index.lookup(token_ids, count)


def test_what_followed_the_longest_match_is_found():
    assert looked_up([1, 2, 3, 4, 9, 8, 2, 3, 4, 7, 6, 1, 2, 3, 4], 2) == (4, [9, 8])


def test_of_equal_matches_the_newest_counts():
    assert looked_up([1, 2, 3, 4, 1, 2, 3, 5, 6, 1, 2, 3], 2) == (3, [5, 6])


def test_less_than_an_n_gram_is_no_match():
    assert looked_up([1, 2, 9, 1, 2], 4) == (0, [])
    assert looked_up([5], 4) == (0, [])


def test_a_match_that_reaches_the_end_repeats_itself():
    assert looked_up([7, 1, 2, 3, 1, 2, 3, 1, 2, 3], 7) == (6, [1, 2, 3, 1, 2, 3, 1])


def test_the_length_of_a_match_is_bounded():
    assert looked_up([5] * 200, 3) == (LONGEST, [5, 5, 5])


def test_a_long_text_is_taken_in_over_several_calls_and_gives_the_same():
    generator = random.Random(3)
    token_ids = [generator.randrange(6) for _ in range(500)]
    index = NgramIndex()
    assert [index.extend(token_ids, most=200) for _ in range(3)] == [False, False, True]
    assert index.num_indexed == 499
    assert index.lookup(token_ids, 5) == looked_up(token_ids, 5)


def test_an_index_that_grows_by_one_gives_what_a_new_one_gives():
    generator = random.Random(4)
    token_ids, index = [], NgramIndex()
    for _ in range(300):
        token_ids.append(generator.randrange(4))
        index.extend(token_ids, most=10)
        assert index.lookup(token_ids, 4) == looked_up(token_ids, 4)


# ---- the policy


def drafter(seconds_of: dict[int, float] | None = None) -> Drafter:
    made = Drafter()
    for rows, seconds in (seconds_of or {}).items():
        for _ in range(60):
            made.costs.measured(rows, seconds)
    return made


def test_step_times_are_interpolated_and_never_fall():
    costs = StepCosts()
    for rows, seconds in ((1, 0.03), (4, 0.04), (8, 0.035)):
        costs.measured(rows, seconds)
    points = costs.curve()
    assert [interpolate(points, rows) for rows in (1, 4, 6, 8)] == pytest.approx([0.03, 0.04, 0.04, 0.04])
    assert interpolate(points, 2) == pytest.approx(0.03 + 0.01 / 3)
    assert interpolate(points, 20) > 0.04


@pytest.mark.parametrize(("rate", "least", "most"), [(0.95, 6, 8), (0.5, 1, 3), (0.02, 0, 0)])
def test_the_length_of_a_draft_follows_how_often_drafts_come_true(rate, least, most):
    count, _ = drafter({1: 0.030, 16: 0.060}).budget(num_sequences=1, rows=1).best(rate, 8)
    assert least <= count <= most


def test_where_every_row_costs_as_much_as_a_sequence_nothing_is_drafted():
    made = drafter({1: 0.001, 2: 0.002, 4: 0.004, 8: 0.008, 16: 0.016, 32: 0.032, 64: 0.064})
    assert not made.budget(num_sequences=32, rows=32).can_pay
    assert drafter({32: 0.03, 64: 0.031}).budget(num_sequences=32, rows=32).can_pay


def test_a_sequence_whose_drafts_fail_stops_and_tries_again_less_and_less():
    made, state = drafter({1: 0.030, 16: 0.060}), Speculation()
    tried = []
    token_ids = [1, 2, 3, 4, 5, 6, 7, 8] * 2
    for step in range(3000):
        budget = made.budget(num_sequences=1, rows=1)
        if made.propose(state, token_ids[:], pending=False, most=8, budget=budget):
            tried.append(step)
            state.learn(drafted=3, accepted=0)
        token_ids += [1, 2, 3, 4, 5, 6, 7, 8]  # always looks as if it repeated itself
    assert len(tried) < 60
    later = [step for step in tried if step >= 1000]
    assert 1 <= len(later) < 25


# ---- in the scheduler


def machine(**options) -> Machine:
    return Machine(make_scheduler(num_blocks=64, speculation=True, **options))


def test_a_text_that_repeats_itself_takes_fewer_steps_and_is_the_same():
    one = submit(1, 40, max_tokens=300, seed=COPYING + 1)
    plain, fast = Machine(make_scheduler(num_blocks=64)), machine()
    for each in (plain, fast):
        each.add(one)
        each.run()
    want, reason = expected(one.prompt_token_ids, one.params)
    assert fast.tokens_of(1) == plain.tokens_of(1) == want
    assert fast.finish_of(1) == plain.finish_of(1) == reason
    assert fast.runner.num_steps < 0.6 * plain.runner.num_steps  # every twelfth token breaks the period
    stats = fast.scheduler.stats()
    assert stats.accepted_tokens + fast.runner.num_steps == pytest.approx(300, abs=2)
    assert stats.draft_tokens >= stats.accepted_tokens > 100
    assert stats.num_drafts > 10
    assert plain.scheduler.stats().num_drafts == 0


def test_a_text_that_does_not_repeat_is_left_alone():
    fast = machine()
    fast.add(submit(1, 200, max_tokens=300, seed=1))
    fast.run()
    assert fast.scheduler.stats().draft_tokens < 10


def simulated_seconds(*, seed: int, speculation: bool, batch: int = 1, row: float = 0.04) -> float:
    """Time of 400 tokens each if a step takes 1 and `row` for each row, and waiting for a commit costs 0.01."""
    timed = Machine(make_scheduler(num_blocks=256, batch_size=batch, speculation=speculation))
    timed.runner.seconds_of = lambda plan: 1.0 + row * plan.num_tokens
    timed.add(*[submit(seq_id, 100, max_tokens=400, seed=seed + seq_id) for seq_id in range(batch)])
    total = 0.0
    while timed.scheduler.has_unfinished or timed.plans:
        plan = timed.plan() if len(timed.plans) < 2 else None
        if timed.plans and (plan is None or len(timed.plans) == 2):
            total += timed.runner.seconds_of(timed.plans[0]) + 0.01 * (plan is None)
            timed.commit()
    return total


@pytest.mark.parametrize("row", [0.002, 0.04, 0.3])
@pytest.mark.parametrize("batch", [1, 4, 16])
def test_a_text_where_drafts_fail_loses_at_most_three_percent(batch, row):
    plain, fast = (simulated_seconds(seed=NOISE, speculation=on, batch=batch, row=row) for on in (False, True))
    assert fast <= 1.03 * plain


def test_a_text_that_repeats_gains_half_as_much_again_alone_and_never_loses_in_a_batch():
    for batch, ratio in ((1, 1.5), (4, 1.2), (16, 1.0)):
        plain, fast = (simulated_seconds(seed=COPYING, speculation=on, batch=batch) for on in (False, True))
        assert plain >= ratio * fast, batch


def test_a_request_decides_for_itself():
    off, on = machine(), Machine(make_scheduler(num_blocks=64))
    off.add(submit(1, 40, max_tokens=100, seed=COPYING, speculation=False))
    on.add(submit(1, 40, max_tokens=100, seed=COPYING, speculation=True))
    for each in (off, on):
        each.run()
    assert off.scheduler.stats().num_drafts == 0
    assert on.scheduler.stats().num_drafts > 0


def test_nothing_is_planned_behind_a_draft_and_neighbours_go_on_in_every_step():
    both = machine()
    both.add(
        submit(1, 40, max_tokens=200, seed=COPYING, speculation=True),
        submit(2, 40, max_tokens=60, seed=1, speculation=False),
    )
    drafted = 0
    while both.finish_of(2) is None:
        plan = both.plan() if len(both.plans) < 2 else None
        if plan is not None and plan.sequences[0].num_drafts:
            drafted += 1
            if len(both.plans) < 2:
                assert both.plan() is None
        if both.plans and (plan is None or len(both.plans) == 2):
            steps = both.plans[0].sequences
            outputs = both.commit()
            assert [output.seq_id for output in outputs] == [step.seq_id for step in steps]
    both.run()
    assert drafted > 5
    assert both.tokens_of(2) == expected(tokens(40, first=2), submit(2, max_tokens=60, seed=1).params)[0]


def test_a_draft_may_follow_a_token_that_is_not_known_yet():
    ahead = machine()
    ahead.add(submit(1, [*range(20, 40)] * 3, max_tokens=50, seed=COPYING + 5))
    plans = []
    while ahead.scheduler.has_unfinished or ahead.plans:
        plan = ahead.plan() if len(ahead.plans) < 2 else None
        if plan is not None:
            plans += plan.sequences
        if ahead.plans and (plan is None or len(ahead.plans) == 2):
            ahead.commit()
    assert any(step.num_drafts and step.token_ids[0] == PENDING for step in plans)
    assert all(step.drafts == step.token_ids[1:] for step in plans if step.num_drafts)


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 17, 18, 19, 20, 21, 22, 23])
def test_the_limit_holds_inside_a_draft(max_tokens):
    short = machine()
    one = submit(1, [*range(9)] * 6, max_tokens=max_tokens, seed=COPYING + 2)
    short.add(one)
    short.run()
    assert (short.tokens_of(1), short.finish_of(1)) == expected(one.prompt_token_ids, one.params)


@pytest.mark.parametrize("min_tokens", [1, 14, 15, 60])
@pytest.mark.parametrize("end", range(9))
def test_an_end_token_inside_a_draft_is_the_last_one(end, min_tokens):
    ended = machine()
    one = submit(
        1, [*range(9)] * 6, max_tokens=80, seed=COPYING + 3, end_token_ids=(end,), min_tokens=min_tokens, logprobs=0
    )
    ended.add(one)
    ended.run()
    assert (ended.tokens_of(1), ended.finish_of(1)) == expected(one.prompt_token_ids, one.params)
    entries = [entry.token_id for output in ended.outputs[1] for entry in output.logprobs]
    assert entries == ended.tokens_of(1)


def test_the_context_bounds_a_draft():
    bounded = machine(context=100)
    one = submit(1, [*range(9)] * 6, max_tokens=500, seed=COPYING + 4)
    bounded.add(one)
    bounded.run()
    assert (bounded.tokens_of(1), bounded.finish_of(1)) == expected(one.prompt_token_ids, one.params, context=100)


def test_only_tokens_that_came_true_are_cached():
    """The second request finds the first one's output; the fake runner checks what is in every block it attends to."""
    chat = machine()
    one = submit(1, [*range(9)] * 8, max_tokens=150, seed=COPYING + 6)
    chat.add(one)
    chat.run()
    chat.add(submit(2, [*one.prompt_token_ids, *chat.tokens_of(1), 5], max_tokens=80, seed=COPYING + 7))
    chat.run()
    assert chat.outputs[2][0].cached_tokens == 192
    assert (
        chat.tokens_of(2)
        == expected([*one.prompt_token_ids, *chat.tokens_of(1), 5], submit(2, max_tokens=80, seed=COPYING + 7).params)[
            0
        ]
    )


def test_a_draft_takes_nobodys_blocks():
    """Four sequences that fill the pool: whatever is preempted, outputs are exact and the books balance."""
    tight = Machine(make_scheduler(num_blocks=9, speculation=True))
    wanted = [submit(seq_id, [*range(seq_id, 9 + seq_id)] * 7, max_tokens=100, seed=COPYING) for seq_id in range(4)]
    tight.add(*wanted)
    tight.run()
    stats = tight.scheduler.stats()
    assert stats.num_preemptions > 0
    assert stats.accepted_tokens > 0
    for one in wanted:
        assert tight.tokens_of(one.seq_id) == expected(one.prompt_token_ids, one.params, capacity=9 * 64)[0]


def test_cancelling_and_failing_with_a_draft_under_way_frees_the_blocks():
    for end in ("abort", "fail"):
        both = machine()
        both.add(submit(1, [*range(9)] * 6, max_tokens=200, seed=COPYING))
        while not (both.plans and both.plans[-1].sequences[0].num_drafts):
            plan = both.plan()
            if plan is None or (len(both.plans) == 2 and not plan.sequences[0].num_drafts):
                both.commit()
        if end == "abort":
            both.abort(1)
            both.run()
        else:
            while len(both.plans) > 1:
                both.commit()
            both.scheduler.fail(both.plans.pop(), "failed")
            both.runner.queue.clear()
        both.scheduler.check_integrity()
        assert not both.scheduler.has_unfinished
        assert both.scheduler.stats().num_used_blocks == 0


def test_a_block_is_added_when_a_draft_reaches_past_the_table():
    crossing = machine()
    crossing.add(submit(1, [*range(9)] * 6, max_tokens=200, seed=COPYING + 8))
    ends = []
    while crossing.scheduler.has_unfinished or crossing.plans:
        plan = crossing.plan() if len(crossing.plans) < 2 else None
        if plan is not None:
            ends += [(step.start, step.end) for step in plan.sequences if step.num_drafts]
        if crossing.plans and (plan is None or len(crossing.plans) == 2):
            crossing.commit()
    assert any(start // 64 < (end - 1) // 64 for start, end in ends)


def test_a_sampled_token_has_nothing_behind_it_by_default():
    assert Sampled(3).more == ()
