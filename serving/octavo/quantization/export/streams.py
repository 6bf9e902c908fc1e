"""Activations between two layers, in files: no more rows of them are in memory than are worked on.

Plain float32, row after row. Used while a checkpoint is made; knows nothing of layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

BLOCK_ROWS = 2048  # about so many tokens go through a layer at once


@dataclass(frozen=True)
class Stream:
    """Rows [M, width] of a file, from the row `first` on."""

    path: Path
    width: int
    first: int = 0

    def read(self, rows: slice) -> Tensor:
        """[R, width] float32. Raises OSError if the file ends before."""
        values = torch.empty((rows.stop - rows.start, self.width))
        with self.path.open("rb") as file:
            file.seek((self.first + rows.start) * self.width * values.element_size())
            wanted = memoryview(values.view(torch.uint8).numpy()).cast("B")
            if file.readinto(wanted) != len(wanted):
                raise OSError(f"{self.path}: ends before row {rows.stop}")
        return values

    def after(self, rows: int) -> Stream:
        """The same without its first `rows`."""
        return Stream(self.path, self.width, self.first + rows)

    def write(self, parts: Iterable[Tensor]) -> None:
        """Make the file of rows that come one part after another."""
        with self.path.open("wb") as file:
            for part in parts:
                file.write(memoryview(part.contiguous().view(torch.uint8).numpy()).cast("B"))


def blocks(lengths: Iterable[int]) -> Iterator[tuple[slice, list[int]]]:
    """Whole sequences of these lengths in blocks of about BLOCK_ROWS: their rows, and the lengths in the block."""
    low, block = 0, list[int]()
    for length in lengths:
        if block and sum(block) + length > BLOCK_ROWS:
            yield slice(low, low + sum(block)), block
            low, block = low + sum(block), []
        block.append(length)
    if block:
        yield slice(low, low + sum(block)), block
