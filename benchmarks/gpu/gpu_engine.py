"""The whole engine on the card: scheduler, batch state, recorded steps, sampling and delivery to the loop.

Decode with a full batch, long prompts, and 48 streams at once, with the share of the copy bandwidth that a decode step
reaches and the time in which the card had nothing to do. Used by bench.py.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from octavo.engine.core import EngineCore, default_budget, make_scheduler
from octavo.engine.load import load_runner
from octavo.protocol.messages import SamplingParams, Submit
from octavo.settings import with_overrides


@dataclass
class Engine:
    """A loaded model and the loop over it."""

    core: EngineCore
    load_seconds: float
    vocab: int
    next_id: int = 0

    @classmethod
    def load(cls, folder: Path, *, batch_size: int, longest: int, prefix_cache: bool = False) -> Engine:
        """As the server does."""
        settings = with_overrides(
            {
                "model_dir": str(folder), "device": "cuda", "batch_size": batch_size, "max_seq_len": longest,
                "max_dec_len": 1024, "prefix_cache": prefix_cache, "use_warmup": True,
            }
        )  # fmt: skip
        began = time.perf_counter()
        runner = load_runner(settings, lambda stage, fraction: None)
        seconds = time.perf_counter() - began
        budget = settings.max_num_batched_tokens or default_budget(runner.info)
        scheduler = make_scheduler(runner.info, max_num_batched_tokens=budget, prefix_cache=prefix_cache)
        return cls(EngineCore(scheduler, runner, time.monotonic), seconds, runner.info.vocab_size)

    def add(self, prompt: int, output: int, *, temperature: float = 0.8) -> int:
        """Queue a random prompt; returns its id."""
        self.next_id += 1
        tokens = np.random.default_rng(self.next_id).integers(3, self.vocab, prompt).tolist()
        params = SamplingParams(max_tokens=output, temperature=temperature, top_p=0.95, seed=self.next_id)
        self.core.add(Submit(self.next_id, tokens, params))
        return self.next_id

    def drain(self) -> int:
        """Run until nothing is left; tokens that came out."""
        tokens = 0
        while self.core.has_work:
            tokens += sum(len(output.token_ids) for output in self.core.turn())
        return tokens

    def decode(self, batch: int, context: int, *, steps: int = 200) -> float:
        """Seconds of a decode step of a full batch with about `context` tokens behind each sequence."""
        running = {self.add(context - steps // 2, steps + 64) for _ in range(batch)}
        started: set[int] = set()
        while started != running:
            started |= {output.seq_id for output in self.core.turn()}
        done, began = 0, time.perf_counter()
        while done < steps:
            done += bool(self.core.turn())
        seconds = time.perf_counter() - began
        self.core.abort_all()
        self.drain()
        return seconds / done

    def prompt(self, tokens: int) -> float:
        """Seconds of one prompt to its first token."""
        self.add(tokens, 1)
        began = time.perf_counter()
        self.drain()
        return time.perf_counter() - began

    def offline(self, *, requests: int, prompt: int, output: int) -> float:
        """Output tokens per second with everything queued at once."""
        for _ in range(requests):
            self.add(prompt, output)
        began = time.perf_counter()
        tokens = self.drain()
        return tokens / (time.perf_counter() - began)

    def idle_share(self, batch: int, context: int) -> float:
        """The part of the time of decode steps in which the card ran no kernel, by torch's profiler."""
        for _ in range(batch):
            self.add(context - 32, 256)
        for _ in range(64):
            self.core.turn()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(32):
                self.core.turn()
            torch.cuda.synchronize()
        self.core.abort_all()
        self.drain()
        spans = sorted(
            (event.time_range.start, event.time_range.end)
            for event in profile.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
        )
        return idle_of(spans)

    def close(self) -> None:
        self.core.runner.close()


def idle_of(spans: list[tuple[float, float]]) -> float:
    """The share of the time from the first start to the last end that no span covers; spans in order of start."""
    if not spans:
        return 1.0
    covered, reached = 0.0, spans[0][0]
    for start, end in spans:
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1.0 - covered / (reached - spans[0][0])
