"""Steps of a made-up engine for the attention tests: where rows go, and a cache filled chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from octavo.kernels.interface import BLOCK, BatchLayout, CacheSpec, HeadLayout, Kernels


@dataclass(frozen=True)
class Run:
    """One sequence in a step: tokens in the cache afterwards, rows of this step, its blocks."""

    length: int
    num_rows: int
    blocks: list[int]


def layout_of(runs: list[Run]) -> BatchLayout:
    """The layout of a step over `runs`."""
    starts, positions, slots = [0], [], []
    width = max(len(run.blocks) for run in runs)
    for run in runs:
        starts.append(starts[-1] + run.num_rows)
        for position in range(run.length - run.num_rows, run.length):
            positions.append(position)
            slots.append(run.blocks[position // BLOCK] * BLOCK + position % BLOCK)
    return BatchLayout(
        query_start=ints(starts),
        seq_lens=ints([run.length for run in runs]),
        block_tables=ints([run.blocks + [0] * (width - len(run.blocks)) for run in runs]),
        positions=ints(positions),
        slot_mapping=ints(slots),
        max_query_len=max(run.num_rows for run in runs),
        max_seq_len=max(run.length for run in runs),
    )


def ints(values: list[int]) -> Tensor:
    """int32, as layouts hold them."""
    return torch.tensor(values, dtype=torch.int32)


def angles(length: int, rotary_dim: int) -> Tensor:
    """Rotary cos and sin [length, rotary_dim], computed in float64."""
    frequencies = 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    turns = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([turns.cos(), turns.sin()], dim=1).float()


def random_rows(num_rows: int, heads: HeadLayout, *, seed: int = 0) -> Tensor:
    """qkv rows [num_rows, (heads + 2 · kv heads) · head_dim]."""
    width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed))


@dataclass
class Sequences:
    """Sequences that grow in one cache; `feed` runs one step and keeps the attention output of every row."""

    kernels: Kernels
    heads: HeadLayout
    spec: CacheSpec
    rows: list[Tensor]  # per sequence, qkv of all its tokens
    blocks: list[list[int]]
    num_blocks: int
    outputs: list[list[Tensor]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cache = self.kernels.make_cache(self.spec, self.num_blocks)
        self.angles = angles(max(len(rows) for rows in self.rows), self.heads.head_dim)
        self.outputs = [[] for _ in self.rows]
        self.lengths = [0 for _ in self.rows]

    def feed(self, counts: dict[int, int]) -> None:
        """One step: `counts[i]` more tokens of sequence i, for those named, in the order named."""
        counts = {i: min(n, len(self.rows[i]) - self.lengths[i]) for i, n in counts.items()}
        counts = {i: n for i, n in counts.items() if n > 0}
        parts = [self.rows[i][self.lengths[i] : self.lengths[i] + n] for i, n in counts.items()]
        for i, n in counts.items():
            self.lengths[i] += n
        layout = layout_of([Run(self.lengths[i], n, self.blocks[i]) for i, n in counts.items()])
        q = self.kernels.rope_write(torch.cat(parts), self.angles, layout, self.heads, self.cache)
        out = self.kernels.attention(q, layout, self.heads, self.cache)
        for i, part in zip(counts, out.split(list(counts.values())), strict=True):
            self.outputs[i].append(part.clone())

    def finished(self) -> bool:
        """True once every row has been fed."""
        return all(n == len(rows) for n, rows in zip(self.lengths, self.rows, strict=True))

    def result(self, i: int) -> Tensor:
        """Attention output of all rows of sequence i fed so far."""
        return torch.cat(self.outputs[i])


def blocks_for(lengths: list[int], *, seed: int | None = None) -> tuple[list[list[int]], int]:
    """Blocks of each sequence and how many blocks there are: in order, or shuffled by a seed."""
    needed = [(length + BLOCK - 1) // BLOCK for length in lengths]
    num_blocks = sum(needed) + 2
    order = list(range(num_blocks))
    if seed is not None:
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    ends = torch.tensor([0, *needed]).cumsum(0).tolist()
    return [order[a:b] for a, b in pairwise(ends)], num_blocks
