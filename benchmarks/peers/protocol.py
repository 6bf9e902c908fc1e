"""How a peer's driver talks: one JSON object a line on stdin, one on stdout; and how work is measured on any engine.

    {"op": "load", "folder": …, "threads": 2}                      -> {"load_s": …}   and "room"
    {"op": "fill", "batch": 32, "context": 200}                    -> {"tok_s": …} of the prompts; the batch stays
    {"op": "shrink", "batch": 16}                                  -> {}           the others are cancelled
    {"op": "decode", "tokens": 8}                                  -> {"tok_s": …} the batch goes on for 8 steps
    {"op": "prompt", "tokens": 512}                                -> {"tok_s": …} to the first token
    {"op": "serve", "requests": 32, "at_once": 16, "prompt": 256, "output": 64}
                                    -> {"tok_s", "ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms"}
    {"op": "quit"}

A driver runs in its peer's own environment, so this module needs the standard library alone. What the peer prints on
stdout goes to stderr. Every engine makes exactly the tokens that are asked for, greedily, from the same prompts.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Protocol

VOCAB = 32_000
MOST_DECODED = 800  # tokens that a filled batch may go on for


class Stepper(Protocol):
    """An engine that batches by itself, one step a call."""

    def add(self, prompt: list[int], output: int) -> int:
        """Queue a prompt for exactly `output` greedy tokens; its id."""

    def step(self) -> list[tuple[int, int, bool]]:
        """One step: (id, new tokens, whether it has ended) of those that got any."""

    def cancel(self, names: list[int]) -> None:
        """End these now."""


def prompt_of(length: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, VOCAB) for _ in range(length)]


class SteppedPeer:
    """decode, prompt and serve over a `Stepper`."""

    room: int | None = None  # tokens of all sequences that it is asked to hold at most, where that is a bound

    def __init__(self) -> None:
        self._seed = 0
        self._batch: list[int] = []
        self.engine: Stepper

    def prompt_ids(self, length: int) -> list[int]:
        """One that was never asked before: no prefix cache helps."""
        self._seed += 1
        return prompt_of(length, self._seed)

    def fill(self, batch: int, context: int) -> dict[str, float]:
        engine = self.engine
        began = time.perf_counter()
        self._batch = [engine.add(self.prompt_ids(context), MOST_DECODED) for _ in range(batch)]
        started: set[int] = set()
        while len(started) < batch:
            started |= {name for name, count, _ in engine.step() if count}
        return {"tok_s": batch * context / (time.perf_counter() - began)}

    def shrink(self, batch: int) -> dict[str, float]:
        self.engine.cancel(self._batch[batch:])
        del self._batch[batch:]
        return {}

    def decode(self, tokens: int) -> dict[str, float]:
        self._one_step()  # not timed: what was under way while this process was stopped ends here
        made = 0
        began = time.perf_counter()
        for _ in range(tokens):
            made += self._one_step()
        return {"tok_s": made / (time.perf_counter() - began)}

    def _one_step(self) -> int:
        made = 0
        while not made:
            made = sum(count for _, count, _ in self.engine.step())
        return made

    def prompt(self, tokens: int) -> dict[str, float]:
        ids = self.prompt_ids(tokens)
        began = time.perf_counter()
        self.engine.add(ids, 1)
        ended = False
        while not ended:
            ended = any(over for _, _, over in self.engine.step())
        return {"tok_s": tokens / (time.perf_counter() - began)}

    def serve(self, requests: int, at_once: int, prompt: int, output: int) -> dict[str, float]:
        prompts = [self.prompt_ids(prompt) for _ in range(requests)]
        asked: dict[int, float] = {}
        last: dict[int, float] = {}
        first, gaps, made, done = [], [], 0, 0
        began = time.perf_counter()
        while done < requests:
            while prompts and len(asked) - done < at_once:
                asked[self.engine.add(prompts.pop(), output)] = time.perf_counter()
            for name, count, over in self.engine.step():
                now = time.perf_counter()
                if count:
                    (gaps if name in last else first).append(now - last.get(name, asked[name]))
                    last[name] = now
                made += count
                done += over
        return figures(made / (time.perf_counter() - began), first, gaps)


def figures(tok_s: float, first: list[float], gaps: list[float]) -> dict[str, float]:
    out = {"tok_s": tok_s}
    for name, values in (("ttft", sorted(first)), ("itl", sorted(gaps))):
        for share in (50, 99):
            value = values[min(len(values) - 1, len(values) * share // 100)] if values else float("nan")
            out[f"{name}_p{share}_ms"] = value * 1e3
    return out


def main(load: Callable[[str, int], object], *, prepare: Callable[[str, str], None] | None = None) -> None:
    """`DRIVER prepare SOURCE TARGET` makes the peer's own model folder once; without arguments, serve the lines."""
    if len(sys.argv) == 4 and sys.argv[1] == "prepare":
        if prepare is not None:
            prepare(sys.argv[2], sys.argv[3])
        return
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    peer = None
    for line in sys.stdin:
        asked = json.loads(line)
        op = asked.pop("op")
        if op == "quit":
            break
        try:
            if op == "load":
                began = time.perf_counter()
                peer = load(asked["folder"], asked["threads"])
                answer: dict[str, object] = {"load_s": time.perf_counter() - began}
                if peer.room is not None:
                    answer["room"] = peer.room
            else:
                answer = getattr(peer, op)(**asked)
        except Exception as error:  # the edge of the driver: the session goes on without this figure
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)  # some engines hang when they are taken apart
