"""The same run without a server: the engine's own loop in this process, fed when requests are due.

What it measures is the upper bound of what the server can deliver. torch is imported when the model is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from octavo.cli.bench.drive import OnDone, Plan, Run, planned_tokens
from octavo.cli.bench.figures import Outcome
from octavo.cli.bench.work import Item, WorkError
from octavo.protocol.messages import SamplingParams, SequenceOutput, Submit
from octavo.settings import Settings, set_thread_environ

if TYPE_CHECKING:
    from octavo.engine.core import EngineCore
    from octavo.text.tokenizer import Tokenizer

Encode = Callable[[Item], list[int]]


@contextmanager
def load(settings: Settings) -> Iterator[EngineCore]:
    """The model of MODEL_DIR and the loop over it, as the server's engine process has them."""
    set_thread_environ(settings)
    from octavo.engine.core import EngineCore, scheduler_for
    from octavo.engine.load import load_runner

    runner = load_runner(settings, lambda stage, fraction: None)
    try:
        yield EngineCore(scheduler_for(settings, runner.info), runner, time.monotonic)
    finally:
        runner.close()


def encoder(settings: Settings) -> Encode:
    """Token ids of a request; the tokenizer is read when the first text comes."""
    tokenizers: list[Tokenizer] = []

    def encode(item: Item) -> list[int]:
        if item.token_ids is not None:
            return list(item.token_ids)
        if not tokenizers:
            from octavo.text.tokenizer import Tokenizer

            tokenizers.append(Tokenizer.load(settings.model_dir))
        tokenizer = tokenizers[0]
        if item.messages is None:
            return tokenizer.encode(item.text or "", add_special_tokens=True)
        if tokenizer.chat_template is None:
            raise WorkError("the model has no chat template for messages")
        return tokenizer.encode(tokenizer.chat_template.render(list(item.messages)))

    return encode


class EngineDriver:
    """Submits what is due and reads what each turn of the engine gives."""

    def __init__(self, core: EngineCore, *, temperature: float | None, seed: int) -> None:
        self._core = core
        self._temperature = 1.0 if temperature is None else temperature
        self._seed = seed
        self._next_id = 0
        self._running: dict[int, Outcome] = {}

    def drive(self, plan: Plan, run: Run, encode: Encode, on_done: OnDone) -> None:
        """Everything to its end. `run` has what has ended also when this is interrupted."""
        prompts = [encode(item) for item in plan.items]
        cpu, run.began = time.process_time(), time.monotonic()
        limit, sent = plan.limit or len(prompts), 0
        try:
            while sent < len(prompts) or self._running:
                now = time.monotonic()
                while sent < len(prompts) and len(self._running) < limit and run.began + plan.due[sent] <= now:
                    due, item = run.began + plan.due[sent], plan.items[sent]
                    outcome = Outcome(sent, due=due, sent=now, input_tokens=planned_tokens(item), counted="ids")
                    outcome.input_tokens = len(prompts[sent])
                    self._submit(outcome, prompts[sent], item.output_len, run, on_done)
                    sent += 1
                if self._core.has_work:
                    self._take(self._core.turn(), run, on_done)
                elif sent < len(prompts):
                    time.sleep(max(0.0, run.began + plan.due[sent] - time.monotonic()))
        finally:
            run.cpu_seconds = time.process_time() - cpu
            self._core.abort_all()

    def _submit(self, outcome: Outcome, prompt: list[int], output_len: int, run: Run, on_done: OnDone) -> None:
        self._next_id += 1
        params = SamplingParams(max_tokens=output_len, temperature=self._temperature, seed=self._seed + self._next_id)
        self._running[self._next_id] = outcome
        self._take(self._core.add(Submit(self._next_id, prompt, params)), run, on_done)

    def _take(self, outputs: list[SequenceOutput], run: Run, on_done: OnDone) -> None:
        now = time.monotonic()
        for output in outputs:
            outcome = self._running.get(output.seq_id)
            if outcome is None:
                continue
            if output.token_ids:
                outcome.arrivals.append(now)
                outcome.output_tokens += len(output.token_ids)
            if output.finish_reason is None:
                continue
            outcome.ended = now
            if output.error is not None:
                outcome.fail("engine error", output.error, now=now)
            del self._running[output.seq_id]
            run.outcomes.append(outcome)
            on_done(outcome)
