"""Larger steps of prompts while nobody waits for a next token."""

from __future__ import annotations

import dataclasses

import pytest

from octavo.scheduling.idle_chunk import IdleChunk
from octavo.scheduling.plan import Sampled, StepPlan, StepResult
from octavo.scheduling.scheduler import Scheduler
from scheduling.factories import make_scheduler, submit


@pytest.mark.parametrize(("rate", "tokens"), [(100, 160), (800, 400), (5000, 512)])
def test_as_many_tokens_as_take_half_a_second(rate: float, tokens: int) -> None:
    chunk = IdleChunk(least=160, most=512)
    assert chunk.tokens == 160
    chunk.measured(160, 160 / rate)
    assert chunk.tokens == tokens


def test_small_steps_and_unmeasured_ones_say_nothing() -> None:
    chunk = IdleChunk(least=160, most=512)
    chunk.measured(32, 0.001)
    chunk.measured(160, 0.0)
    assert chunk.tokens == 160


def test_a_budget_above_the_most_stays() -> None:
    chunk = IdleChunk(least=4096, most=512)
    chunk.measured(4096, 0.1)
    assert chunk.tokens == 4096


def test_a_slower_machine_gets_smaller_chunks_again() -> None:
    chunk = IdleChunk(least=160, most=512)
    chunk.measured(512, 0.25)
    for _ in range(30):
        chunk.measured(512, 2.0)
    assert chunk.tokens == 160


def run(scheduler: Scheduler, *, rate: float) -> StepPlan:
    """One step at so many tokens a second."""
    plan = scheduler.schedule(0.0)
    assert plan is not None
    drawn = [Sampled(5) if step.sample else None for step in plan.sequences]
    scheduler.commit(plan, StepResult(plan.step_id, drawn, [None] * len(drawn), plan.num_tokens / rate))
    return plan


def idle_scheduler() -> Scheduler:
    scheduler = make_scheduler(num_blocks=64, budget=128)
    return Scheduler(scheduler.pool, dataclasses.replace(scheduler.limits, max_idle_tokens=512))


def test_a_prompt_alone_goes_on_in_larger_steps() -> None:
    scheduler = idle_scheduler()
    scheduler.add(submit(1, 1500))
    assert [run(scheduler, rate=2000).num_tokens for _ in range(4)] == [128, 512, 512, 348]


def test_steps_beside_a_decode_keep_the_budget() -> None:
    scheduler = idle_scheduler()
    scheduler.add(submit(1, 100, max_tokens=50))
    run(scheduler, rate=2000)
    scheduler.add(submit(2, 1000))
    assert [step.num_tokens for step in run(scheduler, rate=2000).sequences] == [1, 127]


def test_without_the_limit_nothing_changes() -> None:
    scheduler = make_scheduler(num_blocks=64, budget=128)
    scheduler.add(submit(1, 600))
    assert [run(scheduler, rate=1e9).num_tokens for _ in range(4)] == [128, 128, 128, 128]
