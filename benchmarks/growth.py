"""How cost grows: with the context, the batch, the waiting requests and the prefix cache.

    python benchmarks/growth.py [--parts scheduler context batch] [--json FILE] [--png FILE]

`scheduler` runs the scheduler alone over a pretended model; `context` and `batch` run the demo model. Prints a verdict
for each promise and ends with 1 if one is broken: the scheduler takes at most half a millisecond a step with 128
sequences and 10 000 waiting; a decode step and a prompt token cost a constant and a part that is linear in the context.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import random
import statistics
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from plots import Panel, draw

from octavo.protocol.messages import SamplingParams, Submit
from octavo.scheduling.block_pool import BLOCK_SIZE, BlockPool
from octavo.scheduling.plan import Sampled, StepPlan, StepResult
from octavo.scheduling.scheduler import MAX_IN_FLIGHT, Limits, Scheduler

HERE = Path(__file__).resolve().parent
PARTS = ("scheduler", "context", "batch")
WAITING = (1, 10, 100, 1_000, 10_000)
RUNNING = (1, 4, 16, 32, 64, 128)
CACHED = (0, 1_000, 10_000, 100_000, 1_000_000)
CONTEXTS = (256, 512, 1024, 2048, 4096, 8192, 16_000)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
MOST_MS = 0.5  # of the scheduler, a step
BEND = 1.35
WINDOW = 8  # decode steps timed together: a turn alone may find its step done already
VOCAB = 32_000


# ---- the scheduler over a pretended model


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


# ---- the demo model


def load_engine(batch: int):
    """The demo model with room for `batch` sequences of 256 + 128 or one of 16 384."""
    from octavo.engine.core import EngineCore, make_scheduler
    from octavo.engine.load import load_runner
    from octavo.settings import with_overrides

    settings = with_overrides(
        {
            "model_dir": str(HERE.parent / "demo" / "model"),
            "max_seq_len": 16_384,
            "max_dec_len": 256,
            "batch_size": batch,
            "block_bs": 6.0,
            "prefix_cache": False,
        }
    )
    runner = load_runner(settings, lambda stage, fraction: None)
    scheduler = make_scheduler(runner.info, max_num_batched_tokens=batch + 512, prefix_cache=False)
    return EngineCore(scheduler, runner, time.monotonic)


def step_seconds(core, *, context: int, batch: int, steps: int, first_id: int) -> tuple[float, float]:
    """Seconds of the prompts, and of a decode step behind them (the best of some windows: other work only adds)."""
    generator = random.Random(first_id)
    vocab = core.runner.info.vocab_size
    for seq_id in range(first_id, first_id + batch):
        tokens = [generator.randrange(3, vocab) for _ in range(context - steps // 2)]
        core.add(Submit(seq_id, tokens, SamplingParams(max_tokens=steps + 80, seed=seq_id)))
    started: set[int] = set()
    began = time.perf_counter()
    while len(started) < batch:
        started |= {output.seq_id for output in core.turn()}
    prompt = time.perf_counter() - began
    windows = []
    for _ in range(max(1, steps // WINDOW)):
        done, began = 0, time.perf_counter()
        while done < WINDOW:
            done += bool(core.turn())
        windows.append((time.perf_counter() - began) / WINDOW)
    core.abort_all()
    while core.has_work:
        core.turn()
    return prompt, min(windows)


def measure_context() -> dict[int, dict[str, float]]:
    core, rows = load_engine(4), {}
    step_seconds(core, context=256, batch=1, steps=16, first_id=1)
    for index, context in enumerate(CONTEXTS):
        runs = [step_seconds(core, context=context, batch=1, steps=48, first_id=100 * index + run) for run in (3, 4, 5)]
        prompt, step = (min(values) for values in zip(*runs))
        rows[context] = {"decode_ms": step * 1e3, "prompt_us_per_token": prompt / context * 1e6}
        print(f"context {context}: {rows[context]}", file=sys.stderr, flush=True)
    core.runner.close()
    return rows


def measure_batch() -> dict[int, dict[str, float]]:
    core, rows = load_engine(128), {}
    step_seconds(core, context=256, batch=2, steps=16, first_id=1)
    for batch in BATCHES:
        _, step = step_seconds(core, context=256, batch=batch, steps=32, first_id=1000 * batch)
        rows[batch] = {"step_ms": step * 1e3, "us_per_token": step / batch * 1e6}
        print(f"batch {batch}: {rows[batch]}", file=sys.stderr, flush=True)
    core.runner.close()
    return rows


# ---- verdicts and pictures


def bend(rows: dict[int, float]) -> float:
    """The cost of the largest size over what a straight line through the smaller ones says: 1 is linear."""
    *smaller, (largest, cost) = sorted(rows.items())
    mean_size = statistics.mean(size for size, _ in smaller)
    mean_cost = statistics.mean(value for _, value in smaller)
    spread = sum((size - mean_size) ** 2 for size, _ in smaller)
    slope = sum((size - mean_size) * (value - mean_cost) for size, value in smaller) / spread
    return cost / (mean_cost + slope * (largest - mean_size))


def verdicts(report: dict[str, object]) -> list[tuple[bool, str]]:
    out = []
    scheduler = report.get("scheduler")
    if isinstance(scheduler, dict):
        for kind, name in (
            ("steady_by_waiting", "decode only"),
            ("churn_by_waiting", "starting and ending all the time"),
        ):
            cost = scheduler[kind][10_000]["median_ms"]
            out.append(
                (cost <= MOST_MS, f"scheduler, 128 running, 10 000 waiting, {name}: {cost:.3f} ms a step (≤ {MOST_MS})")
            )
        few, many = (scheduler["by_cached"][size]["median_ms"] for size in (1_000, 1_000_000))
        out.append(
            (many <= 2 * few, f"prefix cache of 1 000 000 blocks: {many:.3f} ms against {few:.3f} with 1 000 (≤ 2 ×)")
        )
    context = report.get("context")
    if isinstance(context, dict):
        for key, name in (("decode_ms", "decode step"), ("prompt_us_per_token", "prompt token")):
            found = bend({size: row[key] for size, row in context.items()})
            text = f"{name} at the longest context: {found:.2f} of what a line through the shorter ones says (≤ {BEND})"
            out.append((found <= BEND, text))
    batch = report.get("batch")
    if isinstance(batch, dict):
        small, large = batch[32]["us_per_token"], batch[128]["us_per_token"]
        out.append(
            (large <= 1.1 * small, f"a token costs {large:.1f} µs at batch 128 against {small:.1f} at 32 (≤ 1.1 ×)")
        )
    return out


def panels(report: dict[str, object]) -> list[Panel]:
    out = []
    scheduler = report.get("scheduler")
    if isinstance(scheduler, dict):

        def line(name: str) -> list[tuple[float, float]]:
            return [(size, row["median_ms"]) for size, row in scheduler[name].items()]

        waiting = {"decode only": line("steady_by_waiting"), "starting and ending": line("churn_by_waiting")}
        out.append(Panel("Scheduler, 128 running", "waiting requests", "ms a step", waiting, log_x=True, bound=MOST_MS))
        sizes = {"running": line("by_running")}
        out.append(Panel("Scheduler, 1 000 waiting", "running sequences", "ms a step", sizes, bound=MOST_MS))
        blocks = {"starting and ending": line("by_cached")}
        out.append(Panel("Scheduler, prefix cache", "cached blocks", "ms a step", blocks, log_x=True, bound=MOST_MS))
    context = report.get("context")
    if isinstance(context, dict):
        decode = {"decode step, ms": [(size, row["decode_ms"]) for size, row in context.items()]}
        prompt = {"prompt token, µs": [(size, row["prompt_us_per_token"]) for size, row in context.items()]}
        out.append(Panel("Decode, batch 1", "context, tokens", "ms", decode))
        out.append(Panel("Prompt", "length, tokens", "µs a token", prompt))
    batch = report.get("batch")
    if isinstance(batch, dict):
        steps = {"step, ms": [(size, row["step_ms"]) for size, row in batch.items()]}
        out.append(Panel("Decode, context 256", "batch", "ms", steps))
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "growth.json")
    parser.add_argument("--png", type=Path, default=HERE / "results" / "growth.png")
    arguments = parser.parse_args()
    measures = {"scheduler": measure_scheduler, "context": measure_context, "batch": measure_batch}
    report: dict[str, object] = {name: measures[name]() for name in PARTS if name in arguments.parts}
    found = verdicts(report)
    report["verdicts"] = [{"holds": holds, "text": text} for holds, text in found]
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), **report}, indent=1) + "\n")
    draw(arguments.png, panels(report), title="How cost grows")
    for holds, text in found:
        print(f"{'holds ' if holds else 'BROKEN'}  {text}")
    return 0 if all(holds for holds, _ in found) else 1


if __name__ == "__main__":
    sys.exit(main())
