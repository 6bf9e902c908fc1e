"""The engine without a server: load a model in this process and ask it.

    llm = LLM("demo/model")
    for answer in llm.generate(["hello, llm", "你好!"], Sampling(max_tokens=64)):
        print(answer.text)

Runs the same loop as the server, on the caller's thread; one `LLM` belongs to one thread. The same prompt, seed and
options give the same tokens as the server gives.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from octavo.engine.core import EngineCore, scheduler_for
from octavo.engine.interface import Runner
from octavo.engine.offline import (
    Answer,
    Completion,
    Delta,
    Messages,
    Prompt,
    Sampling,
    Usage,
    check_lengths,
    encode_prompt,
    sampling_params,
    split_prompts,
)
from octavo.protocol.messages import EngineInfo, EngineStats, SamplingParams, SequenceOutput, Submit
from octavo.settings import Settings, set_thread_environ, with_overrides
from octavo.text.tokenizer import Tokenizer

__all__ = ["LLM", "Completion", "Delta", "Sampling", "SamplingParams", "Usage"]

Options = Sampling | SamplingParams


class LLM:
    """One loaded model. Close it, or use it in a `with` block, to give its memory back."""

    def __init__(
        self,
        model_dir: str | Path,
        *,
        batch_size: int | None = None,
        max_seq_len: int | None = None,
        max_dec_len: int | None = None,
        block_bs: float | None = None,
        kv_memory_fraction: float | None = None,
        use_cache_kv_int8: bool | None = None,
        weight_quant: str | None = None,
        dtype: str | None = None,
        max_num_batched_tokens: int | None = None,
        prefix_cache: bool | None = None,
        device: str | None = None,
        kernels: str | None = None,
        num_threads: int | None = None,
        settings: Mapping[str, object] | None = None,
        progress: bool = True,
    ) -> None:
        """Load a Hugging Face folder. Settings are those of the server, by field name; None: the environment's value.

        `settings` takes the ones that have no argument of their own. Raises SettingsError, and what the loader raises
        when the folder holds no model that can be read.
        """
        given = {
            "batch_size": batch_size,
            "max_seq_len": max_seq_len,
            "max_dec_len": max_dec_len,
            "block_bs": block_bs,
            "kv_memory_fraction": kv_memory_fraction,
            "use_cache_kv_int8": use_cache_kv_int8,
            "weight_quant": weight_quant,
            "dtype": dtype,
            "max_num_batched_tokens": max_num_batched_tokens,
            "prefix_cache": prefix_cache,
            "device": device,
            "kernels": kernels,
            "num_threads": num_threads,
            **(settings or {}),
        }
        chosen = {name: value for name, value in given.items() if value is not None}
        checked = with_overrides({**chosen, "model_dir": str(model_dir)})
        tokenizer = Tokenizer.load(checked.model_dir)
        self._set_up(checked, tokenizer, _load(checked, progress=progress))

    @classmethod
    def over(cls, runner: Runner, tokenizer: Tokenizer, settings: Settings) -> LLM:
        """An LLM over a runner that is loaded already."""
        llm = cls.__new__(cls)
        llm._set_up(settings, tokenizer, runner)
        return llm

    def _set_up(self, settings: Settings, tokenizer: Tokenizer, runner: Runner) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self._core = EngineCore(scheduler_for(settings, runner.info), runner, time.monotonic)
        self._answers: dict[int, Answer] = {}  # of the sequences that have not ended
        self._next_id = 0

    @property
    def info(self) -> EngineInfo:
        """The loaded model."""
        return self._core.runner.info

    @property
    def stats(self) -> EngineStats:
        """Counters since the start and gauges of now."""
        return self._core.stats()

    # ---- asking

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Options | Sequence[Options] | None = None,
        *,
        raw: bool = False,
        progress: bool = True,
    ) -> list[Completion]:
        """Answer one prompt or many, batched; completions in the order of the prompts.

        A prompt is a text (put through the model's chat template if it has one, unless `raw`), a list of messages, or a
        list of token ids. `params`: one for all or one for each; `SamplingParams` are taken as they are, end tokens
        included. Raises InvalidRequest and ContextLengthExceeded before anything runs.
        """
        asked = split_prompts(prompts)
        answers = self._start(asked, _one_each(params, len(asked)), raw=raw)
        try:
            with _bar(progress) as bar:
                self._run(answers, bar)
        finally:
            self._abort(answers)
        return [answer.completion for answer in answers if answer.completion is not None]

    def chat(self, messages: Messages, params: Options | None = None, *, progress: bool = False) -> Completion:
        """The answer to one conversation."""
        return self.generate([messages], params, progress=progress)[0]

    def stream(self, prompt: Prompt, params: Options | None = None, *, raw: bool = False) -> Iterator[Delta]:
        """One answer as it comes, from the first `next` on; the last delta has `completion`.

        Closing the iterator cancels the answer. Several streams may be read in turn; a turn of the engine serves all.
        """
        (answer,) = self._start([prompt], [params or Sampling()], raw=raw)
        try:
            while True:
                delta = answer.delta()
                if delta is None:
                    self._turn()
                    continue
                yield delta
                if delta.completion is not None:
                    return
        finally:
            self._abort([answer])

    def close(self) -> None:
        """Cancel everything and free the model."""
        self._abort(list(self._answers.values()))
        self._core.runner.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- running

    def _start(self, prompts: Sequence[Prompt], options: Sequence[Options], *, raw: bool) -> list[Answer]:
        """Check all, then queue all."""
        answers = [self._prepare(prompt, params, raw=raw) for prompt, params in zip(prompts, options)]
        for answer in answers:
            self._answers[answer.submit.seq_id] = answer
            self._take(self._core.add(answer.submit))
        return answers

    def _prepare(self, prompt: Prompt, options: Options, *, raw: bool) -> Answer:
        token_ids = encode_prompt(prompt, self.tokenizer, raw=raw)
        params = options if isinstance(options, SamplingParams) else self._sampling_params(options, len(token_ids))
        context, max_seq_len = self.info.context_length, self.settings.max_seq_len
        check_lengths(len(token_ids), params, context=context, max_seq_len=max_seq_len)
        self._next_id += 1
        plain = isinstance(prompt, str) and (raw or self.tokenizer.chat_template is None)
        stop = options.stop_strings if isinstance(options, Sampling) else ()
        return Answer(Submit(self._next_id, token_ids, params), self.tokenizer, stop=stop, plain=plain)

    def _sampling_params(self, options: Sampling, num_prompt: int) -> SamplingParams:
        return sampling_params(
            options,
            seed=secrets.randbits(63) if options.seed is None else options.seed,
            room=max(min(self.settings.max_dec_len, self.info.context_length - num_prompt), 1),
            end_token_ids=sorted({*self.info.end_token_ids, *self.tokenizer.eos_ids}),
            defaults=self.tokenizer.defaults,
        )

    def _run(self, answers: Sequence[Answer], bar: Progress) -> None:
        task = bar.add_task("answers", total=len(answers), speed="")
        started = time.monotonic()
        while any(answer.completion is None for answer in answers):
            self._turn()
            done = sum(answer.completion is not None for answer in answers)
            tokens = sum(answer.num_sampled for answer in answers)
            bar.update(task, completed=done, speed=f"{tokens / max(time.monotonic() - started, 1e-6):.0f} tok/s")

    def _turn(self) -> None:
        self._take(self._core.turn())

    def _take(self, outputs: Sequence[SequenceOutput]) -> None:
        """Hand outputs to their answers; end the sequences that a stop string ended."""
        for output in outputs:
            answer = self._answers.get(output.seq_id)
            if answer is None:
                continue
            if answer.take(output):
                self._core.abort([output.seq_id])
            if answer.completion is not None:
                del self._answers[output.seq_id]

    def _abort(self, answers: Sequence[Answer]) -> None:
        """Cancel those that have not ended and let the steps under way go by."""
        living = [answer.submit.seq_id for answer in answers if answer.completion is None]
        self._take(self._core.abort(living))
        while self._core.has_work and not self._answers:
            self._turn()


def _load(settings: Settings, *, progress: bool) -> Runner:
    set_thread_environ(settings)
    from octavo.engine.load import load_runner  # torch: heavy, and reads the environment when imported

    with _bar(progress) as bar:
        task = bar.add_task("loading", total=100, speed="")
        return load_runner(settings, _reporter(bar, task))


def _reporter(bar: Progress, task: int) -> Callable[[str, float], None]:
    return lambda stage, fraction: bar.update(task, description=f"loading: {stage}", completed=int(fraction * 100))  # type: ignore[arg-type]


def _bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("{task.fields[speed]}"), console=Console(stderr=True), disable=not shown)


def _one_each(params: Options | Sequence[Options] | None, count: int) -> list[Options]:
    if params is None or isinstance(params, (Sampling, SamplingParams)):
        return [params or Sampling()] * count
    if len(params) != count:
        raise ValueError(f"params has {len(params)} entries for {count} prompts")
    return list(params)
