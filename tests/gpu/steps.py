"""Steps of a made-up engine on the device, for attention, graphs and whole layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from octavo.kernels.interface import (
    BLOCK,
    ActivationFormat,
    BatchLayout,
    CacheSpec,
    HeadLayout,
    Kernels,
    LayerCache,
    PackedLinear,
)

Result = TypeVar("Result")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # a CPU for dry runs of the benchmark


def layout_of(lengths: list[int], rows: list[int], *, seed: int = 0, max_seq_len: int = 0) -> BatchLayout:
    """Sequences with `lengths` tokens in the cache, the last `rows` of them in this step; blocks shuffled by seed."""
    widths = [-(-length // BLOCK) for length in lengths]
    order = torch.randperm(sum(widths), generator=torch.Generator().manual_seed(seed)).int()
    tables = torch.zeros(len(lengths), max(widths), dtype=torch.int32)
    first = 0
    for i, width in enumerate(widths):
        tables[i, :width] = order[first : first + width]
        first += width
    positions = torch.cat([torch.arange(length - n, length) for length, n in zip(lengths, rows)]).int()
    owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
    slots = tables[owner, positions.long() // BLOCK] * BLOCK + positions % BLOCK
    starts = torch.tensor([0, *rows]).cumsum(0).int()
    return BatchLayout(
        query_start=starts.to(DEVICE),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        block_tables=tables.to(DEVICE),
        positions=positions.to(DEVICE),
        slot_mapping=slots.to(DEVICE),
        max_query_len=max(rows),
        max_seq_len=max(max_seq_len, *lengths),
    )


def num_blocks(lengths: list[int]) -> int:
    """Blocks that `layout_of` hands out."""
    return sum(-(-length // BLOCK) for length in lengths)


def angles(length: int, rotary_dim: int) -> Tensor:
    """Rotary cos and sin [length, rotary_dim], computed in float64."""
    frequencies = 500000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    turns = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([turns.cos(), turns.sin()], dim=1).float().to(DEVICE)


@dataclass(frozen=True)
class Shape:
    """A decoder layer."""

    hidden: int
    intermediate: int
    heads: HeadLayout


LLAMA_8B = Shape(4096, 14336, HeadLayout(32, 8, 128, 128**-0.5))
ROOM_FOR_8B = 24 << 30  # free bytes: its int8 weights twice while they load, and a cache
SMALL = Shape(512, 1280, HeadLayout(8, 2, 64, 0.125))
TOY = Shape(64, 96, HeadLayout(4, 2, 16, 0.25))  # for dry runs of the benchmark


class Layer:
    """One decoder layer with random int8 weights, run as models/decoder.py runs it."""

    def __init__(self, kernels: Kernels, shape: Shape, *, limbs: int, blocks: int, seed: int = 0) -> None:
        self.kernels, self.shape, self.format = kernels, shape, ActivationFormat(limbs)
        generator = torch.Generator(DEVICE).manual_seed(seed)
        heads = shape.heads
        width = heads.num_heads * heads.head_dim
        self.qkv = self._weights(width + 2 * heads.num_kv_heads * heads.head_dim, shape.hidden, generator)
        self.out = self._weights(shape.hidden, width, generator)
        self.gate_up = self._weights(2 * shape.intermediate, shape.hidden, generator)
        self.down = self._weights(shape.hidden, shape.intermediate, generator)
        self.norm = torch.rand(shape.hidden, generator=generator, device=DEVICE) + 0.5
        self.cache: LayerCache = kernels.make_cache(CacheSpec(heads.num_kv_heads, heads.head_dim, torch.int8), blocks)

    def _weights(self, outputs: int, inputs: int, generator: torch.Generator) -> PackedLinear:
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=DEVICE, generator=generator)
        scale = torch.full((outputs, 1), 0.7 / (73.0 * inputs**0.5), device=DEVICE)
        return self.kernels.pack_int8(weight, scale, format=self.format)

    def forward(self, x: Tensor, layout: BatchLayout, cos_sin: Tensor) -> Tensor:
        """[M, hidden] float32 → [M, hidden]."""
        kernels, heads = self.kernels, self.shape.heads
        normed, x = kernels.rms_norm(x, self.norm, 1e-5, self.format)
        q = kernels.rope_write(kernels.linear(normed, self.qkv), cos_sin, layout, heads, self.cache)
        attended = kernels.quantize(kernels.attention(q, layout, heads, self.cache), self.format)
        x = kernels.linear(attended, self.out, residual=x)
        normed, x = kernels.rms_norm(x, self.norm, 1e-5, self.format)
        hidden = kernels.silu_mul(kernels.linear(normed, self.gate_up), self.format)
        return kernels.linear(hidden, self.down, residual=x)


def captured(work: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of work on fixed memory, and where its result will be."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, and fills the allocator
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph, result


def run(layers: list[Layer], x: Tensor, layout: BatchLayout, cos_sin: Tensor) -> Tensor:
    """All layers."""
    for layer in layers:
        x = layer.forward(x, layout, cos_sin)
    return x
