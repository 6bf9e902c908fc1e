"""Run by test_interpreter.py under TRITON_INTERPRET=1: cache and attention against the reference, one set of bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.steps import Run, Sequences, angles, blocks_for, layout_of, random_rows
from octavo.kernels.gpu.backend import GpuKernels
from octavo.kernels.gpu.device import DeviceLimits
from octavo.kernels.interface import CacheSpec, HeadLayout, Kernels
from octavo.kernels.reference import ReferenceKernels

GPU = GpuKernels(torch.device("cpu"))
REFERENCE = ReferenceKernels()
ERROR_OF_EXP = 1e-4  # of the largest output: an integer of P may move by one


def fed(
    kernels: Kernels,
    heads: HeadLayout,
    lengths: list[int],
    steps: list[dict[int, int]],
    *,
    dtype: torch.dtype,
    seed: int,
) -> Sequences:
    """Sequences of these lengths, fed step by step."""
    blocks, num_blocks = blocks_for(lengths, seed=seed)
    rows = [random_rows(length, heads, seed=i) for i, length in enumerate(lengths)]
    spec = CacheSpec(heads.num_kv_heads, heads.head_dim, dtype)
    run = Sequences(kernels, heads, spec, rows, blocks, num_blocks)
    for counts in steps:
        run.feed(counts)
    assert run.finished()
    return run


def error(ours: Sequences, theirs: Sequences, i: int) -> float:
    return float((ours.result(i) - theirs.result(i)).abs().max() / theirs.result(i).abs().max())


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "window", "dtype"),
    [
        (2, 1, 16, None, torch.int8),
        (3, 1, 80, 70, torch.int8),
        (2, 2, 16, None, torch.float32),
        (2, 1, 24, 70, torch.float16),
    ],
)
def test_decode_and_prompt_equal_the_reference_and_each_other(
    num_heads: int, num_kv_heads: int, head_dim: int, window: int | None, dtype: torch.dtype
) -> None:
    heads = HeadLayout(num_heads, num_kv_heads, head_dim, head_dim**-0.5, window)
    lengths = [130, 3]
    whole = fed(GPU, heads, lengths, [{0: 130, 1: 3}], dtype=dtype, seed=1)
    expected = fed(REFERENCE, heads, lengths, [{0: 130, 1: 3}], dtype=dtype, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(whole.cache.rows(), expected.cache.rows()))  # type: ignore[attr-defined]
    parts = fed(GPU, heads, lengths, [{0: 127}, {1: 1, 0: 1}, {0: 1, 1: 1}, {0: 1, 1: 1}], dtype=dtype, seed=2)
    for i in range(2):
        assert error(whole, expected, i) < (ERROR_OF_EXP if dtype == torch.int8 else 1e-5)
        if dtype == torch.int8:  # numpy's float products, which stand in here, have no fixed order
            assert torch.equal(whole.result(i), parts.result(i))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "window"), [(8, 2, 64, None), (12, 1, 32, 200), (1, 1, 128, None)]
)
def test_segments_fold_to_the_bits_of_the_prompt(
    num_heads: int, num_kv_heads: int, head_dim: int, window: int | None
) -> None:
    heads = HeadLayout(num_heads, num_kv_heads, head_dim, head_dim**-0.5, window)
    whole = fed(GPU, heads, [530], [{0: 530}], dtype=torch.int8, seed=1)
    steps = [{0: 255}, {0: 1}, {0: 1}, {0: 254}, {0: 2}, {0: 16}, {0: 1}]
    parts = fed(GPU, heads, [530], steps, dtype=torch.int8, seed=3)
    expected = fed(REFERENCE, heads, [530], [{0: 530}], dtype=torch.int8, seed=1)
    assert error(whole, expected, 0) < ERROR_OF_EXP
    assert torch.equal(whole.result(0), parts.result(0))


def written(
    kernels: Kernels, spec: CacheSpec, heads: HeadLayout, rows: torch.Tensor, **options: Any
) -> list[torch.Tensor]:
    """q and the cache's rows after one step."""
    cache = kernels.make_cache(spec, 4)
    table = options.pop("table", angles(70, heads.head_dim))
    q = kernels.rope_write(rows, table, layout_of([Run(70, 6, [3, 0]), Run(3, 3, [2])]), heads, cache, **options)
    return [q, *cache.rows()]  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32, torch.float16])
@pytest.mark.parametrize("head_dim", [8, 80, 128])
def test_q_and_cache_equal_the_reference(dtype: torch.dtype, head_dim: int) -> None:
    heads, spec = HeadLayout(6, 2, head_dim, 0.1), CacheSpec(2, head_dim, dtype)
    rows = random_rows(9, heads)
    rows[5] = 0.0
    rows[6] *= 1e-30
    ours, theirs = written(GPU, spec, heads, rows), written(REFERENCE, spec, heads, rows)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("rotary_dim", [0, 40])
def test_partial_rotation_head_norms_and_static_scales_equal_the_reference(rotary_dim: int) -> None:
    heads = HeadLayout(4, 2, 80, 0.1)
    rows = random_rows(9, heads) * 3
    options = {"q_norm": torch.randn(80), "k_norm": torch.randn(80), "eps": 1e-5, "table": angles(70, rotary_dim)}
    spec = CacheSpec(2, 80, torch.int8, torch.tensor([0.021, 0.03]), torch.tensor([0.011]))
    ours, theirs = (written(k, spec, heads, rows, **options) for k in (GPU, REFERENCE))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)
    for a, b in zip(ours[1:3], theirs[1:3]):
        assert (a.int() - b.int()).abs().max() <= 1  # the norm's float64 sum has another order
        assert a.min() == -128
    assert all(torch.equal(a, b) for a, b in zip(ours[3:], theirs[3:]))


def test_rows_that_fill_up_a_graph_write_nothing() -> None:
    heads, spec = HeadLayout(2, 1, 16, 0.25), CacheSpec(1, 16, torch.int8)
    cache, layout = GPU.make_cache(spec, 2), layout_of([Run(2, 2, [1])])
    layout.slot_mapping[1] = -1
    GPU.rope_write(random_rows(2, heads), angles(2, 16), layout, heads, cache)
    k = cache.rows()[0].flatten(0, 1)  # type: ignore[attr-defined]
    assert [int(i) for i in k.flatten(1).any(dim=1).nonzero()] == [64]


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_what_a_row_may_not_see_never_reaches_it(value: float) -> None:
    heads = HeadLayout(2, 1, 16, 0.25, window=40)
    run = fed(GPU, heads, [140], [{0: 140}], dtype=torch.int8, seed=1)
    layout = layout_of([Run(100, 2, run.blocks[0])])  # positions 98 and 99 see 59 to 99
    q = GPU.rope_write(run.rows[0][98:100], run.angles, layout, heads, run.cache)
    before = GPU.attention(q, layout, heads, run.cache)
    for first, count in ((100, 40), (0, 59)):
        poison = layout_of([Run(first + count, count, run.blocks[0])])
        GPU.rope_write(torch.full((count, 64), value), run.angles, poison, heads, run.cache)
        assert torch.equal(GPU.attention(q, layout, heads, run.cache), before)
    assert torch.isfinite(before).all()


def test_float_caches_that_a_card_cannot_hold_are_refused() -> None:
    small = GpuKernels(torch.device("cpu"))
    small._limits = DeviceLimits((8, 6), 101376)
    with pytest.raises(ValueError, match="USE_CACHE_KV_INT8=1"):
        small.make_cache(CacheSpec(2, 128, torch.bfloat16), 1)
    small.make_cache(CacheSpec(2, 128, torch.int8), 1)
    GPU.make_cache(CacheSpec(2, 128, torch.bfloat16), 1)


def test_wrong_shapes_are_refused() -> None:
    heads = HeadLayout(4, 2, 16, 0.25)
    cache, layout = GPU.make_cache(CacheSpec(2, 16, torch.int8), 2), layout_of([Run(2, 2, [0])])
    with pytest.raises(ValueError, match="q must be"):
        GPU.attention(torch.zeros(2, 16), layout, heads, cache)
    with pytest.raises(ValueError, match="cannot share"):
        GPU.attention(torch.zeros(2, 80), layout, HeadLayout(5, 2, 16, 0.25), cache)
