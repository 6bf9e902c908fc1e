"""The whole engine on the card: scheduler, batch state, recorded steps, sampling and delivery to the loop.

Decode with a full batch, long prompts, 48 streams at once, chats with and without a prefix cache, and the time in which
the card had nothing to do. Used by bench.py.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from gpu_model import Shape
from measure import Bench

from octavo.engine.core import EngineCore, default_budget, make_scheduler
from octavo.engine.interface import Runner
from octavo.engine.load import load_runner
from octavo.protocol.messages import SamplingParams, Submit
from octavo.settings import with_overrides

LONGEST = 4352


@dataclass
class Engine:
    """A loaded model and the loop over it."""

    runner: Runner
    budget: int
    core: EngineCore
    load_seconds: float = 0.0
    next_id: int = 0
    times: dict[int, list[float]] = field(default_factory=dict)  # when each request was queued and had tokens

    @classmethod
    def load(cls, folder: Path, *, batch_size: int, longest: int, device: str) -> Engine:
        """As the server does."""
        wanted = {"model_dir": str(folder), "device": device, "batch_size": batch_size, "max_seq_len": longest}
        more = {"max_dec_len": min(1024, longest), "use_warmup": True}
        settings = with_overrides(wanted | more | ({"kernels": "reference"} if device == "cpu" else {}))
        began = time.perf_counter()
        runner = load_runner(settings, lambda stage, fraction: None)
        budget = settings.max_num_batched_tokens or default_budget(runner.info)
        return cls(runner, budget, _core(runner, budget), time.perf_counter() - began)

    @property
    def vocab(self) -> int:
        return self.runner.info.vocab_size

    def add(self, prompt: list[int] | int, output: int) -> int:
        """Queue a prompt, or a random one of that length; returns its id."""
        self.next_id += 1
        if isinstance(prompt, int):
            prompt = np.random.default_rng(self.next_id).integers(3, self.vocab, prompt).tolist()
        params = SamplingParams(max_tokens=output, temperature=0.8, top_p=0.95, seed=self.next_id)
        self.times[self.next_id] = [time.perf_counter()]
        self.core.add(Submit(self.next_id, prompt, params))
        return self.next_id

    def turn(self) -> dict[int, list[int]]:
        """New tokens by request."""
        found = {output.seq_id: output.token_ids for output in self.core.turn() if output.token_ids}
        now = time.perf_counter()
        for seq_id in found:
            self.times[seq_id].append(now)
        return found

    def drain(self) -> dict[int, list[int]]:
        """Run until nothing is left; all tokens that came out."""
        tokens: dict[int, list[int]] = {}
        while self.core.has_work:
            for seq_id, new in self.turn().items():
                tokens.setdefault(seq_id, []).extend(new)
        return tokens

    @contextmanager
    def running(self, batch: int, context: int, *, steps: int) -> Iterator[None]:
        """Inside, a full batch decodes with about `context` tokens behind each sequence."""
        wanted = {self.add(max(1, context - steps // 2), steps + 64) for _ in range(batch)}
        started: set[int] = set()
        while started != wanted:
            started |= set(self.turn())
        yield
        self.core.abort_all()
        self.drain()

    def decode(self, batch: int, context: int, *, steps: int) -> float:
        """Seconds of a decode step."""
        with self.running(batch, context, steps=steps):
            done, began = 0, time.perf_counter()
            while done < steps:
                done += bool(self.turn())
            return (time.perf_counter() - began) / done

    def prompt(self, tokens: int) -> float:
        """Seconds of one prompt to its first token."""
        self.add(tokens, 1)
        began = time.perf_counter()
        self.drain()
        return time.perf_counter() - began

    def offline(self, requests: int, prompt: int, output: int) -> float:
        """Output tokens per second with everything queued at once."""
        for _ in range(requests):
            self.add(prompt, output)
        began = time.perf_counter()
        tokens = self.drain()
        return sum(map(len, tokens.values())) / (time.perf_counter() - began)

    def streams(self, count: int, *, each: int, prompt: int, output: int) -> dict[str, float]:
        """`count` clients that ask again as soon as they have their answer; tokens per second and waits."""
        self.times.clear()
        waiting = count * (each - 1)
        living = {self.add(prompt, output) for _ in range(count)}
        began, tokens = time.perf_counter(), 0
        left = dict.fromkeys(living, output)
        while self.core.has_work:
            for seq_id, new in self.turn().items():
                tokens += len(new)
                left[seq_id] -= len(new)
                if left[seq_id] <= 0 and waiting:
                    waiting -= 1
                    left[self.add(prompt, output)] = output
        rate = tokens / (time.perf_counter() - began)
        first = [times[1] - times[0] for times in self.times.values() if len(times) > 1]
        gaps = [gap for times in self.times.values() for gap in np.diff(times[1:]).tolist()]
        late = float(np.percentile(gaps, 99)) if gaps else 0.0
        return {"rate": rate, "first": statistics.median(first), "late": late}

    def chat(self, *, users: int, turns: int, system: int, said: int, answer: int, cached: bool) -> float:
        """Seconds of chats that send all that was said so far with every turn."""
        core = self.core
        self.core = _core(self.runner, self.budget, prefix_cache=cached)
        shared = np.random.default_rng(7).integers(3, self.vocab, system).tolist()
        texts = [list(shared) for _ in range(users)]
        began = time.perf_counter()
        for turn in range(turns):
            asked = {}
            for user, text in enumerate(texts):
                text += np.random.default_rng([user, turn]).integers(3, self.vocab, said).tolist()
                asked[self.add(list(text), answer)] = text
            for seq_id, tokens in self.drain().items():
                asked[seq_id] += tokens
        seconds = time.perf_counter() - began
        self.core = core
        return seconds

    def idle_share(self, batch: int, context: int, *, steps: int) -> float:
        """The part of the time of decode steps in which the card ran no kernel, by torch's profiler."""
        on_card = torch.cuda.is_available()
        activity = torch.profiler.ProfilerActivity.CUDA if on_card else torch.profiler.ProfilerActivity.CPU
        with self.running(batch, context, steps=2 * steps), torch.profiler.profile(activities=[activity]) as profile:
            for _ in range(steps):
                self.turn()
            if on_card:
                torch.cuda.synchronize()
        spans = sorted(
            (event.time_range.start, event.time_range.end)
            for event in profile.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
        )
        return idle_of(spans)

    def close(self) -> None:
        self.runner.close()


def _core(runner: Runner, budget: int, *, prefix_cache: bool = False) -> EngineCore:
    scheduler = make_scheduler(runner.info, max_num_batched_tokens=budget, prefix_cache=prefix_cache)
    return EngineCore(scheduler, runner, time.monotonic)


def idle_of(spans: list[tuple[float, float]]) -> float:
    """The share of the time from the first start to the last end that no span covers; spans in order of start."""
    if not spans:
        return 1.0
    covered, reached = 0.0, spans[0][0]
    for start, end in spans:
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1.0 - covered / (reached - spans[0][0])


def engine_part(bench: Bench, folder: Path, shape: Shape, *, quick: bool) -> None:
    """The engine as the server runs it: W8A8, int8 cache, sampling with top-p."""
    batch, longest = bench.sizes.of("batch", 48), bench.sizes.of("context", LONGEST)
    made = Engine.load(folder, batch_size=batch, longest=longest, device=bench.device.type)
    with closing(made):  # also after a failure: what comes next needs the memory
        bench.note("engine load", made.load_seconds, "s")
        for nominal, context in [(1, 1024), (48, 1024)] if quick else [(1, 1024), (48, 1024), (16, 1024), (48, 4096)]:
            if bench.has_time(f"engine decode b{nominal} {context // 1024}k"):
                _decode(bench, made, shape, nominal=(nominal, context))
        for part in (_prompts, _idle, _offline, _streams, _chats):
            if bench.has_time(f"engine: {part.__name__.strip('_')}"):
                part(bench, made)


def _prompts(bench: Bench, made: Engine) -> None:
    tokens = bench.sizes.of("context", 4096)
    made.prompt(tokens)
    bench.made("engine prompt 4k", statistics.median(made.prompt(tokens) for _ in range(3)) * 1000, tokens)


def _idle(bench: Bench, made: Engine) -> None:
    batch, context, steps = (bench.sizes.of(*size) for size in (("batch", 48), ("context", 1024), ("rows", 32)))
    bench.note("card idle b48 1k", made.idle_share(batch, context, steps=steps), "of time")


def _offline(bench: Bench, made: Engine) -> None:
    batch, prompt, output = (bench.sizes.of(*size) for size in (("batch", 48), ("rows", 512), ("rows", 64)))
    bench.note("engine offline 48 x (512 + 64)", made.offline(batch, prompt, output), "tok/s")


def _streams(bench: Bench, made: Engine) -> None:
    batch, prompt, output = (bench.sizes.of(*size) for size in (("batch", 48), ("rows", 512), ("rows", 128)))
    found = made.streams(batch, each=3, prompt=prompt, output=output)
    bench.note("engine 48 streams", found["rate"], "tok/s")
    bench.note("engine 48 streams, first token", found["first"] * 1000, "ms")
    bench.note("engine 48 streams, late gap (p99)", found["late"] * 1000, "ms")


def _decode(bench: Bench, made: Engine, shape: Shape, *, nominal: tuple[int, int]) -> None:
    batch, context = bench.sizes.of("batch", nominal[0]), bench.sizes.of("context", nominal[1])
    steps = bench.sizes.of("rows", 200)
    made.decode(batch, context, steps=steps // 2)  # records what the timed run replays
    seconds = made.decode(batch, context, steps=steps)
    cache = shape.layers * batch * context * shape.kv_heads * 2 * (shape.head_dim + 4)
    name = f"engine decode b{nominal[0]} {nominal[1] // 1024}k"
    bench.made(name, seconds * 1000, batch, moved=shape.weight_bytes + cache)


def _chats(bench: Bench, made: Engine) -> None:
    """Eight turns, the same with and without the cache."""
    sizes = bench.sizes
    long, short = sizes.of("rows", 1024), sizes.of("rows", 64)
    shape = {"users": sizes.of("batch", 16), "turns": 8, "system": long, "said": 2 * short, "answer": short}
    if sizes.of("context", LONGEST) < LONGEST:  # a dry run's chats fit its context
        shape |= {"turns": 2, "system": 70, "said": 8, "answer": 4}
    cold, cached = (made.chat(**shape, cached=cached) for cached in (False, True))
    bench.note("chat of 8 turns, cache / none", cold / cached, "times")
