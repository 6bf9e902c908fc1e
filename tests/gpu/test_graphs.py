"""Captured graphs: a replay gives the bits of the eager step, also for lengths and blocks that came later."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpu.steps import DEVICE, LLAMA_8B, SMALL, Layer, Shape, angles, captured, layout_of, num_blocks, run
from octavo.kernels.interface import BatchLayout, Kernels

LONGEST = 1024


def copy_into(target: BatchLayout, source: BatchLayout) -> None:
    """New contents for a captured layout; both describe the same number of rows."""
    for name in ("query_start", "seq_lens", "block_tables", "positions", "slot_mapping"):
        getattr(target, name).copy_(getattr(source, name))


def batch(lengths: list[int]) -> BatchLayout:
    """A decode step, its table as wide as the longest sequence needs."""
    layout = layout_of(lengths, [1] * len(lengths), seed=len(lengths), max_seq_len=LONGEST)
    wide = torch.zeros(len(lengths), LONGEST // 64, dtype=torch.int32, device=DEVICE)
    wide[:, : layout.block_tables.shape[1]] = layout.block_tables
    return BatchLayout(**{**vars(layout), "block_tables": wide})


@pytest.mark.parametrize(("shape", "limbs"), [(SMALL, 1), (SMALL, 2), (LLAMA_8B, 2)])
def test_replay_equals_eager(gpu: Kernels, shape: Shape, limbs: int) -> None:
    first, later = [300, 10, 700], [513, 256, 64]
    layers = [Layer(gpu, shape, limbs=limbs, blocks=num_blocks([LONGEST] * 3), seed=i) for i in range(2)]
    cos_sin, layout = angles(LONGEST, shape.heads.head_dim), batch(first)
    x = torch.randn(3, shape.hidden, device=DEVICE)
    graph, y = captured(lambda: run(layers, x, layout, cos_sin))
    for lengths in (first, later):
        fresh = batch(lengths)
        expected = run(layers, x, fresh, cos_sin)
        copy_into(layout, fresh)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected)


def test_a_row_has_the_same_bits_in_every_batch(gpu: Kernels) -> None:
    layers = [Layer(gpu, SMALL, limbs=2, blocks=num_blocks([600] * 70), seed=i) for i in range(2)]
    cos_sin, x = angles(600, 64), torch.randn(70, 512, device=DEVICE)

    def first_row(count: int) -> Tensor:
        lengths = [200, *range(300, 300 + count - 1)]
        for layer in layers:
            for plane in (layer.cache.k, layer.cache.v, layer.cache.k_scale, layer.cache.v_scale):  # type: ignore[attr-defined]
                plane.zero_()
        return run(layers, x[:count].contiguous(), layout_of(lengths, [1] * count, seed=count), cos_sin)[0]

    alone = first_row(1)
    for count in (2, 16, 17, 33, 70):
        assert torch.equal(first_row(count), alone), count
