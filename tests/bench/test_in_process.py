"""The engine in this process, with a runner that has no model."""

from __future__ import annotations

import time

import pytest

from octavo.cli.bench.drive import Plan, Run
from octavo.cli.bench.figures import summarize
from octavo.cli.bench.in_process import EngineDriver
from octavo.cli.bench.work import Item, arrivals
from octavo.engine.core import EngineCore, make_scheduler
from scheduling.fake_runner import FakeRunner, make_info


def make_core(*, step_seconds: float = 0.0) -> EngineCore:
    runner = FakeRunner(make_info(64), before_step=lambda plan: time.sleep(step_seconds))
    scheduler = make_scheduler(runner.info, max_num_batched_tokens=128, prefix_cache=True)
    return EngineCore(scheduler, runner, time.monotonic)


def drive(core: EngineCore, items: list[Item], *, due: list[float], limit: int | None) -> Run:
    run = Run(0.0, [])
    driver = EngineDriver(core, temperature=0.0, seed=0)
    driver.drive(Plan(items, due, limit, 60.0), run, lambda item: list(item.token_ids or ()), lambda outcome: None)
    return run


def items_of(count: int, *, output: int) -> list[Item]:
    return [Item(output, token_ids=tuple(range(index, index + 20))) for index in range(count)]


@pytest.mark.parametrize("limit", [1, 3, None])
def test_all_tokens_of_all_requests_are_counted(limit: int | None) -> None:
    run = drive(make_core(), items_of(10, output=7), due=[0.0] * 10, limit=limit)
    summary = summarize(run.outcomes, began=run.began)
    assert (summary["completed"], summary["output_tokens"], summary["input_tokens"]) == (10, 70, 200)
    assert summary["most_at_once"] <= (limit or 10)
    assert summary["tokens_counted_by"] == {"ids": 10}


def test_requests_start_when_they_are_due() -> None:
    due = arrivals(8, 100.0, seed=1)
    run = drive(make_core(step_seconds=0.001), items_of(8, output=3), due=due, limit=None)
    sent = sorted(outcome.sent - run.began for outcome in run.outcomes)
    assert all(at >= wanted for at, wanted in zip(sent, due))
    assert sent[-1] < due[-1] + 0.5


def test_what_the_engine_refuses_is_a_failure() -> None:
    items = [Item(4, token_ids=(1, 2, 3)), Item(4, token_ids=(1, 99_999))]
    run = drive(make_core(), items, due=[0.0, 0.0], limit=2)
    summary = summarize(run.outcomes, began=run.began)
    assert (summary["completed"], summary["failed"]) == (1, 1)
    assert "token id" in summary["errors"]["engine error"]["first"]
