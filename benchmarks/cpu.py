"""The engine on a CPU with the standard 1B model: decode, prompts, a full load, and what the machine allows.

    python benchmarks/cpu.py [--schemes w8a8 w8a16] [--parts decode long prompt load products] [--runs 5] [--folder DIR]

Makes the model once (random weights by a seed, about 1.2 GB, outside the repository), loads it as the server does, and
drives the engine's own loop, one process per scheme. `long` decodes at a context of 2048, `load` serves 32 requests,
`products` compares with the library's. A shared machine changes its speed within seconds, so the ceilings are measured
before and after every single run, and each run has a share of its own; figures are medians. Writes
benchmarks/results/cpu.json. Takes about seven minutes; keep the machine quiet.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from meter import CONTEXT, Ceilings, Meter, memory_mib, processor
from products import compare
from standard_model import VOCAB, make_model

from octavo.engine.core import EngineCore, scheduler_for
from octavo.engine.load import load_runner
from octavo.protocol.messages import SamplingParams, Submit
from octavo.settings import with_overrides

HERE = Path(__file__).resolve().parent
DECODE_BATCHES, DECODE_STEPS, LONG_CONTEXT, LONG_RUNS = (1, 4, 16, 32), 20, 2048, 3
PROMPTS = (512, 2048)
PARTS = ("decode", "long", "prompt", "load", "products")


@dataclass
class Engine:
    """A loaded model and the loop over it."""

    core: EngineCore
    load_seconds: float
    next_id: int = 0

    @classmethod
    def load(cls, folder: Path, scheme: str, *, threads: int, kernels: str) -> Engine:
        """As the server does. The context is short so that the cache is small."""
        settings = with_overrides(
            {
                "model_dir": str(folder),
                "model_config_path": str(folder / f"{scheme}.json"),
                "max_seq_len": 4096,
                "max_dec_len": 1024,
                "batch_size": 32,
                "block_bs": 16.0,  # 82 000 tokens; memory is taken as they come
                "num_threads": threads,
                "prefix_cache": False,
                "kernels": kernels,
            }
        )
        began = time.perf_counter()
        runner = load_runner(settings, lambda stage, fraction: None)
        seconds = time.perf_counter() - began
        return cls(EngineCore(scheduler_for(settings, runner.info), runner, time.monotonic), seconds)

    def add(self, prompt: int, output: int) -> int:
        """Queue a random prompt; returns its id."""
        self.next_id += 1
        generator = np.random.default_rng(self.next_id)
        params = SamplingParams(max_tokens=output, temperature=0.8, top_p=0.95, seed=self.next_id)
        self.core.add(Submit(self.next_id, generator.integers(3, VOCAB, prompt).tolist(), params))
        return self.next_id

    def drain(self) -> None:
        """Run until nothing is left."""
        while self.core.has_work:
            self.core.turn()

    def start(self, batch: int, context: int) -> list[int]:
        """Fill the cache for a batch that then decodes; ids."""
        running = [self.add(context, 1000) for _ in range(batch)]
        started: set[int] = set()
        while started != set(running):
            started |= {output.seq_id for output in self.core.turn()}
        return running

    def steps(self) -> float:
        """Tokens per second of `DECODE_STEPS` steps of what runs."""
        steps, tokens = 0, 0
        began = time.perf_counter()
        while steps < DECODE_STEPS:
            outputs = self.core.turn()
            steps += bool(outputs)
            tokens += sum(len(output.token_ids) for output in outputs)
        return tokens / (time.perf_counter() - began)

    def decode(self, meter: Meter) -> dict[str, object]:
        """Each batch with about `CONTEXT` tokens behind every sequence."""
        figures = {}
        for batch in DECODE_BATCHES:
            self.start(batch, CONTEXT - meter.runs * DECODE_STEPS // 2)
            self.steps()
            figures[f"decode_{batch}"] = meter.measure(f"decode_{batch}", self.steps)
            self.core.abort_all()
            self.drain()
        return figures

    def decode_long(self, meter: Meter) -> dict[str, object]:
        """The same over `LONG_CONTEXT`: one batch that shrinks, since filling the cache takes most of the time."""
        figures = {}
        running = self.start(max(DECODE_BATCHES), LONG_CONTEXT - LONG_RUNS * DECODE_STEPS * 2)
        for batch in sorted(DECODE_BATCHES, reverse=True):
            self.core.abort(running[batch:])
            self.steps()
            name = f"decode_{batch}_at_{LONG_CONTEXT}"
            figures[name] = meter.measure(name, self.steps)
        self.core.abort_all()
        self.drain()
        return dict(reversed(figures.items()))

    def prompt(self, tokens: int) -> float:
        """Tokens per second of one prompt to its first token."""
        self.add(tokens, 1)
        began = time.perf_counter()
        self.drain()
        return tokens / (time.perf_counter() - began)

    def serve(self, *, requests: int = 32, at_once: int = 16, prompt: int = 256, output: int = 64) -> dict[str, float]:
        """Output tokens per second and gaps between tokens with `at_once` requests in flight."""
        last: dict[int, float] = {}
        gaps: list[float] = []
        began = time.perf_counter()
        left, done, tokens = requests, 0, 0
        while done < requests:
            while left and requests - left - done < at_once:
                self.add(prompt, output)
                left -= 1
            for answer in self.core.turn():
                now = time.perf_counter()
                if answer.seq_id in last:
                    gaps.append(now - last[answer.seq_id])
                last[answer.seq_id] = now
                tokens += len(answer.token_ids)
                done += answer.finish_reason is not None
        seconds = time.perf_counter() - began
        p50, p99 = np.percentile(gaps, [50, 99]) * 1e3
        return {"output_tok_s": tokens / seconds, "itl_p50_ms": float(p50), "itl_p99_ms": float(p99)}


def measure_scheme(folder: Path, scheme: str, args: argparse.Namespace) -> dict[str, object]:
    """All figures of one scheme; runs in a process of its own, so that its memory is its own."""
    engine = Engine.load(folder, scheme, threads=args.threads, kernels=args.kernels)
    gc.collect()
    gc.freeze()  # as the engine's process does
    engine.add(64, 4)
    engine.drain()
    meter = Meter(args.ceilings, 1 if scheme == "w8a8" else 2, args.runs)
    figures: dict[str, object] = {"load_seconds": engine.load_seconds, "memory_loaded_mib": memory_mib()}
    if "decode" in args.parts:
        figures |= engine.decode(meter)
    if "prompt" in args.parts:
        for tokens in PROMPTS:
            name = f"prompt_{tokens}"
            few = meter if tokens <= 512 else replace(meter, runs=max(1, args.runs // 2))
            figures[name] = few.measure(name, lambda tokens=tokens: engine.prompt(tokens))
    if "load" in args.parts:
        figures["serve_16"] = engine.serve()
    figures["memory_served_mib"] = memory_mib()  # before the long contexts, whose cache is a gigabyte
    if "long" in args.parts and scheme == "w8a8":  # filling the cache takes minutes; attention is the same in both
        figures |= engine.decode_long(replace(meter, runs=LONG_RUNS))
    engine.core.runner.close()
    return figures


def in_a_process(function: Callable[..., object], *arguments: object) -> object:
    """Call a function in a fresh process."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def report(scheme: str, figures: dict[str, object]) -> None:
    loaded, served = figures["memory_loaded_mib"], figures["memory_served_mib"]
    print(f"\n{scheme}: load {figures['load_seconds']:.2f} s, peak {loaded['peak']:.0f} MiB; "
          f"under load {served['proportional']:.0f} MiB, peak {served['peak']:.0f}")  # fmt: skip
    for name, value in figures.items():
        if name.startswith("serve"):
            print(f"  {name:17} " + "  ".join(f"{key} {number:.1f}" for key, number in value.items()))
        elif isinstance(value, dict) and "share" in value:
            spread = f"(best {value['best']:.1f}, worst {value['worst']:.1f})"
            share = (
                f"{value['share']:.0%} of the limit ({value['limited_by']}), "
                f"{value['share_with_cache']:.0%} counting the cache"
            )
            print(f"  {name:17} {value['median']:8.1f} tok/s  {spread:32} {share}")


def describe_machine(args: argparse.Namespace) -> dict[str, object]:
    """What the figures were measured on, its ceilings included; printed too."""
    load, rates = os.getloadavg()[0], args.ceilings.measure(1.0)
    ceilings = {"read_gb_s": rates.read, "vpdpbusd_gops": rates.vectors, "tdpbusd_gops": rates.tiles}
    print(f"{processor()}, {args.threads} threads: {rates.read:.1f} GB/s, {rates.vectors:.0f} GOPS by vpdpbusd, "
          f"{rates.tiles:.0f} by tdpbusd; products are held against {rates.instruction}", flush=True)  # fmt: skip
    return {
        "processor": processor(),
        "threads": args.threads,
        "date": time.strftime("%Y-%m-%d"),
        "load_average": load,
        "ceilings": {**ceilings, "instruction": rates.instruction},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schemes", nargs="+", default=["w8a8", "w8a16"], choices=["w8a8", "w8a16"])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "octavo-bench" / "l1b")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "cpu.json")
    args = parser.parse_args()
    make_model(args.folder)
    args.ceilings = Ceilings.build(args.folder, args.threads)
    machine = describe_machine(args)
    results: dict[str, dict[str, object]] = {}
    for scheme in args.schemes:
        results[scheme] = in_a_process(measure_scheme, args.folder, scheme, args)
        args.output.write_text(json.dumps({"machine": machine, **results}, indent=1) + "\n")
    for scheme, figures in results.items():
        report(scheme, figures)
    if "products" in args.parts:
        results["products"] = in_a_process(compare, args.threads, args.runs)
        for rows, ratio in results["products"].items():
            print(f"  product of {rows:>3} rows: {ratio['ratio']:.2f} times the library's speed")
        args.output.write_text(json.dumps({"machine": machine, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
