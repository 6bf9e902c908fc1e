"""Layers run whole: the bits of the operations one by one, in the residual stream and in the caches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.steps import Run, angles, layout_of
from octavo.kernels.interface import (
    ActivationFormat,
    BatchLayout,
    CacheSpec,
    DenseLayer,
    Head,
    HeadLayout,
    Kernels,
    LayerCache,
    SamplingRows,
    StacksLayers,
)

HIDDEN, INTERMEDIATE = 96, 176  # eleven panels of gates: an odd one is left where they go in pairs
HEADS = HeadLayout(4, 2, 32, 32**-0.5)
NUM_BLOCKS = 12
VOCABULARY = 203  # no multiple of a panel
FORMATS = {
    "one limb": ActivationFormat(1),
    "two limbs": ActivationFormat(2),
    "static": ActivationFormat(1, static_scale=0.05, zero_point=-7),
}
STEPS = {  # tokens in the cache before, then rows of this step, per sequence
    "decode": [(70, 1), (3, 1), (128, 1)],
    "few": [(0, 9), (70, 1)],
    "mixed": [(5, 1), (0, 130), (64, 2)],
    "long": [(0, 400)],  # more rows than go through an MLP together
}


def make_layer(kernels: Kernels, format: ActivationFormat, *, seed: int) -> DenseLayer:
    """A layer of random weights; those of odd seeds norm their heads and see a window."""
    generator = torch.Generator().manual_seed(seed)

    def linear(outputs: int, inputs: int) -> object:
        weight = torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
        scale = torch.rand(outputs, 1, generator=generator) * 1e-3
        zero_point = torch.randint(-9, 9, (outputs, 1), generator=generator) if seed % 2 else None
        bias = torch.randn(outputs, generator=generator) if seed % 2 == 0 else None
        return kernels.pack_int8(weight, scale, format=format, zero_point=zero_point, bias=bias)

    def norm(width: int) -> Tensor:
        return torch.rand(width, generator=generator) + 0.5

    q_size, kv_size = HEADS.num_heads * HEADS.head_dim, HEADS.num_kv_heads * HEADS.head_dim
    return DenseLayer(
        attention_norm=norm(HIDDEN),
        qkv=linear(q_size + 2 * kv_size, HIDDEN),
        q_norm=norm(HEADS.head_dim) if seed % 2 else None,
        k_norm=norm(HEADS.head_dim) if seed % 2 else None,
        heads=replace(HEADS, window=100) if seed % 2 else HEADS,
        out=linear(HIDDEN, q_size),
        mlp_norm=norm(HIDDEN),
        gate_up=linear(2 * INTERMEDIATE, HIDDEN),
        down=linear(HIDDEN, INTERMEDIATE),
        eps=1e-5,
    )


def make_head(kernels: Kernels, kind: ActivationFormat | torch.dtype) -> Head:
    """A head of random weights, int8 or float."""
    generator = torch.Generator().manual_seed(7)
    if isinstance(kind, torch.dtype):
        product = kernels.pack_float((torch.randn(VOCABULARY, HIDDEN, generator=generator) / 8).to(kind))
    else:
        weight = torch.randint(-127, 128, (VOCABULARY, HIDDEN), generator=generator, dtype=torch.int8)
        product = kernels.pack_int8(weight, torch.full((VOCABULARY, 1), 1e-3), format=kind)
    return Head(torch.rand(HIDDEN, generator=generator) + 0.5, 1e-5, product)


def sampling_rows(count: int) -> SamplingRows:
    """The first row is greedy, the others draw; the last has penalties and a bias."""
    return SamplingRows(
        temperature=torch.linspace(0.0, 1.5, count),
        top_p=torch.full((count,), 0.9),
        top_k=torch.full((count,), 40, dtype=torch.int32),
        min_p=torch.full((count,), 0.01),
        seed=torch.arange(count) + 3,
        position=torch.arange(count) * 5,
        repetition_penalty=torch.full((count,), 1.3),
        frequency_penalty=torch.full((count,), 0.1),
        presence_penalty=torch.full((count,), 0.2),
        seen_start=torch.tensor([0] * count + [2], dtype=torch.int32),
        seen_ids=torch.tensor([4, 9], dtype=torch.int32),
        seen_counts=torch.tensor([0, 3], dtype=torch.int32),
        bias_start=torch.tensor([0] * count + [1], dtype=torch.int32),
        bias_ids=torch.tensor([11], dtype=torch.int32),
        bias_values=torch.tensor([float("-inf")]),
    )


def layout_for(step: str) -> BatchLayout:
    """Blocks in descending order, four to a sequence of few tokens."""
    runs, free = [], list(range(NUM_BLOCKS))
    for before, rows in STEPS[step]:
        needed = (before + rows + 63) // 64
        runs.append(Run(before + rows, rows, [free.pop() for _ in range(needed)]))
    return layout_of(runs)


def make_caches(kernels: Kernels, count: int, *, static: bool = False) -> list[LayerCache]:
    scale = torch.tensor([0.02, 0.03]) if static else None
    return [kernels.make_cache(CacheSpec(2, 32, torch.int8, scale, scale), NUM_BLOCKS) for _ in range(count)]


def one_by_one(
    kernels: Kernels, layers: list[DenseLayer], x: Tensor, layout: BatchLayout, caches: list[LayerCache], rows: Tensor
) -> Tensor:
    """What the interface says a stack computes."""
    cos_sin = angles(512, HEADS.head_dim)
    for index, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
        normed, x = kernels.rms_norm(x, layer.attention_norm, layer.eps, layer.qkv.format)
        qkv = kernels.linear(normed, layer.qkv)
        norms = {"q_norm": layer.q_norm, "k_norm": layer.k_norm, "eps": layer.eps}
        q = kernels.rope_write(qkv, cos_sin, layout, layer.heads, cache, **norms)
        heads = kernels.attention(q, layout, layer.heads, cache)
        if index == len(layers) - 1:
            heads, x = heads[rows], x[rows]
        x = kernels.linear(kernels.quantize(heads, layer.out.format), layer.out, residual=x)
        normed, x = kernels.rms_norm(x, layer.mlp_norm, layer.eps, layer.gate_up.format)
        gated = kernels.silu_mul(kernels.linear(normed, layer.gate_up), layer.down.format)
        x = kernels.linear(gated, layer.down, residual=x)
    return x


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("static_cache", [False, True])
def test_a_stack_has_the_bits_of_its_operations(fast: Kernels, format: str, step: str, static_cache: bool) -> None:
    assert isinstance(fast, StacksLayers)
    layers = [make_layer(fast, FORMATS[format], seed=seed) for seed in range(3)]
    layout = layout_for(step)
    count = int(layout.query_start[-1])
    x = torch.randn(count, HIDDEN)
    rows = torch.tensor([count - 1, 0])
    mine, theirs = (make_caches(fast, len(layers), static=static_cache) for _ in range(2))
    stack = fast.stack_layers(layers, angles(512, HEADS.head_dim), make_head(fast, FORMATS["one limb"]))
    assert stack is not None
    y = stack.run(x.clone(), layout, mine, rows)
    assert torch.equal(y, one_by_one(fast, layers, x.clone(), layout, theirs, rows))
    for a, b in zip(mine, theirs, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.rows(), b.rows(), strict=True))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", [*FORMATS.values(), torch.bfloat16, torch.float32], ids=str)
def test_a_whole_step_has_the_bits_of_its_operations(
    fast: Kernels, kind: ActivationFormat | torch.dtype, step: str
) -> None:
    assert isinstance(fast, StacksLayers)
    layers, head = [make_layer(fast, FORMATS["one limb"], seed=seed) for seed in range(2)], make_head(fast, kind)
    layout = layout_for(step)
    count = int(layout.query_start[-1])
    x, rows = torch.randn(count, HIDDEN), torch.tensor([0, count - 1, count // 2, 1, 1, 0, 0])
    mine, theirs = make_caches(fast, 2), make_caches(fast, 2)
    stack = fast.stack_layers(layers, angles(512, HEADS.head_dim), head)
    assert stack is not None
    tokens = stack.sample(x.clone(), layout, mine, rows, sampling_rows(len(rows)))
    y = one_by_one(fast, layers, x.clone(), layout, theirs, rows)
    normed, _ = fast.rms_norm(y, head.norm, head.eps, head.product.format)
    want = fast.sample(fast.linear(normed, head.product), sampling_rows(len(rows)))
    assert torch.equal(tokens, want)
    assert len(set(tokens.tolist())) > 2
    assert all(torch.equal(p, q) for a, b in zip(mine, theirs) for p, q in zip(a.rows(), b.rows(), strict=True))


def test_steps_may_differ_in_all_but_the_model(fast: Kernels) -> None:
    """What a stack keeps of a step: rows that are the same but for their positions, then lists, then more rows."""
    layers, head = [make_layer(fast, FORMATS["one limb"], seed=0)], make_head(fast, torch.bfloat16)
    stack = fast.stack_layers(layers, angles(512, HEADS.head_dim), head)
    layout, x = layout_for("mixed"), torch.randn(133, HIDDEN)
    few, many = sampling_rows(3), sampling_rows(40)
    later = replace(few, position=few.position + 1)
    others = replace(later, bias_ids=torch.tensor([12], dtype=torch.int32), seen_counts=few.seen_counts + 1)
    for sampling in (few, later, replace(later, position=few.position + 2), others, many, few):
        rows = torch.arange(len(sampling.seed)) * 2
        mine, theirs = make_caches(fast, 1), make_caches(fast, 1)
        tokens = stack.sample(x.clone(), layout, mine, rows, sampling)
        y = one_by_one(fast, layers, x.clone(), layout, theirs, rows)
        assert torch.equal(stack.run(x.clone(), layout, mine, rows), y)
        normed, _ = fast.rms_norm(y, head.norm, head.eps, head.product.format)
        assert torch.equal(tokens, fast.sample(fast.linear(normed, head.product), sampling))
    with pytest.raises(ValueError, match="position"):
        stack.sample(x.clone(), layout, mine, rows, replace(few, position=few.position[:2]))
    with pytest.raises(ValueError, match="temperature"):
        stack.sample(x.clone(), layout, mine, rows[:2], few)


def test_without_rows_the_caches_are_filled(fast: Kernels) -> None:
    layers = [make_layer(fast, FORMATS["one limb"], seed=seed) for seed in range(2)]
    layout, x = layout_for("mixed"), torch.randn(133, HIDDEN)
    mine, theirs = make_caches(fast, 2), make_caches(fast, 2)
    stack = fast.stack_layers(layers, angles(512, HEADS.head_dim), make_head(fast, FORMATS["one limb"]))
    y = stack.run(x.clone(), layout, mine, torch.empty(0, dtype=torch.int64))
    assert y.shape == (0, HIDDEN)
    one_by_one(fast, layers, x.clone(), layout, theirs, torch.tensor([0]))
    assert all(torch.equal(p, q) for a, b in zip(mine, theirs) for p, q in zip(a.rows(), b.rows(), strict=True))


def test_a_stack_follows_its_caches_and_grows(fast: Kernels) -> None:
    layers = [make_layer(fast, FORMATS["two limbs"], seed=seed) for seed in range(2)]
    stack = fast.stack_layers(layers, angles(512, HEADS.head_dim), make_head(fast, FORMATS["one limb"]))
    for step in ("decode", "long", "decode"):
        layout = layout_for(step)
        x = torch.randn(int(layout.query_start[-1]), HIDDEN)
        rows, mine, theirs = torch.tensor([1]), make_caches(fast, 2), make_caches(fast, 2)
        want = one_by_one(fast, layers, x.clone(), layout, theirs, rows)
        assert torch.equal(stack.run(x.clone(), layout, mine, rows), want)


def test_float_products_are_not_stacked(fast: Kernels) -> None:
    layer = make_layer(fast, FORMATS["one limb"], seed=0)
    layer = replace(layer, out=fast.pack_float(torch.randn(HIDDEN, 128)))
    assert fast.stack_layers([layer], angles(512, HEADS.head_dim), make_head(fast, FORMATS["one limb"])) is None
