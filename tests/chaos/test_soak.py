"""Mixed traffic with random cancels and kills: every request that is not cancelled ends as it should, nothing grows.

The long form is `OCTAVO_SOAK_SECONDS=1800 pytest tests/chaos/test_soak.py -k long`.
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
from chaos.scoreboard import Row
from chaos.victims import Victim, wait_until
from octavo_client import AsyncClient, Options

pytestmark = pytest.mark.server

WORKERS = 12
CASES = 24  # different requests, asked again and again
LATE_SECONDS = 30.0
NAMES = ("engine", "stub", "triton", "gateway-1", "gateway-2")
MEMORY_MB = 64  # more than that in a process that was never killed is a leak


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


def soak(house: House, row: Row, *, seconds: float, seed: int) -> None:
    victim = house.victim
    traffic = Traffic(victim.server.gateway, seed=seed, row=row)
    traffic.learn()
    victim.wait_idle()
    before = victim.footprint()
    traffic.thread.start()
    torment(victim, row, seconds=seconds, chance=random.Random(seed))
    traffic.stop()
    print("errors:", traffic.errors)
    gauges = victim.wait_idle(seconds=20)
    assert gauges.get("num_free_blocks", 0) + gauges.get("num_cached_blocks", 0) == total_blocks(victim)
    wait_until(lambda: not victim.leaks(before), seconds=5, what="no leak") if victim.leaks(before) else None
    row.leaks += victim.leaks(before)
    grown = victim.footprint().memory_mb["node"] - before.memory_mb["node"]
    row.leaks += [f"node grew by {grown} MB"] if grown > MEMORY_MB else []
    row.recovery = [max(row.recovery)]
    row.check()


def total_blocks(victim: Victim) -> int:
    return victim.health()["model"]["num_blocks"]


def test_soak_short(house: House, row: Row) -> None:
    soak(house, row, seconds=8.0, seed=1)


@pytest.mark.slow
def test_soak_long(house: House, row: Row) -> None:
    soak(house, row, seconds=float(os.environ.get("OCTAVO_SOAK_SECONDS", "180")), seed=2)
