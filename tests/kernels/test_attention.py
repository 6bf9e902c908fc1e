"""Paged attention: right against dense float64, fast against the reference, one row one set of bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.backends import COMPILED, MakeKernels
from kernels.steps import Run, Sequences, angles, blocks_for, layout_of, random_rows
from octavo.kernels.interface import CacheSpec, HeadLayout, Kernels, LayerCache

ERROR_OF_TWO_LIMBS = 5e-4  # of the largest output, against float64 on the dequantised cache
# Fast against the reference: exp may differ in its last bits, which may move an integer of P by one.
ERROR_OF_EXP = 1e-4


def heads_of(num_heads: int, num_kv_heads: int, head_dim: int, window: int | None = None) -> HeadLayout:
    return HeadLayout(num_heads, num_kv_heads, head_dim, head_dim**-0.5, window)


def fed(kernels: Kernels, heads: HeadLayout, lengths: list[int], *, dtype: torch.dtype = torch.int8) -> Sequences:
    """Sequences of these lengths, each fed in one step of all."""
    blocks, num_blocks = blocks_for(lengths, seed=1)
    rows = [random_rows(length, heads, seed=i) for i, length in enumerate(lengths)]
    run = Sequences(kernels, heads, CacheSpec(heads.num_kv_heads, heads.head_dim, dtype), rows, blocks, num_blocks)
    run.feed(dict.fromkeys(range(len(lengths)), 10**6))
    return run


def dense(run: Sequences, i: int) -> Tensor:
    """Attention of sequence i in float64 over what its cache stands for."""
    heads, length, group = run.heads, run.lengths[i], run.heads.num_heads // run.heads.num_kv_heads
    k, v, ks, vs = run.cache.rows()  # type: ignore[attr-defined]
    if run.spec.dtype == torch.int8:
        k, v = k * ks.double()[..., None], v * vs.double()[..., None]
    k, v = (x[run.blocks[i]].flatten(0, 1)[:length].double() for x in (k, v))
    cache = run.kernels.make_cache(run.spec, run.num_blocks)
    layout = layout_of([Run(length, length, run.blocks[i])])
    q = run.kernels.rope_write(run.rows[i], run.angles, layout, heads, cache).view(length, heads.num_heads, -1).double()
    scores = torch.einsum("qhd,thd->hqt", q, k.repeat_interleave(group, dim=1)) * heads.scale
    t = torch.arange(length)
    hidden = t > t[:, None] if heads.window is None else (t > t[:, None]) | (t <= t[:, None] - heads.window)
    p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqt,thd->qhd", p, v.repeat_interleave(group, dim=1)).flatten(1)


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize(
    ("heads", "dtype", "bound"),
    [
        (heads_of(4, 2, 64), torch.int8, ERROR_OF_TWO_LIMBS),
        (heads_of(2, 2, 128), torch.int8, ERROR_OF_TWO_LIMBS),
        (heads_of(4, 1, 16, window=70), torch.int8, ERROR_OF_TWO_LIMBS),
        (heads_of(4, 2, 64), torch.float32, 2e-6),
        (heads_of(4, 2, 80, window=70), torch.bfloat16, 2e-6),
        (heads_of(4, 2, 64), torch.float16, 2e-6),
    ],
)
def test_it_is_attention(every: Kernels, heads: HeadLayout, dtype: torch.dtype, bound: float) -> None:
    run = fed(every, heads, [300, 1, 129], dtype=dtype)
    for i in range(3):
        assert relative_error(run.result(i), dense(run, i)) < bound


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(4, 2, 16), (3, 3, 64), (8, 2, 80), (7, 1, 128), (2, 1, 256)])
def test_fast_equals_the_reference(
    fast: Kernels, reference: Kernels, heads: tuple[int, int, int], dtype: torch.dtype, window: int | None
) -> None:
    ours = fed(fast, heads_of(*heads, window=window), [260, 5], dtype=dtype)
    expected = fed(reference, ours.heads, [260, 5], dtype=dtype)
    for i in range(2):
        assert relative_error(ours.result(i), expected.result(i)) < (ERROR_OF_EXP if dtype == torch.int8 else 1e-5)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000])
def test_ends_at_and_around_tile_borders(fast: Kernels, reference: Kernels, length: int) -> None:
    heads = heads_of(4, 2, 64)
    ours, expected = fed(fast, heads, [length]), fed(reference, heads, [length])
    assert relative_error(ours.result(0), expected.result(0)) < ERROR_OF_EXP


def fed_by_chunks(
    kernels: Kernels, heads: HeadLayout, chunks: list[int], *, dtype: torch.dtype, seed: int
) -> Sequences:
    """Three sequences in one cache, sequence i fed `chunks[i]` tokens a step until all are done."""
    lengths = [300, 40, 131]
    blocks, num_blocks = blocks_for(lengths, seed=seed)
    rows = [random_rows(length, heads, seed=i) for i, length in enumerate(lengths)]
    run = Sequences(kernels, heads, CacheSpec(heads.num_kv_heads, heads.head_dim, dtype), rows, blocks, num_blocks)
    while not run.finished():
        run.feed(dict(enumerate(chunks)))
    return run


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("num_heads", [4, 2])
@pytest.mark.parametrize("variant", COMPILED)
def test_a_row_has_the_same_bits_however_it_was_computed(
    make_kernels: MakeKernels, variant: str, num_heads: int, window: int | None, dtype: torch.dtype
) -> None:
    heads = heads_of(num_heads, 2, 64, window)
    whole = fed_by_chunks(make_kernels(variant, 1), heads, [1000, 1000, 1000], dtype=dtype, seed=0)
    for threads, chunks, seed in ((2, [1, 7, 64], 1), (3, [7, 1, 1000], 2), (2, [128, 1000, 7], 3)):
        other = fed_by_chunks(make_kernels(variant, threads), heads, chunks, dtype=dtype, seed=seed)
        for i in range(3):
            assert torch.equal(whole.result(i), other.result(i)), (threads, chunks, i)


def test_the_reference_gives_a_row_the_same_bits_however_it_was_computed(reference: Kernels) -> None:
    heads = heads_of(2, 1, 16, 90)
    whole = fed_by_chunks(reference, heads, [1000, 1000, 1000], dtype=torch.int8, seed=0)
    other = fed_by_chunks(reference, heads, [50, 7, 1], dtype=torch.int8, seed=2)
    assert all(torch.equal(whole.result(i), other.result(i)) for i in range(3))


@pytest.mark.parametrize("head_dim", [8, 16, 80, 128, 192, 256])
@pytest.mark.parametrize("variant", COMPILED)
def test_decode_has_the_bits_of_the_prompt_at_every_head_size(
    make_kernels: MakeKernels, variant: str, head_dim: int
) -> None:
    heads = heads_of(6, 2, head_dim)
    prompt = fed(make_kernels(variant, 1), heads, [257])
    blocks, num_blocks = blocks_for([257], seed=5)
    spec = CacheSpec(2, head_dim, torch.int8)
    decode = Sequences(make_kernels(variant, 3), heads, spec, prompt.rows, blocks, num_blocks)
    decode.feed({0: 250})
    while not decode.finished():
        decode.feed({0: 1})
    assert torch.equal(prompt.result(0), decode.result(0))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16])
@pytest.mark.parametrize("variant", COMPILED)
def test_a_long_context_split_over_threads_keeps_its_bits(
    make_kernels: MakeKernels, variant: str, dtype: torch.dtype
) -> None:
    heads, outputs = heads_of(4, 1, 64), []
    for threads in (1, 2, 5):
        blocks, num_blocks = blocks_for([2100], seed=threads)
        spec = CacheSpec(1, 64, dtype)
        run = Sequences(make_kernels(variant, threads), heads, spec, [random_rows(2100, heads)], blocks, num_blocks)
        run.feed({0: 2099})
        run.feed({0: 1})
        outputs.append(run.result(0))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [(8, 8, 64, None), (15, 5, 64, 90), (16, 8, 80, None), (18, 2, 64, None), (32, 2, 64, 150), (40, 2, 128, None)],
)
@pytest.mark.parametrize("variant", COMPILED)
def test_a_crowd_that_decodes_has_the_bits_of_each_alone(
    make_kernels: MakeKernels, variant: str, shape: tuple[int, int, int, int | None], dtype: torch.dtype
) -> None:
    """Many sequences: a task takes several kv heads through a tile."""
    heads, lengths = heads_of(*shape), [1, 64, 65, 127, 128, 129, 255, 256, 257, 300, 5, 193]
    rows = [random_rows(length, heads, seed=i) for i, length in enumerate(lengths)]
    spec = CacheSpec(heads.num_kv_heads, heads.head_dim, dtype)
    crowds = []
    for threads in (1, 2):
        blocks, num_blocks = blocks_for(lengths, seed=threads)
        crowd = Sequences(make_kernels(variant, threads), heads, spec, rows, blocks, num_blocks)
        crowd.feed({i: length - 3 for i, length in enumerate(lengths) if length > 3})
        for _ in range(3):
            crowd.feed(dict.fromkeys(range(len(lengths)), 1))
        crowds.append(crowd)
    for i, length in enumerate(lengths):
        blocks, num_blocks = blocks_for([length], seed=i)
        alone = Sequences(make_kernels(variant, 1), heads, spec, [rows[i]], blocks, num_blocks)
        alone.feed({0: length})
        for crowd in crowds:
            assert torch.equal(crowd.result(i), alone.result(0)), length


@pytest.mark.parametrize("variants", [("avx512", "avx2"), ("amx", "avx512")])
@pytest.mark.parametrize(
    "shape",
    [
        (6, 2, 80, None),
        (4, 2, 64, None),
        (4, 1, 64, 150),
        (7, 1, 128, None),
        (2, 2, 256, 70),
        (18, 2, 64, 90),
        (128, 1, 64, None),
    ],
)
def test_instruction_sets_give_the_same_bits(
    make_kernels: MakeKernels, variants: tuple[str, str], shape: tuple[int, int, int, int | None]
) -> None:
    one, other = (fed(make_kernels(variant, 2), heads_of(*shape), [600, 7, 130]) for variant in variants)
    for i in range(3):
        assert torch.equal(one.result(i), other.result(i)), i


def test_a_window_of_one_sees_only_the_token_itself(every: Kernels) -> None:
    run = fed(every, heads_of(2, 2, 16, window=1), [200])
    _, v, _, vs = (x[run.blocks[0]].flatten(0, 1)[:200] for x in run.cache.rows())  # type: ignore[attr-defined]
    assert relative_error(run.result(0), (v * vs[..., None]).flatten(1)) < 1e-6


def test_a_window_longer_than_the_context_changes_nothing(every: Kernels) -> None:
    with_window, without = (fed(every, heads_of(2, 1, 16, window=w), [200]) for w in (200, None))
    assert torch.equal(with_window.result(0), without.result(0))


def poisoned(run: Sequences, first: int, count: int, value: float) -> LayerCache:
    """The cache of `run` with `value` in keys and values at positions [first, first + count) of sequence 0."""
    width = run.rows[0].shape[1]
    layout = layout_of([Run(first + count, count, run.blocks[0])])
    run.kernels.rope_write(torch.full((count, width), value), run.angles, layout, run.heads, run.cache)
    return run.cache


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_what_a_row_may_not_see_never_reaches_it(fast: Kernels, dtype: torch.dtype, value: float) -> None:
    heads = heads_of(4, 2, 64, window=60)
    run = fed(fast, heads, [300], dtype=dtype)
    layout = layout_of([Run(190, 20, run.blocks[0])])  # positions 170 to 189 see 111 to 189
    q = fast.rope_write(run.rows[0][170:190], angles(300, 64), layout, heads, run.cache)
    before = fast.attention(q, layout, heads, run.cache).clone()
    for first, count in ((190, 110), (0, 111)):
        cache = poisoned(run, first, count, value)
        assert torch.equal(fast.attention(q, layout, heads, cache), before)
    assert torch.isfinite(before).all()


def test_values_of_zero_give_zero(every: Kernels) -> None:
    heads = heads_of(2, 1, 16)
    rows = random_rows(140, heads)
    rows[:, -16:] = 0.0
    blocks, num_blocks = blocks_for([140])
    run = Sequences(every, heads, CacheSpec(1, 16, torch.int8), [rows], blocks, num_blocks)
    run.feed({0: 140})
    assert torch.equal(run.result(0), torch.zeros(140, 32))


def test_wrong_shapes_are_refused(fast: Kernels) -> None:
    heads = heads_of(4, 2, 64)
    run, layout = fed(fast, heads, [20]), layout_of([Run(20, 2, [0])])
    with pytest.raises(ValueError, match="q must be"):
        fast.attention(torch.zeros(2, 64), layout, heads, run.cache)
    with pytest.raises(ValueError, match="cannot share"):
        fast.attention(torch.zeros(2, 320), layout, heads_of(5, 2, 64), run.cache)
