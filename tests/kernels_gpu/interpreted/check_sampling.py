"""Run by test_interpreter.py under TRITON_INTERPRET=1: draws and log-probabilities equal the reference."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.test_sampling import INF, Row, draw, rows_of
from octavo.kernels.gpu import sampling
from octavo.kernels.gpu.backend import GpuKernels
from octavo.kernels.reference import ReferenceKernels

GPU = GpuKernels(torch.device("cpu"))
REFERENCE = ReferenceKernels()


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of some hundred logits take several blocks."""
    monkeypatch.setattr(sampling, "LARGEST_BLOCK", 64)


def some_row(choice: random.Random) -> Row:
    """Any parameters."""
    return Row(
        temperature=choice.choice([0.0, 0.01, 0.7, 1.0, 3.0, 100.0]),
        top_p=choice.choice([0.0, 0.1, 0.5, 0.9, 0.999, 1.0]),
        top_k=choice.choice([0, 0, 1, 2, 7, 40, 1000]),
        min_p=choice.choice([0.0, 0.0, 0.05, 0.5, 1.0]),
        seed=choice.randrange(-(2**63), 2**63),
        position=choice.randrange(2**40),
        repetition=choice.choice([1.0, 1.3, 0.5]),
        frequency=choice.choice([0.0, 0.4, -1.0]),
        presence=choice.choice([0.0, 0.7]),
        seen={i: choice.randrange(5) for i in choice.sample(range(5), choice.randrange(4))},
        bias={i: choice.choice([-INF, -3.0, 0.5, 100.0]) for i in choice.sample(range(5), choice.randrange(3))},
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [5, 150])
def test_draws_equal_the_reference(size: int, seed: int) -> None:
    choice = random.Random(seed)
    rows = [some_row(choice) for _ in range(4)]
    logits = torch.randn(4, size, generator=torch.Generator().manual_seed(seed)) * choice.choice([0.0, 0.01, 1.0, 10.0])
    logits = logits.round() if seed % 2 else logits
    assert draw(GPU, logits, rows) == draw(REFERENCE, logits, rows)


def test_extremes_are_answered() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 2.0], [-INF, -INF, -3.0, -INF], [float("nan"), 1.0, 0.0, 1.0]])
    assert draw(GPU, logits, [Row(temperature=0.0)] * 3) == [1, 2, 1]
    logits = torch.tensor([[-INF] * 5, [float("nan")] * 5, [1.0, INF, 0.0, INF, 0.0]])
    assert draw(GPU, logits, [Row(), Row(top_p=0.5), Row(top_k=2)]) == [0, 0, 1]


def test_ties_go_to_lower_ids_across_blocks() -> None:
    logits = torch.zeros(1, 200)
    drawn = {draw(GPU, logits, [Row(top_k=70, position=i)])[0] for i in range(12)}
    assert drawn == {draw(REFERENCE, logits, [Row(top_k=70, position=i)])[0] for i in range(12)}
    assert max(drawn) < 70


def test_top_ids_are_those_of_a_stable_sort() -> None:
    """Equals across blocks, both zeros, infinities, NaN, all ids of a row; and a row is not looked at by another."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 150, generator=generator)
    logits[1] = 0.0
    logits[1, 5::7] = -0.0
    logits[2] = (logits[2] * 2).round()
    logits[3, ::3], logits[3, 1::3] = -INF, INF
    logits[4, [7, 70, 140]] = float("nan")
    logits[5, :149] = -INF
    tokens = torch.zeros(6, dtype=torch.int64)
    for num_top in (1, 20):
        found = GPU.logprobs(logits, tokens, num_top)[2]
        assert torch.equal(found, torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :num_top])
        assert torch.equal(GPU.logprobs(logits[2:3], tokens[:1], num_top)[2], found[2:3])
    few = logits[:, :70].contiguous()
    assert torch.equal(GPU.logprobs(few, tokens, 70)[2], torch.sort(few, dim=1, descending=True, stable=True).indices)


class _Run(TorchDispatchMode):
    """Names of the operations that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_nothing_is_sorted() -> None:
    logits, tokens = torch.randn(3, 150), torch.zeros(3, dtype=torch.int64)
    rows = rows_of([Row(top_k=5, top_p=0.9, seen={1: 2}, bias={4: 1.0})] * 3)
    with _Run() as run:
        GPU.sample(logits, rows)
        GPU.logprobs(logits, tokens, 20)
    assert "aten.gather.default" in run.names
    assert not any("sort" in name or "topk" in name for name in run.names)


def test_logprobs_equal_the_reference() -> None:
    logits = torch.randn(5, 150) * 4
    logits[1] = logits[1].round()
    logits[2, ::2] = -INF
    tokens = torch.randint(0, 150, (5,))
    for num_top in (0, 4):
        ours, theirs = (k.logprobs(logits, tokens, num_top) for k in (GPU, REFERENCE))
        assert torch.equal(ours[1], theirs[1])
        assert torch.equal(ours[2], theirs[2])
        for a, b in ((ours[0], theirs[0]), (ours[3], theirs[3])):
            assert torch.allclose(a, b, rtol=3e-7, atol=1e-12)
