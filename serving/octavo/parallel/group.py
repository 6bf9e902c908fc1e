"""Ranks that share the layers of one model. Layers call a `Group` where a row-parallel product needs the other ranks.

Only one rank exists so far; the places are there so that more can come without touching the layers.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Group(Protocol):
    """Collective operations. Every rank calls them in the same order."""

    rank: int
    size: int

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' tensors, added in rank order, on every rank. May change x."""
        ...

    def max(self, x: Tensor) -> Tensor:
        """The elementwise maximum over all ranks. May change x."""
        ...


class SingleRank:
    """Rank 0 of 1: nothing to exchange."""

    rank = 0
    size = 1

    def sum(self, x: Tensor) -> Tensor:
        return x

    def max(self, x: Tensor) -> Tensor:
        return x


class ParallelError(ValueError):
    """The asked-for number of ranks is not served; the message is one line for the user."""


def make_group(num_ranks: int) -> Group:
    """The group of this process. Raises ParallelError for more than one rank."""
    if num_ranks != 1:
        raise ParallelError(f"MP_NUM={num_ranks}: tensor parallelism is not supported yet; set MP_NUM=1")
    return SingleRank()
