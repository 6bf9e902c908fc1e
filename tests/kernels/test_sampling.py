"""Sampling: every backend draws the same token, from the distribution that was asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.backends import COMPILED, MakeKernels
from kernels.steps import ints
from octavo.kernels.interface import Kernels, SamplingRows
from octavo.kernels.reference.sampling import splitmix64, uniform

INF = float("inf")


@dataclass
class Row:
    """One row's parameters; seen is {token: times in the output}, bias {token: value}."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    seen: dict[int, int] = field(default_factory=dict)
    bias: dict[int, float] = field(default_factory=dict)


def rows_of(rows: list[Row]) -> SamplingRows:
    """The tensors of these rows."""
    seen, bias = [list(row.seen.items()) for row in rows], [list(row.bias.items()) for row in rows]
    return SamplingRows(
        temperature=torch.tensor([row.temperature for row in rows]),
        top_p=torch.tensor([row.top_p for row in rows]),
        top_k=ints([row.top_k for row in rows]),
        min_p=torch.tensor([row.min_p for row in rows]),
        seed=torch.tensor([row.seed for row in rows]),
        position=torch.tensor([row.position for row in rows]),
        repetition_penalty=torch.tensor([row.repetition for row in rows]),
        frequency_penalty=torch.tensor([row.frequency for row in rows]),
        presence_penalty=torch.tensor([row.presence for row in rows]),
        seen_start=starts(seen),
        seen_ids=ints([token for items in seen for token, _ in items]),
        seen_counts=ints([count for items in seen for _, count in items]),
        bias_start=starts(bias),
        bias_ids=ints([token for items in bias for token, _ in items]),
        bias_values=torch.tensor([value for items in bias for _, value in items], dtype=torch.float32),
    )


def starts(lists: list[list[tuple[int, float]]]) -> Tensor:
    return ints([0, *torch.tensor([len(items) for items in lists]).cumsum(0).tolist()])


def draw(kernels: Kernels, logits: Tensor, rows: list[Row]) -> list[int]:
    return kernels.sample(logits.clone(), rows_of(rows)).tolist()


def draws(kernels: Kernels, logits: list[float], row: Row, count: int) -> list[int]:
    """`count` draws of one row at positions 0, 1, …"""
    rows = [Row(**{**vars(row), "position": i}) for i in range(count)]
    return draw(kernels, torch.tensor([logits] * count), rows)


some_rows = st.builds(
    Row,
    temperature=st.sampled_from([0.0, 0.01, 0.7, 1.0, 3.0, 100.0]),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999, 1.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 7, 40, 1000]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
    position=st.integers(0, 2**40),
    repetition=st.sampled_from([1.0, 1.3, 0.5]),
    frequency=st.sampled_from([0.0, 0.4, -1.0]),
    presence=st.sampled_from([0.0, 0.7]),
    seen=st.dictionaries(st.integers(0, 4), st.integers(0, 5), max_size=4),
    bias=st.dictionaries(st.integers(0, 4), st.sampled_from([-INF, -3.0, 0.5, 100.0]), max_size=3),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    rows=st.lists(some_rows, min_size=1, max_size=4),
    size=st.sampled_from([5, 16, 17, 100, 511, 512, 513, 3000]),
    spread=st.sampled_from([0.0, 0.01, 1.0, 10.0]),
    ties=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_draws_equal_the_reference(
    fast: Kernels, reference: Kernels, rows: list[Row], size: int, spread: float, ties: bool, seed: int
) -> None:
    logits = torch.randn(len(rows), size, generator=torch.Generator().manual_seed(seed)) * spread
    logits = logits.round() if ties else logits
    assert draw(fast, logits, rows) == draw(reference, logits, rows)


@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0])
def test_draws_over_a_large_vocabulary_equal_the_reference(fast: Kernels, reference: Kernels, spread: float) -> None:
    kinds = [Row(), Row(top_p=0.9), Row(top_k=50), Row(top_k=2000, top_p=0.8), Row(min_p=0.02), Row(top_p=0.99999)]
    rows = [Row(**{**vars(kind), "seed": seed}) for kind in kinds for seed in range(3)]
    logits = torch.randn(len(rows), 128000) * spread
    assert draw(fast, logits, rows) == draw(reference, logits, rows)


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """Pearson's statistic per degree of freedom."""
    expected = probabilities * counts.sum()
    return float(((counts - expected).square() / expected).sum() / (len(counts) - 1))


@pytest.mark.parametrize(
    ("row", "allowed"),
    [
        (Row(), 8),
        (Row(temperature=0.5), 8),
        (Row(top_k=3), 3),
        (Row(top_p=0.7), 3),
        (Row(min_p=0.2), 5),
        (Row(temperature=2.0, top_k=5, top_p=0.8), 4),
    ],
)
def test_draws_follow_the_distribution(every: Kernels, row: Row, allowed: int) -> None:
    logits = [0.1, 2.0, -0.5, 1.2, 1.4, 0.4, -1.0, 0.9]
    z = torch.tensor(logits).double() / row.temperature
    order = z.argsort(descending=True)[:allowed]
    p = torch.zeros(8, dtype=torch.float64)
    p[order] = z[order].softmax(0)
    counts = torch.bincount(torch.tensor(draws(every, logits, row, 4000)), minlength=8).double()
    assert counts[p == 0].sum() == 0
    assert chi_square(counts[p > 0], p[p > 0]) < 4.0  # with fixed seeds: a wrong weight would give far more


def test_the_random_number_is_splitmix64_of_seed_and_position() -> None:
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    numbers = [uniform(seed, position) for seed in range(50) for position in range(50)]
    assert len(set(numbers)) == 2500
    assert 0.48 < sum(numbers) / 2500 < 0.52
    assert all(0 <= u < 1 for u in numbers)


def test_two_tokens_of_equal_weight_split_at_one_half(every: Kernels) -> None:
    expected = [int(uniform(7, position) >= 0.5) for position in range(200)]
    assert draws(every, [1.0, 1.0], Row(seed=7), 200) == expected


def test_a_seed_is_unsigned(every: Kernels) -> None:
    expected = [int(uniform(2**64 - 5, position) >= 0.5) for position in range(50)]
    assert draws(every, [1.0, 1.0], Row(seed=-5), 50) == expected


def test_temperature_zero_takes_the_lowest_of_the_largest(every: Kernels) -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 2.0], [-INF, -INF, -3.0, -INF], [float("nan"), 1.0, 0.0, 1.0]])
    assert draw(every, logits, [Row(temperature=0.0)] * 3) == [1, 2, 1]


def test_top_p_zero_takes_the_first_of_the_largest(every: Kernels) -> None:
    assert set(draws(every, [1.0, 3.0, 3.0, 2.0], Row(top_p=0.0), 50)) == {1}


def test_top_k_prefers_lower_ids_among_equals(every: Kernels) -> None:
    assert set(draws(every, [0.0, 1.0, 1.0, 1.0, 2.0], Row(top_k=3), 200)) == {1, 2, 4}


def test_top_p_counts_equals_in_ascending_ids(every: Kernels) -> None:
    assert set(draws(every, [0.0] * 10, Row(top_p=0.5), 300)) == {0, 1, 2, 3, 4}


def test_top_p_applies_to_what_top_k_left(every: Kernels) -> None:
    logits = [0.0] * 100  # ten of equal weight remain: half of them carry half
    assert set(draws(every, logits, Row(top_k=10, top_p=0.5), 300)) == {0, 1, 2, 3, 4}


def test_banned_tokens_are_never_drawn(every: Kernels) -> None:
    banned = {i: -INF for i in (0, 1, 3)}
    assert set(draws(every, [9.0, 9.0, 0.0, 9.0, 0.1], Row(bias=banned), 200)) == {2, 4}
    only = {i: -INF for i in range(5) if i != 3}
    for row in (Row(bias=only), Row(bias=only, top_k=2), Row(bias=only, top_p=0.5), Row(bias=only, min_p=0.5)):
        assert set(draws(every, [9.0, 9.0, 0.0, -50.0, 0.1], row, 20)) == {3}


def test_a_row_without_any_token_left_still_answers(every: Kernels) -> None:
    logits = torch.tensor([[-INF] * 5, [float("nan")] * 5, [1.0, INF, 0.0, INF, 0.0]])
    assert draw(every, logits, [Row(), Row(top_p=0.5), Row(top_k=2)]) == [0, 0, 1]


def test_penalties_change_what_was_seen(every: Kernels) -> None:
    def best(logits: list[float], **options: object) -> int:
        return draw(every, torch.tensor([logits]), [Row(temperature=0.0, **options)])[0]  # type: ignore[arg-type]

    assert best([2.0, 1.9], seen={0: 0}, repetition=1.1) == 1  # 2 / 1.1 < 1.9
    assert best([-1.0, -1.05], seen={0: 0}, repetition=1.1) == 1  # -1 · 1.1 < -1.05
    assert best([2.0, 1.9], seen={0: 0}, presence=1.0, frequency=1.0) == 0  # in the prompt only
    assert best([2.0, 1.9], seen={0: 1}, presence=0.2) == 1
    assert best([2.0, 1.5], seen={0: 3}, frequency=0.1) == 0
    assert best([2.0, 1.5], seen={0: 6}, frequency=0.1) == 1
    assert best([2.0, 1.5], bias={1: 0.6}) == 1


@pytest.mark.parametrize("variant", [*COMPILED, "reference"])
def test_a_row_does_not_depend_on_the_others(make_kernels: MakeKernels, variant: str) -> None:
    rows = [Row(top_p=0.9 if i % 2 else 1.0, top_k=i % 3 * 20, seed=i, temperature=0.5 + i % 4) for i in range(12)]
    logits = torch.randn(12, 1500) * 2
    together = draw(make_kernels(variant, 2), logits, rows)
    one = make_kernels(variant, 1)
    assert together == [draw(one, logits[i : i + 1], rows[i : i + 1])[0] for i in range(12)]
    order = torch.randperm(12).tolist()
    shuffled = draw(make_kernels(variant, 3), logits[order], [rows[i] for i in order])
    assert shuffled == [together[i] for i in order]


@pytest.mark.parametrize("size", [7, 16, 1000, 33333])
def test_logprobs_equal_the_reference(fast: Kernels, reference: Kernels, size: int) -> None:
    logits = torch.randn(6, size) * 4
    logits[1] = logits[1].round()
    logits[2, ::2] = -INF
    tokens = torch.randint(0, size, (6,))
    before = logits.clone()
    for num_top in (0, 1, 5):
        ours, expected = fast.logprobs(logits, tokens, num_top), reference.logprobs(logits, tokens, num_top)
        assert torch.equal(ours[1], expected[1])
        assert torch.equal(ours[2], expected[2])
        for a, b in ((ours[0], expected[0]), (ours[3], expected[3])):
            assert torch.allclose(a, b, rtol=3e-7, atol=1e-12)
    assert torch.equal(logits, before)


def test_logprobs_are_log_softmax_with_ranks(every: Kernels) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    logprob, rank, top_ids, top = every.logprobs(logits, torch.tensor([3, 2]), 3)
    exact = logits.double().log_softmax(-1)
    assert rank.tolist() == [2, 3]
    assert top_ids.tolist() == [[1, 3, 2], [0, 1, 2]]
    assert (logprob - exact[[0, 1], [3, 2]]).abs().max() < 1e-6
    assert (top - exact.gather(1, top_ids)).abs().max() < 1e-6


def test_wrong_arguments_are_refused(fast: Kernels) -> None:
    logits = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="temperature"):
        fast.sample(logits, rows_of([Row()]))
    with pytest.raises(ValueError, match="num_top"):
        fast.logprobs(logits, torch.tensor([0, 1]), 5)
    with pytest.raises(ValueError, match="token ids"):
        fast.logprobs(logits, torch.tensor([0, 4]), 1)
