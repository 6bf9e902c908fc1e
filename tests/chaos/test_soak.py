"""Mixed traffic with random cancels and kills, then the same without kills: every request that is not cancelled ends as
it should, and nothing grows.

The half-hour form is `OCTAVO_SOAK_SECONDS=1800 pytest tests/chaos/test_soak.py`; without the variable it takes three
minutes, and every run of the tests has it. The slope of each process's memory is that of the calm half, in which nobody
was killed.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from contextlib import aclosing

import pytest

from chaos.conftest import House
from chaos.prober import probing
from chaos.scoreboard import Row
from chaos.victims import Victim, wait_until
from octavo_client import AsyncClient, Options

pytestmark = pytest.mark.server

WORKERS = 12
CASES = 24  # different requests, asked again and again
LATE_SECONDS = 30.0
NAMES = ("engine", "stub", "triton", "gateway-1", "gateway-2")
NODE_GROWTH_MB = 32  # over the whole run: node is never killed
SLOPE_MB = 30.0  # a minute, of any process in the calm half, ...
WARM_SECONDS = 20.0  # ... after caches have filled


def options_of(case: int) -> Options:
    length = 20 + 37 * case % 300
    ends = case % 2 == 1
    return Options(infer_seed=case, temperature=case % 4 / 2, max_dec_len=length, ignore_eos=not ends, timeout=200.0)


def prompt_of(case: int) -> str | list[int]:
    return f"Tell me about {case}." if case % 3 else [5 + case] * (40 + 60 * case)


class Traffic:
    """Workers that ask, compare and now and then leave early, in a thread of their own."""

    def __init__(self, url: str, *, seed: int, row: Row) -> None:
        self._url = url
        self._row = row
        self._random = random.Random(seed)
        self._known: dict[int, tuple[list[int], str]] = {}
        self._stop = threading.Event()
        self.errors: list[str] = []
        self.thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def learn(self) -> None:
        """What each case says when nothing happens."""
        asyncio.run(self._learn())

    async def _learn(self) -> None:
        async with AsyncClient(self._url) as client:
            answers = await asyncio.gather(
                *(client.generate(prompt_of(case), options=options_of(case)) for case in range(CASES))
            )
        self._known = {case: (answer.token_ids, answer.text) for case, answer in enumerate(answers)}

    def stop(self) -> None:
        self._stop.set()
        self.thread.join(LATE_SECONDS + 30)
        assert not self.thread.is_alive(), "requests hang"

    async def _run(self) -> None:
        async with AsyncClient(self._url) as client:
            await asyncio.gather(*(self._work(client) for _ in range(WORKERS)))

    async def _work(self, client: AsyncClient) -> None:
        while not self._stop.is_set():
            case = self._random.randrange(CASES)
            leave_after = self._random.randrange(1, 40) if self._random.random() < 0.3 else None
            await self._ask(client, case, leave_after)

    async def _ask(self, client: AsyncClient, case: int, leave_after: int | None) -> None:
        tokens: list[int] = []
        text, began = "", time.monotonic()
        self._row.streams += 1
        try:
            async with aclosing(client.stream(prompt_of(case), options=options_of(case))) as deltas:
                async for delta in deltas:
                    text += delta.text
                    tokens += delta.token_ids
                    if leave_after is not None and len(tokens) >= leave_after:
                        return
        except Exception as error:
            self._row.lost += 1
            self.errors.append(f"case {case}: {type(error).__name__}: {error}")
            return
        self._row.changed += (tokens, text) != self._known[case]
        self._row.late += time.monotonic() - began > LATE_SECONDS


def torment(victim: Victim, row: Row, *, seconds: float, chance: random.Random) -> None:
    """Kill something now and then."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(chance.uniform(1.0, 4.0))
        name = chance.choice(NAMES)
        old = victim.signal(name)
        row.faults += 1
        row.recovery.append(victim.recover(name, old, seconds=40))


def calm(victim: Victim, *, seconds: float) -> dict[str, float]:
    """Let the traffic go on; how fast each process grows, in MB a minute (least squares over one sample a second)."""
    samples: list[tuple[float, dict[str, int]]] = []
    began = time.monotonic()
    while (now := time.monotonic() - began) < seconds:
        if now > min(WARM_SECONDS, seconds / 3):
            samples.append((now, victim.footprint().memory_mb))
        time.sleep(1.0)
    return {name: slope([(at, memory[name]) for at, memory in samples if name in memory]) for name in samples[-1][1]}


def slope(points: list[tuple[float, float]]) -> float:
    """Of a straight line through points (seconds, MB), in MB a minute."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return 60.0 * sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


def soak(house: House, row: Row, *, seconds: float, seed: int) -> None:
    victim = house.victim
    traffic = Traffic(victim.server.gateway, seed=seed, row=row)
    traffic.learn()
    victim.wait_idle()
    before = victim.footprint()
    traffic.thread.start()
    with probing(victim.server, row, cuts=True):
        torment(victim, row, seconds=seconds / 2, chance=random.Random(seed))
    slopes = calm(victim, seconds=seconds / 2)
    traffic.stop()
    print("errors:", traffic.errors)
    print("MB a minute:", {name: round(value, 2) for name, value in slopes.items()})
    gauges = victim.wait_idle(seconds=20)
    assert gauges.get("num_free_blocks", 0) + gauges.get("num_cached_blocks", 0) == total_blocks(victim)
    wait_until(lambda: not victim.leaks(before), seconds=10, what="no leak", why=lambda: str(victim.leaks(before)))
    grow = {name: value for name, value in slopes.items() if value > SLOPE_MB}
    row.leaks += [f"{name} grows by {value:.1f} MB a minute" for name, value in grow.items()]
    grown = victim.footprint().memory_mb["node"] - before.memory_mb["node"]
    row.leaks += [f"node grew by {grown} MB"] if grown > NODE_GROWTH_MB else []
    row.recovery = [max(row.recovery)]
    row.check()


def total_blocks(victim: Victim) -> int:
    return victim.health()["model"]["num_blocks"]


def test_soak(house: House, row: Row) -> None:
    soak(house, row, seconds=float(os.environ.get("OCTAVO_SOAK_SECONDS", "180")), seed=2)
