"""Which tile a product runs with: a table by rows, limbs and the memory of the card. No tile changes an integer result.

The entries were chosen by the compiled code (registers, spills, instructions per byte), not by timing; a table that was
measured on a card (tuned_tiles.py) goes before them. See docs/gpu.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from octavo.kernels.gpu.device import DeviceLimits
from octavo.kernels.interface import FP8_STEP

GROUP_M = 8  # tiles of M that share their weights in L2
MOST_PARTS = 8
MOST_TILES = 16384  # times parts, of a product that is cut along K: more fill any card
LEAST_STEPS = 4  # of one part
PROGRAMS = 2  # at work on one processor


@dataclass(frozen=True)
class Tile:
    """Rows, columns and inputs of one program's step, and how it is launched."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def shared_bytes(self, limbs: int) -> int:
        """Shared memory of the pipeline."""
        return (self.block_m * limbs + self.block_n) * self.block_k * self.num_stages


def int8_tile(
    rows: int, outputs: int, inputs: int, *, limbs: int, group: int, residual: bool, limits: DeviceLimits
) -> Tile:
    """The tile for `rows`. group: inputs of a group, a multiple of 32, or 0. inputs: a multiple of 128, or of group."""
    tile = _wanted(rows, outputs, limbs=limbs, residual=residual)
    block_k = tile.block_k
    while (group or inputs) % block_k:
        block_k //= 2
    if group:
        # A group's sum is scaled into a second accumulator: half the rows keep it in registers.
        tile = Tile(min(tile.block_m, 32), min(tile.block_n, 64), block_k, 4, tile.num_stages)
    stages = tile.num_stages
    while stages > 1 and Tile(tile.block_m, tile.block_n, block_k, 4, stages).shared_bytes(limbs) > limits.shared_bytes:
        stages -= 1
    return Tile(tile.block_m, tile.block_n, block_k, tile.num_warps, stages)


def _wanted(rows: int, outputs: int, *, limbs: int, residual: bool) -> Tile:
    if rows <= 16:
        # Narrow outputs: more programs, each with less to do, so that all of the card reads.
        return Tile(16, 32 if outputs <= 8192 else 64, 256, 4, 4)
    if rows <= 32:
        return Tile(32, 64, 128, 4, 4)
    if rows <= 64:
        return Tile(64, 64 if outputs <= 8192 else 128, 128, 4, 4)
    return Tile(128, 128, 128, 8, 4 if limbs == 1 or not residual else 3)


def num_tiles(tile: Tile, rows: int, outputs: int) -> int:
    """Tiles of a product's result."""
    return -(-rows // tile.block_m) * -(-outputs // tile.block_n)


def parts_of(tile: Tile, rows: int, outputs: int, inputs: int, *, limits: DeviceLimits) -> int:
    """Into how many parts K is cut so that few tiles keep the whole card reading: 1, 2, 4 or 8.

    A part has at least four steps, and only products that read more than they compute are cut.
    """
    if rows > 64:
        return 1
    tiles = num_tiles(tile, rows, outputs)
    room = limits.processors * PROGRAMS * 5 // 4  # a few programs too many cost less than many too few
    most = min(MOST_PARTS, room // tiles, MOST_TILES // tiles, inputs // (LEAST_STEPS * tile.block_k))
    return 1 << max(0, most.bit_length() - 1)


def fp8_tile(rows: int, outputs: int, *, limits: DeviceLimits) -> Tile:
    """The tile of a product of e4m3. K in steps of 128 and one kind of instruction on a card: the order of sums."""
    block_n = 64 if outputs <= 8192 else 128
    if (9, 0) <= limits.capability < (12, 0):  # asynchronous tensor cores, from 64 rows on
        return Tile(64, block_n, FP8_STEP, 4, 4) if rows <= 64 else Tile(128, 128, FP8_STEP, 8, 4)
    if rows <= 16:
        return Tile(16, block_n, FP8_STEP, 4, 4)
    return Tile(64, 64, FP8_STEP, 4, 3) if rows <= 64 else Tile(128, 128, FP8_STEP, 8, 3)


def float_tile(dtype: torch.dtype) -> Tile:
    """The one tile of float products: its order of sums must not depend on the number of rows."""
    return Tile(16, 64, 64, 4, 3) if dtype == torch.float32 else Tile(16, 128, 64, 4, 3)
