"""Tables of tiles, one file a kind of card, as benchmarks/gpu/tune.py wrote them. Read once when the backend is made.

No entry changes a bit of a result: products of integers have the same bits with any tile and any number of parts. What
a table has no entry for follows the rules in tiles.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from octavo.kernels.gpu.device import DeviceLimits
from octavo.kernels.gpu.tiles import MOST_PARTS, MOST_TILES, Tile, num_tiles

FOLDER = Path(__file__).with_name("tuned")
ROW_CLASSES = (16, 32, 64, 256, 1 << 30)  # products with up to so many rows share an entry
POWERS = {1 << i for i in range(4, 9)}


@dataclass(frozen=True)
class Choice:
    """A tile, and into how many parts K is cut."""

    tile: Tile
    parts: int = 1

    def has_counters(self, rows: int, outputs: int) -> bool:
        """Whether products of up to `rows` rows can be cut so: every tile of a cut one has a counter."""
        return self.parts == 1 or num_tiles(self.tile, rows, outputs) * self.parts <= MOST_TILES


class BadTable(ValueError):
    """A table that no kernel could run by; the message says which entry."""


def row_class(rows: int) -> int:
    """The class of products with so many rows."""
    return next(limit for limit in ROW_CLASSES if rows <= limit)


def entry_name(rows: int, outputs: int, inputs: int, limbs: int) -> str:
    """Under which name a product's choice is kept."""
    return f"{row_class(rows)} rows, {outputs} x {inputs}, {limbs} limbs"


def file_of(card: str, folder: Path = FOLDER) -> Path:
    """Where the table of a card is, named like it."""
    return folder / (re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-") + ".json")


@dataclass(frozen=True)
class Table:
    """What was found fastest on a card."""

    products: Mapping[str, Choice]
    dependent_launches: bool = False


def read_table(card: str, limits: DeviceLimits, folder: Path = FOLDER) -> Table:
    """The table of a card, empty if there is none. Raises BadTable."""
    path = file_of(card, folder)
    if not path.is_file():
        return Table({})
    found = json.loads(path.read_text())
    products = {name: _choice(f"{path.name}: {name}", values, limits) for name, values in found["products"].items()}
    return Table(products, dependent_launches=found.get("dependent_launches", False) and limits.capability >= (9, 0))


def _choice(where: str, values: Mapping[str, int], limits: DeviceLimits) -> Choice:
    parts = values.get("parts", 1)
    tile = Tile(**{name: value for name, value in values.items() if name != "parts"})
    limbs = 2 if where.endswith("2 limbs") else 1
    rows, outputs, inputs = _sizes(where)
    blocks = {tile.block_m, tile.block_n, tile.block_k}
    if not blocks <= POWERS or tile.num_warps not in (4, 8) or not 1 <= tile.num_stages <= 8:
        raise BadTable(f"{where}: no such tile: {tile}")
    if inputs % tile.block_k or tile.shared_bytes(limbs) > limits.shared_bytes:
        raise BadTable(f"{where}: {tile} fits neither the shape nor the card's shared memory")
    if not 1 <= parts <= MOST_PARTS:
        raise BadTable(f"{where}: {parts} parts; there are 1 to {MOST_PARTS}")
    choice = Choice(tile, parts)
    if not choice.has_counters(rows, outputs):
        raise BadTable(f"{where}: {parts} parts of {num_tiles(tile, rows, outputs)} tiles; {MOST_TILES} is the most")
    return choice


def _sizes(name: str) -> tuple[int, int, int]:
    """Rows at most, outputs and inputs of an entry's products."""
    found = re.search(r"(\d+) rows, (\d+) x (\d+),", name)
    if found is None:
        raise BadTable(f"{name}: no product is called so")
    rows, outputs, inputs = map(int, found.groups())
    return rows, outputs, inputs
