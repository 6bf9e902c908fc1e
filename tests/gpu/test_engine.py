"""The whole engine on a card: recorded steps against single operations, crowds, prefixes, and running out of memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from octavo.engine.core import EngineCore, default_budget, make_scheduler
from octavo.engine.decode_graphs import DecodeGraphs
from octavo.engine.gpu_runner import GpuRunner
from octavo.engine.gpu_steps import GpuSteps, Queued
from octavo.engine.interface import Runner
from octavo.protocol.messages import SamplingParams, Submit
from octavo.scheduling.plan import StepPlan
from octavo.settings import with_overrides

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"))

from gpu_model import TINY, make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny"), TINY)


@pytest.fixture
def runner(folder: Path) -> Iterator[Runner]:
    made = load(folder)
    yield made
    made.close()


def load(folder: Path, **others: object) -> Runner:
    from octavo.engine.load import load_runner

    small = {"max_seq_len": 2048, "max_dec_len": 256, "batch_size": 12, "kv_memory_fraction": 0.05}
    settings = with_overrides({"model_dir": str(folder), "device": "cuda", **small, **others})
    return load_runner(settings, lambda stage, fraction: None)


def generate(
    runner: Runner, submits: list[Submit], *, prefix_cache: bool = False, budget: int = 0
) -> dict[int, list[int]]:
    """Token ids of requests that come one after the other, two turns apart."""
    budget = budget or default_budget(runner.info)
    core = EngineCore(
        make_scheduler(runner.info, max_num_batched_tokens=budget, prefix_cache=prefix_cache), runner, lambda: 0.0
    )
    tokens: dict[int, list[int]] = {submit.seq_id: [] for submit in submits}
    waiting, turn = list(submits), 0
    while waiting or core.has_work:
        if waiting and turn % 2 == 0:
            core.add(waiting.pop(0))
        for output in core.turn():
            assert output.error is None
            tokens[output.seq_id] += output.token_ids
        turn += 1
    return tokens


def requests(count: int = 9) -> list[Submit]:
    """Prompts of 20 to 900 tokens, greedy and sampled, with and without penalties."""
    generator = torch.Generator().manual_seed(6)
    found = []
    for index in range(count):
        prompt = torch.randint(3, TINY.vocab, (20 + 110 * index,), generator=generator).tolist()
        kind = SamplingParams(
            max_tokens=40,
            temperature=0.9 * (index % 3),
            top_p=0.9,
            seed=index,
            repetition_penalty=1.0 + 0.1 * (index % 2),
        )
        found.append(Submit(index, prompt, kind))
    return found


def test_it_is_the_gpu_runner(runner: Runner) -> None:
    assert isinstance(runner, GpuRunner)
    assert runner.info.kernels == "gpu"


def test_recorded_steps_equal_single_operations(runner: Runner, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = generate(runner, requests())
    runs = []
    monkeypatch.setattr(DecodeGraphs, "run", lambda *_: runs.append(1))
    monkeypatch.setattr(GpuSteps, "prepare", lambda *_: None)
    monkeypatch.setattr("octavo.engine.gpu_steps.is_decode", lambda *_: False)
    plain = load(folder)
    assert generate(plain, requests()) == recorded
    assert not runs
    plain.close()


def test_alone_in_a_crowd_in_chunks_and_after_a_prefix_hit(runner: Runner) -> None:
    crowd = generate(runner, requests())
    assert generate(runner, requests(), budget=64) == crowd
    alone: dict[int, list[int]] = {}
    for request in requests():
        alone |= generate(runner, [request])
    assert alone == crowd
    twice = [*requests(), *(Submit(100 + r.seq_id, r.prompt_token_ids, r.params) for r in requests())]
    cached = generate(runner, twice, prefix_cache=True)
    assert {seq_id % 100: tokens for seq_id, tokens in cached.items() if seq_id >= 100} == crowd


def test_a_steady_state_never_waits_for_the_device(runner: Runner) -> None:
    """Torch raises wherever a step would: the same requests again find all kernels compiled and all steps recorded."""
    expected = generate(runner, requests())
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert generate(runner, requests()) == expected
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_that_does_not_fit_is_one_error_and_the_next_one_works(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(runner, requests(2))
    real = GpuSteps.queue
    failed: list[bool] = []

    def too_large(self: GpuSteps, plan: StepPlan, now: float) -> Queued:
        if not failed:
            failed.append(True)
            torch.empty(1 << 46, dtype=torch.uint8, device="cuda")
        return real(self, plan, now)

    monkeypatch.setattr(GpuSteps, "queue", too_large)
    core = EngineCore(make_scheduler(runner.info, max_num_batched_tokens=64, prefix_cache=False), runner, lambda: 0.0)
    core.add(requests(1)[0])
    errors = []
    while core.has_work:
        errors += [output.error for output in core.turn() if output.error]
    assert failed
    assert len(errors) == 1
    assert generate(runner, requests(2)) == expected
