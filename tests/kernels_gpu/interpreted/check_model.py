"""Run by test_interpreter.py under TRITON_INTERPRET=1: whole tiny models on the GPU runner and the GPU kernels.

What the recorded decode steps say of a token must be what a prompt with that token in it says: bit for bit, but for
models with float products (a router), whose bits numpy, which the interpreter multiplies with, lets depend on the rows.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine_runner.plans import Driver, params, step
from models.tiny_checkpoints import VOCAB, family_configs, make_model, save_model
from octavo.engine.device_queue import ImmediateQueue
from octavo.engine.gpu_runner import GpuRunner
from octavo.engine.kv_cache import cache_specs, make_caches
from octavo.kernels.gpu.backend import GpuKernels
from octavo.models.config import load_config
from octavo.models.loader import LoadOptions, load_decoder
from octavo.parallel.group import make_group
from octavo.protocol.messages import EngineInfo
from octavo.quantization.formats.reader import ReaderInputs
from octavo.quantization.formats.source import TensorSource
from octavo.scheduling.plan import StepPlan

CPU = torch.device("cpu")
BLOCKS = 16
COUNT = 4


def make_runner(folder: Path) -> GpuRunner:
    config = load_config(folder)
    inputs = ReaderInputs(source=TensorSource(folder), quantization=config.quantization, weight_quant="a8w8")
    options = LoadOptions(max_positions=128, int8_cache=True)
    model = load_decoder(
        config, inputs, GpuKernels(CPU), make_group(1), options=options, progress=lambda stage, fraction: None
    )
    assert not model.waits
    specs = cache_specs(config, model.cache_schemes, dtype=torch.int8, device=CPU)
    info = EngineInfo(
        model_name="tiny", architecture=config.architecture, context_length=128, vocab_size=VOCAB, num_blocks=BLOCKS,
        block_size=64, batch_size=2, end_token_ids=(2,), fingerprint="", weight_scheme="", cache_scheme="",
        kernels="gpu", load_seconds=0.0,
    )  # fmt: skip
    caches = make_caches(model.kernels, specs, BLOCKS + 1)
    return GpuRunner(model, caches, info, lambda: ImmediateQueue(CPU), longest=100)


@pytest.mark.parametrize(("family", "tolerance"), [("llama2", 0.0), ("qwen3_moe", 1e-4)])
def test_decode_says_what_a_prompt_says(family: str, tolerance: float, tmp_path: Path) -> None:
    runner = make_runner(save_model(make_model(family_configs()[family]), tmp_path))
    prompt = torch.randint(3, VOCAB, (21,), generator=torch.Generator().manual_seed(4)).tolist()
    driver = Driver(runner)
    tokens = driver.run(prompt, params(logprobs=1), count=COUNT)
    drawn = [result.logprobs for result in driver.results]
    again = [*prompt, *tokens]
    whole = step(1, again, params=params(prompt_logprobs=1), history=again, prompt_len=len(again))
    runner.submit(StepPlan(99, [whole]))
    (entries,) = runner.collect().prompt_logprobs
    runner.close()
    assert entries is not None
    for found, expected in zip(entries[len(prompt) - 1 :], drawn, strict=True):
        assert expected is not None
        assert (found.token_id, found.rank) == (expected.token_id, expected.rank)
        assert abs(found.logprob - expected.logprob) <= tolerance
