"""The scheduler over a pretended model: what its calls take by waiting, running and cached. Used by growth.py."""

from __future__ import annotations

import gc
import hashlib
import random
import statistics
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from octavo.protocol.messages import SamplingParams, Submit
from octavo.scheduling.block_pool import BLOCK_SIZE, BlockPool
from octavo.scheduling.plan import Sampled, StepPlan, StepResult
from octavo.scheduling.scheduler import MAX_IN_FLIGHT, Limits, Scheduler

WAITING = (1, 10, 100, 1_000, 10_000)
RUNNING = (1, 4, 16, 32, 64, 128)
CACHED = (0, 1_000, 10_000, 100_000, 1_000_000)
VOCAB = 32_000


@dataclass
class Simulation:
    """A scheduler two plans deep, as the engine drives it, and the time that its calls take."""

    scheduler: Scheduler
    random: random.Random
    next_id: int = 0
    in_flight: deque[StepPlan] = field(default_factory=deque)

    @classmethod
    def make(cls, *, running: int, blocks: int) -> Simulation:
        limits = Limits(running, running + 2048, context_length=32_768, vocab_size=VOCAB)
        return cls(Scheduler(BlockPool(blocks), limits), random.Random(7))

    def add(self, prompt: int, output: int) -> None:
        self.next_id += 1
        params = SamplingParams(max_tokens=output, seed=self.next_id)
        tokens = [self.random.randrange(VOCAB) for _ in range(prompt)]
        self.scheduler.add(Submit(self.next_id, tokens, params))

    def step(self) -> tuple[float, int]:
        """Plan one step and commit the oldest; seconds that the scheduler took, and how many sequences ended."""
        began = time.perf_counter()
        plan = self.scheduler.schedule(began)
        seconds = time.perf_counter() - began
        if plan is not None:
            self.in_flight.append(plan)
        if not self.in_flight or (plan is not None and len(self.in_flight) < MAX_IN_FLIGHT):
            return seconds, 0
        oldest = self.in_flight.popleft()
        sampled = [Sampled(self.random.randrange(VOCAB)) if step.sample else None for step in oldest.sequences]
        result = StepResult(oldest.step_id, sampled, [None] * len(sampled))
        began = time.perf_counter()
        outputs = self.scheduler.commit(oldest, result)
        seconds += time.perf_counter() - began
        return seconds, sum(output.finish_reason is not None for output in outputs)

    def settle(self, running: int) -> None:
        """Until all prompts of a full batch are computed."""
        for _ in range(100_000):
            self.step()
            if self.scheduler.stats().num_running == running and self.in_flight:
                newest = self.in_flight[-1]
                if len(newest.sequences) == running and all(step.num_tokens == 1 for step in newest.sequences):
                    return
        raise SystemExit("the batch does not fill")


def fill_cache(pool: BlockPool, count: int) -> None:
    """Make `count` blocks findable and idle, as past requests leave them."""
    while count:
        blocks = pool.allocate(min(count, 4096)) or []
        for block in blocks:
            pool.register(block, hashlib.blake2b(block.to_bytes(8, "little"), digest_size=16).digest())
        pool.free(blocks)
        count -= len(blocks)


def milliseconds(samples: Sequence[float]) -> dict[str, float]:
    ordered = sorted(samples)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {"median_ms": statistics.median(ordered) * 1e3, "p99_ms": p99 * 1e3, "max_ms": ordered[-1] * 1e3}


def measure(
    *, running: int, waiting: int, cached: int = 0, output: int = 1_000_000, steps: int = 300
) -> dict[str, float]:
    """Scheduler time a step. With a short `output`, sequences end, start and queue in every few steps."""
    # just enough: with starts and ends each new sequence takes blocks from the oldest prefixes
    blocks = cached + (running + 8) * (16 if output >= 1000 else 6)
    simulation = Simulation.make(running=running, blocks=blocks)
    fill_cache(simulation.scheduler.pool, cached)
    for index in range(running + waiting):
        spread = (index * 37) % output if output < 1000 else 0  # so that they do not end in the same step
        simulation.add(256, output - spread if spread else output)
    if output >= 1000:
        simulation.settle(running)
    else:
        for _ in range(2 * output):
            _, ended = simulation.step()
            for _ in range(ended):
                simulation.add(256, output)
    gc.collect()
    samples = []
    for _ in range(steps):
        seconds, ended = simulation.step()
        samples.append(seconds)
        for _ in range(ended):
            simulation.add(256, output)
    return milliseconds(samples)


def measure_scheduler() -> dict[str, object]:
    steady, churn = {}, {}
    for waiting in WAITING:
        steady[waiting] = measure(running=128, waiting=waiting)
        churn[waiting] = measure(running=128, waiting=waiting, output=64)
        say(f"128 running, {waiting} waiting", steady[waiting], churn[waiting])
    by_running = {running: measure(running=running, waiting=1_000) for running in RUNNING}
    by_cached = {}
    for cached in CACHED:
        by_cached[cached] = measure(running=128, waiting=1_000, cached=cached, output=64)
        say(f"128 running, prefix cache of {cached} blocks of {BLOCK_SIZE}", by_cached[cached])
    return {"steady_by_waiting": steady, "churn_by_waiting": churn, "by_running": by_running, "by_cached": by_cached}


def say(name: str, *rows: dict[str, float]) -> None:
    text = "; ".join(f"{row['median_ms']:.3f} ms median, {row['p99_ms']:.3f} p99" for row in rows)
    print(f"{name}: {text}", file=sys.stderr, flush=True)
