"""The engine loop's body over the fake runner."""

from __future__ import annotations

import logging

import pytest

from octavo.engine.core import EngineCore, StepTimes, default_budget, make_scheduler
from octavo.engine.interface import RunnerError, StepOutOfMemory
from octavo.protocol.messages import SequenceOutput
from scheduling.factories import submit, tokens
from scheduling.fake_runner import FakeRunner, expected, make_info


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_core(*, num_blocks: int = 16, budget: int = 256, **runner_args) -> EngineCore:
    runner = FakeRunner(make_info(num_blocks), **runner_args)
    scheduler = make_scheduler(runner.info, max_num_batched_tokens=budget, prefix_cache=True)
    return EngineCore(scheduler, runner, Clock(), new_incident=lambda: "abc123")


def drain(core: EngineCore) -> dict[int, list[SequenceOutput]]:
    outputs: dict[int, list[SequenceOutput]] = {}
    while core.has_work:
        for output in core.turn():
            outputs.setdefault(output.seq_id, []).append(output)
        core.scheduler.check_integrity()
    return outputs


def test_sequences_run_to_their_end():
    core = make_core(num_blocks=4)
    submits = [submit(seq_id, 50 + 20 * seq_id, max_tokens=30, seed=seq_id) for seq_id in range(5)]
    for one in submits:
        assert core.add(one) == []
    outputs = drain(core)
    for one in submits:
        want, reason = expected(one.prompt_token_ids, one.params, capacity=4 * 64)
        assert [token for output in outputs[one.seq_id] for token in output.token_ids] == want
        assert outputs[one.seq_id][-1].finish_reason == reason


def test_an_idle_core_has_no_work_and_no_deadline():
    core = make_core()
    assert not core.has_work
    assert core.turn() == []
    assert core.stats().step_deadline == 0.0


def test_two_plans_are_under_way_before_the_first_is_collected():
    core = make_core()
    core.add(submit(1, max_tokens=5))
    assert core.turn() == []
    assert core.runner.num_steps == 0
    assert len(core.turn()) == 1
    assert len(core.runner.queue) == 1


def test_a_sequence_that_can_never_run_ends_at_once():
    (output,) = make_core(num_blocks=1).add(submit(1, 100))
    assert output.finish_reason == "error"
    assert "cache" in output.error


def test_nobody_waits_whom_no_plan_passed_over():
    core = make_core(num_blocks=64)
    slots = core.runner.info.batch_size
    for seq_id in range(slots + 2):
        core.add(submit(seq_id, max_tokens=3))
    assert core.stats().num_waiting == 0
    core.turn()
    assert (core.stats().num_running, core.stats().num_waiting) == (slots, 2)
    core.add(submit(100, max_tokens=3))
    assert core.stats().num_waiting == 2
    core.turn()
    assert core.stats().num_waiting == 3
    drain(core)
    assert core.stats().num_waiting == 0


def test_an_aborted_sequence_leaves_nothing_behind():
    core = make_core()
    core.add(submit(1, 200, max_tokens=50))
    core.turn()
    core.turn()
    (output,) = core.abort([1, 77])
    assert (output.seq_id, output.finish_reason) == (1, "cancelled")
    assert core.has_work
    assert drain(core) == {}
    stats = core.stats()
    assert stats.num_used_blocks == 0
    assert stats.num_running == 0


def test_a_failed_step_ends_its_sequences_with_an_id_and_the_others_go_on(caplog):
    def fail_once(plan):
        if plan.step_id == 2:
            raise RunnerError("out of luck")

    core = make_core(budget=64, before_step=fail_once)
    late = submit(2, tokens(90, first=3), max_tokens=6)
    core.add(submit(1, 50, max_tokens=40))
    core.turn()
    core.turn()
    core.add(late)
    with caplog.at_level(logging.ERROR):
        outputs = drain(core)
    assert outputs[1][-1].finish_reason == "error"
    assert outputs[1][-1].error == "the step failed (id abc123)"
    assert "abc123" in caplog.text
    assert "out of luck" in caplog.text
    want, _ = expected(late.prompt_token_ids, late.params)
    assert [token for output in outputs[2] for token in output.token_ids] == want


def test_a_step_without_memory_says_what_to_lower_and_the_next_requests_run():
    def fail_once(plan):
        if plan.step_id == 1:
            raise StepOutOfMemory("out of device memory: lower BATCH_SIZE")

    core = make_core(before_step=fail_once)
    core.add(submit(1, 50, max_tokens=4))
    outputs = drain(core)
    assert outputs[1][-1].error == "out of device memory: lower BATCH_SIZE (id abc123)"
    late = submit(2, 50, max_tokens=4)
    core.add(late)
    want, _ = expected(late.prompt_token_ids, late.params)
    assert [token for output in drain(core)[2] for token in output.token_ids] == want


def test_a_plan_that_the_runner_refuses_fails_in_its_turn():
    core = make_core()
    accept = core.runner.submit

    def refuse_second(plan):
        if plan.step_id == 2:
            raise RunnerError("no")
        core.runner.slots.clear()  # of its sequence the runner knows nothing right any more
        accept(plan)

    core.runner.submit = refuse_second
    core.add(submit(1, max_tokens=5))
    outputs = drain(core)
    assert [len(output.token_ids) for output in outputs[1]] == [1, 0]
    assert outputs[1][-1].finish_reason == "error"


def test_other_errors_of_the_runner_are_not_hidden():
    def crash(plan):
        raise KeyError("bug")

    core = make_core(before_step=crash)
    core.add(submit(1))
    core.turn()
    with pytest.raises(KeyError):
        core.turn()
    (output,) = core.fail_all("gone")
    assert (output.finish_reason, output.error) == ("error", "gone")


def test_the_deadline_is_that_of_the_oldest_step():
    core = make_core()
    core.add(submit(1, max_tokens=5))
    core.turn()
    assert core.stats().step_deadline == 100.0 + core.times.first
    core.clock.now = 105.0
    core.turn()
    assert core.stats().last_progress == 105.0
    assert core.stats().step_deadline == 105.0 + core.times.first
    drain(core)
    assert core.stats().step_deadline == 0.0


def test_deadlines_follow_measured_times_generously():
    times = StepTimes()
    for _ in range(3):
        times.measured(0.05, num_tokens=8)
    assert times.allowed(num_tokens=8) == 10.0
    assert times.allowed(num_tokens=8 * 64) == pytest.approx(20 * 0.05 * 64)
    assert times.allowed(num_tokens=1) == 10.0
    assert times.allowed(num_tokens=1 << 20) == times.most


def test_the_default_budget_serves_a_full_batch_and_a_chunk():
    info = make_info(batch_size=8)
    assert default_budget(info) > 8
