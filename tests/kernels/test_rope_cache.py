"""Rotary embedding and the cache: backends hold the same integers, and those stand for the right numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.steps import Run, angles, layout_of, random_rows
from octavo.kernels.interface import BLOCK, CacheSpec, HeadLayout, Kernels

DTYPES = [torch.int8, torch.float32, torch.bfloat16, torch.float16]
RUNS = [Run(130, 130, [3, 0, 5]), Run(64, 1, [2]), Run(70, 6, [4, 1])]


def written(kernels: Kernels, spec: CacheSpec, heads: HeadLayout, rows: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """q and the cache's rows after one step over RUNS."""
    cache = kernels.make_cache(spec, 6)
    table = options.pop("table", angles(130, heads.head_dim))
    q = kernels.rope_write(rows, table, layout_of(RUNS), heads, cache, **options)
    return q, *cache.rows()  # type: ignore[attr-defined]


def equal(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    """The same bits in all."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("head_dim", [8, 16, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_q_and_cache_equal_the_reference(fast: Kernels, reference: Kernels, dtype: torch.dtype, head_dim: int) -> None:
    heads = HeadLayout(6, 2, head_dim, head_dim**-0.5)
    rows = random_rows(137, heads)
    rows[5] = 0.0
    rows[6] *= 1e-30
    spec = CacheSpec(2, head_dim, dtype)
    assert equal(written(fast, spec, heads, rows), written(reference, spec, heads, rows))


@pytest.mark.parametrize("count", [1, 2])
def test_static_scales_equal_the_reference(fast: Kernels, reference: Kernels, count: int) -> None:
    heads = HeadLayout(4, 2, 64, 0.125)
    rows = random_rows(137, heads) * 2
    spec = CacheSpec(2, 64, torch.int8, torch.tensor([0.021, 0.03][:count]), torch.tensor([0.011, 0.05][:count]))
    ours, expected = written(fast, spec, heads, rows), written(reference, spec, heads, rows)
    assert equal(ours, expected)
    assert ours[1].min() == -128  # it was clamped somewhere
    assert ours[1].max() == 127


@pytest.mark.parametrize("rotary_dim", [0, 16, 40])
def test_partial_rotation_and_head_norms_equal_the_reference(
    fast: Kernels, reference: Kernels, rotary_dim: int
) -> None:
    heads = HeadLayout(4, 2, 80, 0.1)
    options = {"q_norm": torch.randn(80), "k_norm": torch.randn(80), "eps": 1e-5, "table": angles(130, rotary_dim)}
    spec = CacheSpec(2, 80, torch.int8)
    rows = random_rows(137, heads) * 3
    assert equal(written(fast, spec, heads, rows, **options), written(reference, spec, heads, rows, **options))


def test_rotation_is_a_rotation_of_pairs(every: Kernels) -> None:
    heads = HeadLayout(2, 1, 16, 0.25)
    rows, table = random_rows(137, heads), angles(130, 12)
    q = written(every, CacheSpec(1, 16, torch.float32), heads, rows, table=table)[0].view(137, 2, 16)
    x = rows[:, :32].reshape(137, 2, 16).double()
    turn = table[layout_of(RUNS).positions.long()].double()
    rotated = torch.complex(x[..., :6], x[..., 6:12]) * torch.complex(turn[:, :6], turn[:, 6:])[:, None]
    expected = torch.cat([rotated.real, rotated.imag, x[..., 12:]], dim=-1)
    assert (q - expected).abs().max() < 1e-6


def test_head_norm_scales_each_head_to_its_weight(every: Kernels) -> None:
    heads = HeadLayout(2, 1, 16, 0.25)
    rows, weight = random_rows(137, heads) * 50, torch.rand(16) + 0.5
    q = written(every, CacheSpec(1, 16, torch.float32), heads, rows, q_norm=weight, table=angles(130, 0))[0]
    x = rows[:, :32].reshape(137, 2, 16).double()
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    assert (q.view(137, 2, 16) - expected).abs().max() < 1e-5


def test_dynamic_scales_hold_each_row_to_half_a_step(every: Kernels) -> None:
    heads = HeadLayout(2, 2, 64, 0.125)
    rows = random_rows(137, heads)
    _, k, v, _, v_scale = written(every, CacheSpec(2, 64, torch.int8), heads, rows)
    x = rows.view(137, 6, 64)[:, 4:]
    slots = layout_of(RUNS).slot_mapping.long()
    scale = v_scale.flatten(0, 1)[slots]
    assert torch.equal(scale, x.abs().amax(-1) / 127)
    assert ((v.flatten(0, 1)[slots] * scale[..., None] - x).abs() <= scale[..., None] * 0.5001).all()
    assert k.abs().max() == 127


def test_rows_do_not_depend_on_the_rest_of_the_step(every: Kernels) -> None:
    heads = HeadLayout(4, 2, 80, 0.1)
    rows, table, spec = random_rows(137, heads), angles(130, 80), CacheSpec(2, 80, torch.int8)
    together = written(every, spec, heads, rows)
    cache, first, parts = every.make_cache(spec, 6), 0, []
    for run in RUNS:
        for length in range(run.length - run.num_rows + 1, run.length + 1):
            layout = layout_of([Run(length, 1, run.blocks)])
            parts.append(every.rope_write(rows[first : first + 1], table, layout, heads, cache).clone())
            first += 1
    assert equal(together, (torch.cat(parts), *cache.rows()))  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_new_cache_is_zero_and_as_large_as_it_says(every: Kernels, dtype: torch.dtype) -> None:
    spec = CacheSpec(3, 24, dtype)
    cache = every.make_cache(spec, 5)
    k, v, *_ = cache.rows()  # type: ignore[attr-defined]
    assert k.shape == v.shape == (5, BLOCK, 3, 24)
    assert not k.any()
    assert not v.any()
    assert cache.num_blocks == 5
    assert cache.nbytes == 5 * every.cache_block_bytes(spec)
    assert every.cache_block_bytes(spec) >= 2 * BLOCK * 3 * 24 * dtype.itemsize


@pytest.mark.parametrize(
    "spec",
    [
        CacheSpec(2, 12, torch.int8),
        CacheSpec(2, 264, torch.int8),
        CacheSpec(2, 64, torch.int16),
        CacheSpec(4, 64, torch.int8, k_scale=torch.ones(3)),
    ],
)
def test_unsupported_caches_are_refused(every: Kernels, spec: CacheSpec) -> None:
    with pytest.raises(ValueError, match=r"head_dim|not supported|static scales"):
        every.make_cache(spec, 1)


def test_wrong_shapes_are_refused(fast: Kernels) -> None:
    heads, spec = HeadLayout(4, 2, 64, 0.125), CacheSpec(2, 64, torch.int8)
    cache, layout = fast.make_cache(spec, 6), layout_of(RUNS)
    with pytest.raises(ValueError, match="qkv"):
        fast.rope_write(torch.zeros(137, 8), angles(130, 64), layout, heads, cache)
    with pytest.raises(ValueError, match="rotary_dim"):
        fast.rope_write(random_rows(137, heads), angles(130, 66), layout, heads, cache)
    wrong = HeadLayout(4, 4, 64, 0.125)
    with pytest.raises(ValueError, match="cache of 2 heads"):
        fast.rope_write(random_rows(137, wrong), angles(130, 64), layout, wrong, cache)
