"""Plans in, results out: one worker thread that turns each `StepPlan` into tensors, runs the model and samples.

Lives in the engine process. The engine loop calls `submit` and `collect`; model, caches and slot states belong to the
worker thread alone. A failed step becomes a RunnerError in `collect`; the worker goes on with the next plan. Knows no
requests.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from octavo.engine.fingerprint import fingerprint
from octavo.engine.interface import Runner, RunnerError
from octavo.engine.kv_cache import available_memory, cache_specs, count_blocks, longest_sequence, make_caches
from octavo.engine.sampler import SlotStates
from octavo.engine.step_tensors import forward_batch, prompt_rows
from octavo.kernels.choose import choose
from octavo.kernels.interface import BLOCK, Kernels, LayerCache
from octavo.models.config import ModelConfig, load_config
from octavo.models.decoder import Decoder
from octavo.models.loader import LoadOptions, Progress, load_decoder
from octavo.parallel.group import make_group
from octavo.protocol.messages import EngineInfo, SamplingParams, TokenLogprobs
from octavo.quantization.formats.reader import ReaderInputs
from octavo.quantization.formats.source import TensorSource
from octavo.quantization.scheme import FLOAT_TYPES
from octavo.scheduling.plan import Sampled, SequenceStep, StepPlan, StepResult
from octavo.settings import Settings

LOG = logging.getLogger(__name__)
LOGPROB_ROWS = 64  # prompt rows whose logits are in memory at once
WARMUP_TOKENS = 256


class CpuRunner:
    """A `Runner` with one worker thread."""

    def __init__(
        self,
        model: Decoder,
        caches: Sequence[LayerCache],
        info: EngineInfo,
        *,
        torch_threads: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.info = info
        self._step = _Step(model, caches, SlotStates(info.batch_size))
        self._clock = clock
        self._plans: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[StepResult | Exception] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._work, args=(torch_threads,), name="octavo-runner", daemon=True)
        self._worker.start()

    def submit(self, plan: StepPlan) -> None:
        """Queue a plan and return at once."""
        self._plans.put(plan)

    def collect(self) -> StepResult:
        """Wait for the oldest submitted plan. Raises RunnerError if its step failed."""
        result = self._results.get()
        if isinstance(result, Exception):
            raise RunnerError(f"{type(result).__name__}: {result}") from result
        return result

    def close(self) -> None:
        """Stop the worker after the plans under way."""
        self._plans.put(None)
        self._worker.join()

    def _work(self, torch_threads: int | None) -> None:
        if torch_threads is not None:
            torch.set_num_threads(torch_threads)  # holds for this thread and those that start later
        while (plan := self._plans.get()) is not None:
            self._results.put(self._attempt(plan))

    def _attempt(self, plan: StepPlan) -> StepResult | Exception:
        started = self._clock()
        try:
            with torch.inference_mode():
                result = self._step.run(plan)
        except Exception as error:  # the engine loop's edge: it reaches the loop through `collect`
            LOG.exception("step %d failed", plan.step_id)
            return error
        result.seconds = self._clock() - started
        return result


class _Step:
    """What the worker thread does with one plan."""

    def __init__(self, model: Decoder, caches: Sequence[LayerCache], slots: SlotStates) -> None:
        self._model = model
        self._kernels = model.kernels
        self._caches = caches
        self._slots = slots

    def run(self, plan: StepPlan) -> StepResult:
        for slot in plan.evicted_slots:
            self._slots.release(slot)
        for step in plan.sequences:
            if step.fresh:
                self._slots.start(step)
        if not plan.sequences:
            return StepResult(plan.step_id, [], [])
        batch = forward_batch(plan.sequences, self._slots.last_token, device=self._kernels.device)
        hidden = self._model.hidden(batch, self._caches)  # [R, H]: rows that sample, then rows of prompts
        num_sampling = sum(step.sample for step in plan.sequences)
        sampled = self._sample([step for step in plan.sequences if step.sample], hidden[:num_sampling])
        prompt = self._prompt_logprobs(plan.sequences, hidden[num_sampling:])
        return StepResult(plan.step_id, [next(sampled) if step.sample else None for step in plan.sequences], prompt)

    def _sample(self, steps: Sequence[SequenceStep], hidden: Tensor) -> Iterator[Sampled]:
        if not steps:
            return iter(())
        logits = self._model.logits(hidden)  # [B, V]
        wanted = [index for index, step in enumerate(steps) if step.params.logprobs >= 0]
        raw = logits[wanted] if wanted else None  # sampling may change the logits
        tokens = self._kernels.sample(logits, self._slots.rows(steps, device=self._kernels.device))
        token_ids = tokens.tolist()
        for step, token_id in zip(steps, token_ids):
            self._slots.record(step.slot, token_id)
        entries: list[TokenLogprobs | None] = [None] * len(steps)
        if raw is not None:
            num_tops = [steps[index].params.logprobs for index in wanted]
            for index, entry in zip(wanted, self._logprobs(raw, [token_ids[index] for index in wanted], num_tops)):
                entries[index] = entry
        return iter([Sampled(token_id, entry) for token_id, entry in zip(token_ids, entries)])

    def _prompt_logprobs(self, steps: Sequence[SequenceStep], hidden: Tensor) -> list[list[TokenLogprobs] | None]:
        """Of the prompt tokens that this step's rows predict; None for sequences that did not ask."""
        results: list[list[TokenLogprobs] | None] = []
        first = 0
        for step in steps:
            if step.params.prompt_logprobs < 0:
                results.append(None)
                continue
            count = prompt_rows(step)
            targets = list(self._slots.prompt(step.slot)[step.start + 1 : step.start + 1 + count])
            entries: list[TokenLogprobs] = []
            for low in range(0, count, LOGPROB_ROWS):
                part = targets[low : low + LOGPROB_ROWS]
                logits = self._model.logits(hidden[first + low : first + low + len(part)])
                entries += self._logprobs(logits, part, [step.params.prompt_logprobs] * len(part))
            results.append(entries)
            first += count
        return results

    def _logprobs(self, logits: Tensor, token_ids: list[int], num_tops: list[int]) -> list[TokenLogprobs]:
        """Entries for rows of logits [R, V] and one token each."""
        tokens = torch.tensor(token_ids, dtype=torch.int64, device=logits.device)
        num_top = min(max(num_tops), logits.shape[1])
        columns = [part.tolist() for part in self._kernels.logprobs(logits, tokens, num_top)]
        return [
            TokenLogprobs(token_id, logprob, rank, tuple(top_ids[:top]), tuple(top_logprobs[:top]))
            for token_id, logprob, rank, top_ids, top_logprobs, top in zip(token_ids, *columns, num_tops)
        ]


def load_runner(settings: Settings, progress: Progress, *, clock: Callable[[], float] = time.monotonic) -> Runner:
    """Load the model that the settings name, ready to run. `progress(stage, fraction)` is called now and then.

    Raises CheckpointError, SettingsError, ParallelError or NoSuchKernels, each with one line for the user.
    """
    started = clock()
    group = make_group(settings.mp_num)
    progress("configuration", 0.0)
    model_dir = Path(settings.model_dir)
    config = load_config(model_dir, config_path=settings.model_config_path)
    if settings.max_seq_len > config.context_length:
        LOG.warning("MAX_SEQ_LEN=%d lowered to the model's context of %d", settings.max_seq_len, config.context_length)
    kernels = choose(settings.kernels, device=_device(settings), num_threads=settings.num_threads)
    inputs = ReaderInputs(
        source=TensorSource(model_dir),
        quantization=config.quantization,
        weight_quant=settings.weight_quant,
        float_dtype=FLOAT_TYPES.get(settings.dtype),
    )
    longest = longest_sequence(settings, context_length=config.context_length)
    options = LoadOptions(max_positions=longest + 1, int8_cache=settings.use_cache_kv_int8)
    model = load_decoder(config, inputs, kernels, group, options=options, progress=progress)
    progress("cache", 0.0)
    caches = _make_caches(settings, model)
    info = _engine_info(settings, model, num_blocks=caches[0].num_blocks, load_seconds=clock() - started)
    runner = CpuRunner(model, caches, info, torch_threads=_torch_threads(settings, kernels), clock=clock)
    if settings.use_warmup:
        progress("warmup", 0.0)
        warm_up(runner, num_tokens=min(WARMUP_TOKENS, longest - 1))
    progress("ready", 1.0)
    return runner


def warm_up(runner: Runner, *, num_tokens: int) -> None:
    """A prompt and a decode step on slot 0 and the first blocks; nobody reads those later. Raises RunnerError."""
    params = SamplingParams(max_tokens=2, temperature=0.0)
    prompt = [0] * num_tokens
    blocks = list(range(num_tokens // BLOCK + 1))
    for step_id, (start, token_ids) in enumerate(((0, prompt), (num_tokens, [0]))):
        step = SequenceStep(
            seq_id=0,
            slot=0,
            fresh=start == 0,
            start=start,
            token_ids=token_ids,
            block_table=blocks,
            sample=True,
            num_outputs=step_id,
            prompt_len=num_tokens,
            params=params,
            history=prompt if start == 0 else (),
        )
        runner.submit(StepPlan(step_id=step_id, sequences=[step]))
        runner.collect()


def _device(settings: Settings) -> torch.device:
    return torch.device("cuda" if settings.device == "cuda" else "cpu")


def _torch_threads(settings: Settings, kernels: Kernels) -> int | None:
    """The reference computes with torch; other backends have their own threads, and torch's would fight for cores."""
    return settings.num_threads if kernels.name == "reference" else 1


def _cache_dtype(settings: Settings, config: ModelConfig) -> torch.dtype:
    if settings.use_cache_kv_int8:
        return torch.int8
    return FLOAT_TYPES[config.dtype if settings.dtype == "auto" else settings.dtype]


def _make_caches(settings: Settings, model: Decoder) -> list[LayerCache]:
    kernels, config = model.kernels, model.config
    specs = cache_specs(config, model.cache_schemes, dtype=_cache_dtype(settings, config), device=kernels.device)
    num_blocks = count_blocks(
        settings,
        context_length=config.context_length,
        block_bytes=sum(kernels.cache_block_bytes(spec) for spec in specs),
        available_bytes=available_memory(kernels.device),
        is_host=kernels.device.type == "cpu",
    )
    return make_caches(kernels, specs, num_blocks)


def _engine_info(settings: Settings, model: Decoder, *, num_blocks: int, load_seconds: float) -> EngineInfo:
    config = model.config
    return EngineInfo(
        model_name=settings.served_model_name,
        architecture=config.architecture,
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        num_blocks=num_blocks,
        block_size=BLOCK,
        batch_size=settings.batch_size,
        end_token_ids=config.end_token_ids,
        fingerprint=fingerprint(settings),
        weight_scheme=model.weight_scheme,
        cache_scheme=_cache_scheme(settings, model),
        kernels=model.kernels.name,
        load_seconds=load_seconds,
    )


def _cache_scheme(settings: Settings, model: Decoder) -> str:
    if not settings.use_cache_kv_int8:
        return str(_cache_dtype(settings, model.config)).removeprefix("torch.")
    return "int8 static" if model.cache_schemes[0].static else "int8 dynamic"
