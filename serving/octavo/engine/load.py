"""From settings to a runner that is ready: model, kernels, cache, and the runner that suits the device.

Runs on the engine's loading thread. Everything that can be wrong with a checkpoint, a setting or a device is an error
here, before anything is served.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from octavo.engine.backend import cache_dtype, kernels_for
from octavo.engine.core import budget_of
from octavo.engine.device_queue import CudaQueue, out_of_memory
from octavo.engine.fingerprint import fingerprint
from octavo.engine.gpu_runner import GpuRunner
from octavo.engine.interface import Runner, StepOutOfMemory
from octavo.engine.kv_cache import (
    available_memory,
    cache_specs,
    count_blocks,
    longest_sequence,
    make_caches,
    workspace_bytes,
)
from octavo.engine.runner import CpuRunner
from octavo.kernels.interface import BLOCK, CacheSpec, Kernels, LayerCache, multiplies_fp8
from octavo.models.config import load_config
from octavo.models.decoder import Decoder
from octavo.models.loader import LoadOptions, Progress, load_decoder
from octavo.parallel.group import make_group
from octavo.protocol.messages import EngineInfo, SamplingParams
from octavo.quantization.formats.reader import ReaderInputs
from octavo.quantization.formats.source import TensorSource
from octavo.quantization.scheme import FLOAT_TYPES
from octavo.scheduling.plan import SequenceStep, StepPlan
from octavo.settings import Settings

LOG = logging.getLogger(__name__)
WARMUP_TOKENS = 256
# Rows, and with experts the rows of one, have tiles of their own, which are compiled at their first use.
CARD_WARMUP_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def load_runner(settings: Settings, progress: Progress, *, clock: Callable[[], float] = time.monotonic) -> Runner:
    """Load the model that the settings name, ready to run. `progress(stage, fraction)` is called now and then.

    Raises CheckpointError, SettingsError, ParallelError, NoSuchKernels or OutOfDeviceMemory: one line for the user.
    """
    try:
        return _load(settings, progress, clock)
    except RuntimeError as error:  # wherever memory ran out: the card's first use, weights, cache, recordings, warm-up
        if isinstance(error, StepOutOfMemory) or out_of_memory(error):
            raise OutOfDeviceMemory(str(error).splitlines()[0]) from error
        raise


def _load(settings: Settings, progress: Progress, clock: Callable[[], float]) -> Runner:
    started = clock()
    group = make_group(settings.mp_num)
    progress("configuration", 0.0)
    model_dir = Path(settings.model_dir)
    config = load_config(model_dir, config_path=settings.model_config_path)
    if settings.max_seq_len > config.context_length:
        LOG.warning("MAX_SEQ_LEN=%d lowered to the model's context of %d", settings.max_seq_len, config.context_length)
    kernels = kernels_for(settings, config)
    inputs = ReaderInputs(
        source=TensorSource(model_dir),
        quantization=config.quantization,
        weight_quant=settings.weight_quant,
        head_quant=settings.head_quant,
        float_dtype=FLOAT_TYPES.get(settings.dtype),
        keep_fp8=multiplies_fp8(kernels),
    )
    longest = longest_sequence(settings, context_length=config.context_length)
    options = LoadOptions(max_positions=longest + 1, int8_cache=settings.use_cache_kv_int8)
    model = load_decoder(config, inputs, kernels, group, options=options, progress=progress)
    progress("cache", 0.0)
    runner = _make_runner(settings, model, progress, started=started, clock=clock)
    on_card = model.kernels.device.type == "cuda"
    if settings.use_warmup or on_card:
        progress("warmup", 0.0)
        largest = min(_step_rows(settings, kernels), longest - 1)
        for count in card_warmup_sizes(largest) if on_card else [min(WARMUP_TOKENS, longest - 1)]:
            warm_up(runner, num_tokens=count)
    progress("ready", 1.0)
    return runner


def warm_up(runner: Runner, *, num_tokens: int) -> None:
    """A prompt and a decode step on slot 0 and the first blocks; nobody reads those later. Raises RunnerError.

    Sampled with all that requests may ask for: on a card that is compiled now, not at the first request that asks.
    """
    params = SamplingParams(max_tokens=2, top_p=0.9, repetition_penalty=1.1, logit_bias={0: 1.0}, logprobs=1)
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


def card_warmup_sizes(largest: int) -> list[int]:
    """Tokens of the prompts that warm a card up, none beyond the largest step."""
    return [count for count in CARD_WARMUP_TOKENS if count < largest] + [min(largest, CARD_WARMUP_TOKENS[-1])]


def _step_rows(settings: Settings, kernels: Kernels) -> int:
    return settings.max_num_batched_tokens or budget_of(kernels.name, batch_size=settings.batch_size)


def _torch_threads(settings: Settings, kernels: Kernels) -> int | None:
    """The reference computes with torch; other backends have their own threads, and torch's would fight for cores."""
    return settings.num_threads if kernels.name == "reference" else 1


def _make_runner(
    settings: Settings, model: Decoder, progress: Progress, *, started: float, clock: Callable[[], float]
) -> Runner:
    kernels = model.kernels
    if kernels.device.type == "cuda":
        return _gpu_runner(settings, model, progress, started=started, clock=clock)
    caches = _make_caches(settings, model, num_blocks=_count_blocks(settings, model))
    info = _engine_info(settings, model, num_blocks=caches[0].num_blocks, load_seconds=clock() - started)
    return CpuRunner(model, caches, info, torch_threads=_torch_threads(settings, kernels), clock=clock)


def _gpu_runner(
    settings: Settings, model: Decoder, progress: Progress, *, started: float, clock: Callable[[], float]
) -> GpuRunner:
    """With one block that is never handed out: rows that fill up a recorded step write there."""
    caches = _make_caches(settings, model, num_blocks=_count_blocks(settings, model) + 1)
    info = _engine_info(settings, model, num_blocks=caches[0].num_blocks - 1, load_seconds=clock() - started)
    return GpuRunner(
        model,
        caches,
        info,
        lambda: CudaQueue(model.kernels.device),
        longest=longest_sequence(settings, context_length=model.config.context_length),
        clock=clock,
        report=lambda fraction: progress("recording", fraction),
    )


class OutOfDeviceMemory(ValueError):
    """The device's memory does not hold the model and a cache; the message says what to lower."""

    def __init__(self, reason: str) -> None:
        advice = "lower KV_MEMORY_FRACTION, BATCH_SIZE, MAX_SEQ_LEN or MAX_NUM_BATCHED_TOKENS"
        super().__init__(f"out of device memory while loading: {advice} ({reason})")


def _count_blocks(settings: Settings, model: Decoder) -> int:
    kernels, config = model.kernels, model.config
    specs = _specs(settings, model)
    is_host = kernels.device.type == "cpu"
    available = available_memory(kernels.device)
    if not is_host:  # on a host, activations are small beside everything else
        rows, longest = _step_rows(settings, kernels), longest_sequence(settings, context_length=config.context_length)
        drafts = settings.speculation_tokens if settings.speculation != "none" else 0
        batch_size = settings.batch_size
        available -= workspace_bytes(config, rows=rows, batch_size=batch_size, longest=longest, drafts=drafts)
    return count_blocks(
        settings,
        context_length=config.context_length,
        block_bytes=sum(kernels.cache_block_bytes(spec) for spec in specs),
        available_bytes=max(0, available),
        is_host=is_host,
    )


def _specs(settings: Settings, model: Decoder) -> list[CacheSpec]:
    dtype = cache_dtype(settings, model.config)
    return cache_specs(model.config, model.cache_schemes, dtype=dtype, device=model.kernels.device)


def _make_caches(settings: Settings, model: Decoder, *, num_blocks: int) -> list[LayerCache]:
    return make_caches(model.kernels, _specs(settings, model), num_blocks)


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
        return str(cache_dtype(settings, model.config)).removeprefix("torch.")
    return "int8 static" if model.cache_schemes[0].static else "int8 dynamic"
