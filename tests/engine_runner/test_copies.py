"""A step's traffic: one copy to the device, one back, whatever its sequences ask for; and nothing waits in between.

Copies are counted where torch makes them: all that touch memory which the queue handed out for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine_runner import test_speculation_bits as speculation
from engine_runner.plans import Driver, params, step
from engine_runner.test_gpu_runner import (
    CPU,
    PROMPT,
    SlowMark,
    generate,
    load_model,
    make_runner,
    mixed_requests,
    plain,
)
from octavo.engine.device_queue import Body, ImmediateQueue
from octavo.engine.gpu_runner import GpuRunner
from octavo.engine.interface import Runner
from octavo.engine.newest_tokens import settle_counts
from octavo.kernels.reference import ReferenceKernels
from octavo.protocol.messages import Submit
from octavo.scheduling.plan import StepPlan

__all__ = ["plain"]  # a fixture


class Traffic(ImmediateQueue):
    """Counts copies out of host memory that it gave, and into it."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.hosts: list[Tensor] = []
        self.uploads = self.downloads = 0

    def host_memory(self, num_bytes: int) -> Tensor:
        self.hosts.append(super().host_memory(num_bytes))
        return self.hosts[-1]

    def mark(self) -> SlowMark:
        return SlowMark()

    def entered(self) -> AbstractContextManager[object]:
        return _Watch(self)

    def capture(self, body: Body) -> Body:
        body()
        return body

    def is_host(self, tensor: Tensor) -> bool:
        return any(tensor.untyped_storage().data_ptr() == host.untyped_storage().data_ptr() for host in self.hosts)


class _Watch(TorchDispatchMode):
    """Sees every operation of the worker thread."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self._traffic = traffic

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default:
            target, source = args[0], args[1]
            self._traffic.uploads += self._traffic.is_host(source)
            self._traffic.downloads += self._traffic.is_host(target)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def traffic() -> Traffic:
    return Traffic()


@pytest.fixture
def runner(tiny_folder: Path, plain: Runner, traffic: Traffic) -> Iterator[GpuRunner]:
    made = make_runner(load_model(tiny_folder, ReferenceKernels()), plain, traffic)
    yield made
    made.close()


def copies(runner: GpuRunner, traffic: Traffic, *plans: StepPlan) -> tuple[int, int]:
    """Uploads and downloads of plans, run one by one."""
    before = traffic.uploads, traffic.downloads
    for plan in plans:
        runner.submit(plan)
        runner.collect()
    return traffic.uploads - before[0], traffic.downloads - before[1]


KINDS = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "top_p": 0.9, "seed": 4},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "logit_bias": {5: 1.0}},
    "log probabilities": {"logprobs": 3},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_decode_step_copies_once_each_way(runner: GpuRunner, traffic: Traffic, kind: str) -> None:
    wanted = params(**KINDS[kind])  # type: ignore[arg-type]
    first = StepPlan(1, [step(slot, PROMPT[slot:], params=wanted, history=PROMPT[slot:]) for slot in (0, 3)])
    assert copies(runner, traffic, first) == (1, 1)
    for turn in (1, 2, 3):
        sequences = [
            step(slot, [7], params=wanted, start=69 - slot + turn, prompt_len=70 - slot, num_outputs=turn)
            for slot in (0, 3)
        ]
        assert copies(runner, traffic, StepPlan(1 + turn, sequences)) == (1, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_with_prompts_copies_once_each_way(runner: GpuRunner, traffic: Traffic, kind: str) -> None:
    """A decode beside a part of a prompt whose log probabilities are wanted, and a part that samples nothing."""
    wanted = params(**KINDS[kind], prompt_logprobs=2)  # type: ignore[arg-type]
    copies(runner, traffic, StepPlan(1, [step(0, PROMPT, params=params(), history=PROMPT)]))
    sequences = [
        step(0, [7], params=params(), start=70, prompt_len=70, num_outputs=1),
        step(1, PROMPT[:40], params=wanted, prompt_len=70, history=PROMPT, sample=False),
    ]
    assert copies(runner, traffic, StepPlan(2, sequences)) == (1, 1)
    rest = step(1, PROMPT[40:], params=wanted, start=40, prompt_len=70)
    silent = step(2, PROMPT[:9], params=params(), prompt_len=70, history=PROMPT, sample=False)
    assert copies(runner, traffic, StepPlan(3, [rest, silent])) == (1, 1)
    assert copies(runner, traffic, StepPlan(4, [step(2, PROMPT[9:19], params=params(), start=9, sample=False)])) == (
        1,
        0,
    )


def test_copies_of_a_whole_run(runner: GpuRunner, plain: Runner, traffic: Traffic) -> None:
    """Through the scheduler, steps queued before the ones ahead are done: also penalties of tokens yet to come."""
    plans: list[StepPlan] = []
    traffic.uploads = traffic.downloads = 0  # not those of recording
    submit = runner.submit
    runner.submit = lambda plan: (plans.append(plan), submit(plan))[1]  # type: ignore[method-assign]
    assert generate(runner, mixed_requests()) == generate(plain, mixed_requests())
    assert len(plans) > 30
    assert traffic.uploads == sum(bool(plan.sequences) for plan in plans)
    assert traffic.downloads <= len(plans)


def test_drafts_beside_tokens_yet_to_come(runner: GpuRunner, plain: Runner) -> None:
    """Guessed tokens, penalties and all: with and without speculation, the tokens of the plain runner."""
    submits = [Submit(place, speculation.WORDS * 4, wanted) for place, wanted in enumerate(speculation.CASES.values())]
    expected, _ = speculation.run(plain, submits, speculation="none")
    for mode in ("none", "ngram"):
        found, stats = speculation.run(runner, submits, speculation=mode, budget=30)
        assert (stats.accepted_tokens > 20) == (mode == "ngram")
        for submit in submits:
            assert speculation.said(found[submit.seq_id]) == speculation.said(expected[submit.seq_id])


def test_long_lists_move_the_staging_and_recorded_steps_go_on(
    tiny_folder: Path, plain: Runner, traffic: Traffic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octavo.engine.gpu_steps.SAMPLING_ROOM", 4096)
    runner = make_runner(load_model(tiny_folder, ReferenceKernels()), plain, traffic)
    wanted = params(repetition_penalty=1.2, logit_bias={token: 0.5 for token in range(150)})
    short = params(temperature=1.0, seed=2)
    for kind in (short, wanted, short, wanted):
        tokens = Driver(runner, slot=1).run(PROMPT, kind, count=9)
        assert tokens == Driver(plain, slot=1).run(PROMPT, kind, count=9)
    runner.close()


def test_newest_tokens_join_lists_of_what_was_seen() -> None:
    """Four rows: a token that is new, one that is listed, a row that waits for nothing, and one without a list."""
    last_token = torch.tensor([40, 7, 99, 0])
    start = torch.tensor([0, 3, 6, 8, 8], dtype=torch.int32)
    ids = torch.tensor([3, 4, -1, 7, 8, -2, 40, 7], dtype=torch.int32)
    counts = torch.tensor([0, 2, 1, 0, 5, 1, 1, 0], dtype=torch.int32)
    found, times = settle_counts(start, ids, counts, last_token)
    assert found.tolist() == [3, 4, 40, 7, 8, -1, 40, 7]
    assert times.tolist() == [0, 2, 1, 1, 5, 1, 1, 0]
    assert found.dtype == times.dtype == torch.int32
