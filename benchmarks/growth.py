"""How cost grows: with the context, the batch, the waiting requests and the prefix cache.

    python benchmarks/growth.py [--parts scheduler context batch] [--json FILE] [--png FILE]

`scheduler` runs the scheduler alone over a pretended model; `context` and `batch` run the demo model on one thread and
count its CPU time, which other work on the machine changes little; all sizes in turn, some rounds, and what is said of
growth is the median of what each round says. Prints a verdict for each promise and ends with 1 if one is broken: the
scheduler takes at most half a millisecond a step with 128 sequences and 10 000 waiting; a decode step and a prompt
token cost a constant and a part that is linear in the context.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from plots import Panel, draw
from scheduler_alone import measure_scheduler

from octavo.protocol.messages import SamplingParams, Submit

HERE = Path(__file__).resolve().parent
PARTS = ("scheduler", "context", "batch")
CONTEXTS = (256, 512, 1024, 2048, 4096, 8192, 16_000)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
MOST_MS = 0.5  # of the scheduler, a step
BEND = 1.35
ROUNDS = 5
WINDOW = 8  # decode steps timed together: a turn alone may find its step done already


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
            "num_threads": 1,
            "prefix_cache": False,
        }
    )
    runner = load_runner(settings, lambda stage, fraction: None)
    scheduler = make_scheduler(runner.info, max_num_batched_tokens=batch + 512, prefix_cache=False)
    return EngineCore(scheduler, runner, time.monotonic)


def step_seconds(core, *, context: int, batch: int, steps: int, first_id: int) -> tuple[float, float]:
    """CPU seconds of the prompts, and of a decode step behind them (the best of some windows: other work only adds)."""
    generator = random.Random(first_id)
    vocab = core.runner.info.vocab_size
    for seq_id in range(first_id, first_id + batch):
        tokens = [generator.randrange(3, vocab) for _ in range(context - steps // 2)]
        core.add(Submit(seq_id, tokens, SamplingParams(max_tokens=steps + 80, seed=seq_id)))
    started: set[int] = set()
    began = time.process_time()
    while len(started) < batch:
        started |= {output.seq_id for output in core.turn()}
    prompt = time.process_time() - began
    windows = []
    for _ in range(max(1, steps // WINDOW)):
        done, began = 0, time.process_time()
        while done < WINDOW:
            done += bool(core.turn())
        windows.append((time.process_time() - began) / WINDOW)
    core.abort_all()
    while core.has_work:
        core.turn()
    return prompt, min(windows)


def in_turn(sizes: Sequence[int], cost: Callable[[int, int], dict[str, float]]) -> dict[int, dict[str, list[float]]]:
    """size -> name -> what each round gave; a round goes through all sizes, up and down by turns."""
    rows: dict[int, dict[str, list[float]]] = {size: {} for size in sizes}
    for index in range(ROUNDS):
        for size in sizes if index % 2 else reversed(sizes):
            for name, value in cost(size, index).items():
                rows[size].setdefault(name, []).append(value)
    for size, row in rows.items():
        text = ", ".join(f"{name} {statistics.median(values):.3f}" for name, values in row.items())
        print(f"{size}: {text}", file=sys.stderr, flush=True)
    return rows


def measure_context() -> dict[int, dict[str, list[float]]]:
    core = load_engine(4)
    step_seconds(core, context=256, batch=1, steps=16, first_id=1)

    def cost(context: int, index: int) -> dict[str, float]:
        prompt, step = step_seconds(core, context=context, batch=1, steps=48, first_id=100 * context + index)
        return {"decode_ms": step * 1e3, "prompt_us_per_token": prompt / context * 1e6}

    rows = in_turn(CONTEXTS, cost)
    core.runner.close()
    return rows


def measure_batch() -> dict[int, dict[str, list[float]]]:
    core = load_engine(128)
    step_seconds(core, context=256, batch=2, steps=16, first_id=1)

    def cost(batch: int, index: int) -> dict[str, float]:
        first_id = 1000 * (batch + 200 * index)
        _, step = step_seconds(core, context=256, batch=batch, steps=32, first_id=first_id)
        return {"step_ms": step * 1e3, "us_per_token": step / batch * 1e6}

    rows = in_turn(BATCHES, cost)
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


def by_round(rows: dict[int, dict[str, list[float]]], name: str) -> list[dict[int, float]]:
    """size -> cost, once for each round."""
    return [dict(zip(rows, column)) for column in zip(*(row[name] for row in rows.values()))]


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} (rounds {min(values):.2f} to {max(values):.2f})"


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
            found = [bend(costs) for costs in by_round(context, key)]
            text = f"{name} at the longest context over what a line through the shorter ones says: {spread(found)}"
            out.append((statistics.median(found) <= BEND, f"{text} (≤ {BEND})"))
    batch = report.get("batch")
    if isinstance(batch, dict):
        ratios = [costs[128] / costs[32] for costs in by_round(batch, "us_per_token")]
        text = f"a token at batch 128 over one at batch 32: {spread(ratios)} (≤ 1.1)"
        out.append((statistics.median(ratios) <= 1.1, text))
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

    def medians(rows: dict[int, dict[str, list[float]]], name: str) -> list[tuple[float, float]]:
        return [(size, statistics.median(row[name])) for size, row in rows.items()]

    context = report.get("context")
    if isinstance(context, dict):
        decode = {"decode step, ms": medians(context, "decode_ms")}
        prompt = {"prompt token, µs": medians(context, "prompt_us_per_token")}
        out.append(Panel("Decode, batch 1", "context, tokens", "CPU ms", decode))
        out.append(Panel("Prompt", "length, tokens", "CPU µs a token", prompt))
    batch = report.get("batch")
    if isinstance(batch, dict):
        out.append(Panel("Decode, context 256", "batch", "CPU ms", {"step, ms": medians(batch, "step_ms")}))
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
