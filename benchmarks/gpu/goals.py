"""The goals of the GPU backend: what each is read from, and the table of what was reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kernel_parts import FEW
from measure import Bench

Reading = Callable[[Bench], float | None]


@dataclass(frozen=True)
class Goal:
    """One row of the table. A goal that is `at_most` is reached by less."""

    name: str
    goal: float
    read: Reading
    beyond: float | None = None  # what would be splendid
    at_most: bool = False
    unit: str = ""

    def row(self, bench: Bench) -> dict[str, object]:
        found = self.read(bench)
        reached = None if found is None else (found <= self.goal if self.at_most else found >= self.goal)
        return {
            "name": self.name, "goal": self.goal, "beyond": self.beyond, "at_most": self.at_most, "unit": self.unit,
            "found": found, "reached": reached,
            "share": None if not found else (self.goal / found if self.at_most else found / self.goal),
        }  # fmt: skip


def _share(name: str) -> Reading:
    return lambda bench: bench.share(name)


def _rate(name: str) -> Reading:
    return lambda bench: bench.rate(name)


def _ratio(name: str, other: str) -> Reading:
    def read(bench: Bench) -> float | None:
        mine, theirs = bench.rate(name), bench.rate(other)
        return mine / theirs if mine and theirs else None

    return read


def _worst_product(rows: tuple[int, ...]) -> Reading:
    """The smallest share among products of int8 with so many rows."""

    def read(bench: Bench) -> float | None:
        starts = tuple(f"w8a8 m{count} " for count in rows)
        shares = [line.share for name, line in list(bench.lines.items()) if name.startswith(starts)]
        return min((share for share in shares if share is not None), default=None)

    return read


def _two_limbs_over_one(bench: Bench) -> float | None:
    """The largest ratio of times, W8A16 to W8A8, of products with up to 64 rows."""
    ratios = []
    for rows in FEW:
        for name, line in list(bench.lines.items()):
            other = bench.lines.get(name.replace("w8a16", "w8a8", 1))
            if name.startswith(f"w8a16 m{rows} ") and other is not None:
                ratios.append(line.milliseconds / other.milliseconds)
    return max(ratios, default=None)


OFFLINE = "offline 48 x (512 + 64)"
GOALS = (
    Goal("decode, batch 48, 1k, whole step", 0.75, _share("engine decode b48 1k"), 0.85, unit="of copy"),
    Goal("decode, batch 1, 1k, whole step", 0.60, _share("engine decode b1 1k"), 0.75, unit="of copy"),
    Goal("decode attention, 48 x 4k", 0.80, _share("attention b48 4096"), 0.90, unit="of copy"),
    Goal("its error against float64", 5e-4, _rate("attention error b48 4096"), at_most=True),
    Goal("int8 product, up to 64 rows", 0.85, _worst_product(FEW), unit="of copy"),
    Goal("int8 product, from 2048 rows", 1.5, _worst_product((2048, 8192)), unit="of bf16"),
    Goal("W8A16 / W8A8 time, up to 64 rows", 1.10, _two_limbs_over_one, at_most=True),
    Goal("prompt of 4k", 60000, _rate("engine prompt 4k"), 75000, unit="tok/s"),
    Goal("card idle between steps, batch 48", 0.03, _rate("card idle b48 1k"), at_most=True),
    Goal("chats of 8 turns, prefix cache / none", 2.5, _rate("chat of 8 turns, cache / none")),
    Goal("48 streams, server / engine", 0.95, _ratio("server 48 streams", "engine 48 streams")),
    Goal("transformers generate_batch", 4.0, _ratio(f"engine {OFFLINE}", f"transformers {OFFLINE}"), unit="times"),
    Goal("vLLM 0.26, bf16", 1.6, _ratio(f"engine {OFFLINE}", f"vllm bf16 {OFFLINE}"), unit="times"),
    Goal("vLLM 0.26, W8A8", 1.15, _ratio(f"engine {OFFLINE}", f"vllm w8a8 {OFFLINE}"), unit="times"),
)


def rows(bench: Bench) -> list[dict[str, object]]:
    """All goals with what was found so far."""
    return [goal.row(bench) for goal in GOALS]


def show(found: list[dict[str, object]]) -> None:
    """Print them; what was not measured has a dash."""
    print(f"\n{'goal':38} {'':7} {'goal':>8} {'beyond':>8} {'found':>9} {'share':>6}")
    for row in found:
        sign = "<=" if row["at_most"] else ">="
        cells = [f"{_text(row[key]):>{width}}" for key, width in (("goal", 8), ("beyond", 8), ("found", 9))]
        verdict = {True: "reached", False: "missed", None: "not measured"}[row["reached"]]  # type: ignore[index]
        print(f"{row['name']:38} {row['unit']:7} {sign}{' '.join(cells)} {_text(row['share']):>6}  {verdict}")


def _text(value: object) -> str:
    return "-" if value is None else f"{value:.4g}"
