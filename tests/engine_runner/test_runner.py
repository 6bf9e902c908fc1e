"""The runner: greedy tokens, resumption, log probabilities, penalties, errors, loading."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_runner.conftest import LoadRunner
from engine_runner.plans import Driver, params, step
from models.tiny_checkpoints import VOCAB, family_configs, make_model, reference_logits
from octavo.engine.interface import RunnerError
from octavo.engine.load import load_runner
from octavo.parallel.group import ParallelError
from octavo.quantization.errors import CheckpointError
from octavo.scheduling.plan import StepPlan
from octavo.settings import Settings, SettingsError

ENVIRON = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "serving")}
FLOAT = {"WEIGHT_QUANT": "none", "DTYPE": "float32", "USE_CACHE_KV_INT8": "0"}
PROMPT = torch.randint(3, VOCAB, (70,), generator=torch.Generator().manual_seed(8)).tolist()


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(family_configs()["llama2"])


def test_greedy_tokens_match_transformers(load: LoadRunner, model: Any) -> None:
    tokens = Driver(load(**FLOAT)).run(PROMPT, params(), count=40)
    logits = reference_logits(model, PROMPT + tokens)
    assert tokens == logits.argmax(dim=1).tolist()[len(PROMPT) - 1 : -1]


def test_info_describes_the_loaded_model(load: LoadRunner) -> None:
    info = load(SERVED_MODEL_NAME="tiny").info
    assert (info.model_name, info.architecture, info.context_length) == ("tiny", "LlamaForCausalLM", 512)
    assert (info.vocab_size, info.end_token_ids, info.block_size) == (VOCAB, (2,), 64)
    assert (info.weight_scheme, info.cache_scheme, info.kernels) == ("w8a16", "int8 dynamic", "reference")
    assert info.num_blocks == 5 * 7  # a batch of 4 and one more, of 256 + 128 tokens and one
    assert load(**FLOAT).info.cache_scheme == "float32"


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_sampling_is_the_same_alone_in_a_batch_and_resumed(load: LoadRunner, kernels: str) -> None:
    runner = load(KERNELS=kernels)
    wanted = params(temperature=1.0, top_p=0.9, seed=2**63 + 5, repetition_penalty=1.2, frequency_penalty=0.3)
    alone = Driver(runner).run(PROMPT, wanted, count=24)
    resumed = Driver(runner, slot=2).run(PROMPT, wanted, count=14, generated=alone[:10])
    assert alone[10:] == resumed
    assert len(set(alone)) > 5
    others = [step(slot, PROMPT[slot:], params=params(), history=PROMPT[slot:]) for slot in (0, 1)]
    mine = step(3, PROMPT, params=wanted, history=PROMPT)
    runner.submit(StepPlan(99, [*others, mine]))
    last = runner.collect().sampled[2]
    assert last is not None
    assert last.token_id == alone[0]


def test_chunked_prompts_sample_only_at_their_end(load: LoadRunner) -> None:
    runner = load()
    whole = Driver(runner).run(PROMPT, params(), count=1)
    runner.submit(StepPlan(1, [step(1, PROMPT[:33], params=params(), prompt_len=70, history=PROMPT, sample=False)]))
    runner.submit(StepPlan(2, [step(1, PROMPT[33:], params=params(), start=33, prompt_len=70)]))
    first, second = runner.collect(), runner.collect()
    assert (first.step_id, first.sampled) == (1, [None])
    assert second.sampled[0] is not None
    assert second.sampled[0].token_id == whole[0]


def test_logprobs_are_those_of_the_plain_distribution(load: LoadRunner, model: Any) -> None:
    driver = Driver(load(**FLOAT))
    tokens = driver.run(PROMPT, params(temperature=0.7, seed=3, logprobs=3, presence_penalty=1.0), count=5)
    want = torch.log_softmax(reference_logits(model, PROMPT + tokens), dim=1)[len(PROMPT) - 1 : -1]
    for row, token, result in zip(want, tokens, driver.results):
        assert result.logprobs is not None
        assert result.logprobs.token_id == token
        assert result.logprobs.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert result.logprobs.rank == 1 + int((row > row[token]).sum())
        assert list(result.logprobs.top_ids) == row.topk(3).indices.tolist()
        assert list(result.logprobs.top_logprobs) == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_prompt_logprobs_match_transformers_in_chunks(load: LoadRunner, model: Any) -> None:
    runner = load(**FLOAT)
    wanted = params(prompt_logprobs=2)
    entries = []
    for start, end in ((0, 20), (20, 69), (69, 70)):
        part = step(
            0, PROMPT[start:end], params=wanted, start=start, prompt_len=70,
            history=PROMPT if start == 0 else None, sample=end == 70,
        )  # fmt: skip
        runner.submit(StepPlan(start, [part, step(1, PROMPT[:5], params=params(), history=PROMPT[:5])]))
        result = runner.collect()
        assert result.prompt_logprobs[1] is None
        assert result.prompt_logprobs[0] is not None
        entries += result.prompt_logprobs[0]
    want = torch.log_softmax(reference_logits(model, PROMPT), dim=1)
    assert [entry.token_id for entry in entries] == PROMPT[1:]
    got = torch.tensor([entry.logprob for entry in entries])
    torch.testing.assert_close(got, want[torch.arange(69), PROMPT[1:]], rtol=0, atol=1e-4)
    assert [entry.top_ids for entry in entries] == [tuple(row.topk(2).indices.tolist()) for row in want[:-1]]


def test_end_tokens_are_banned_before_min_tokens(load: LoadRunner) -> None:
    runner = load()
    free = Driver(runner).run(PROMPT, params(), count=6)
    banned = Driver(runner).run(PROMPT, params(min_tokens=3, end_token_ids=(free[0],)), count=6)
    assert free[0] not in banned[:3]
    only = params(logit_bias={7: 1000.0, 8: 990.0}, min_tokens=2, end_token_ids=(7,))
    assert Driver(runner).run(PROMPT, only, count=4) == [8, 8, 7, 7]


def test_presence_and_frequency_look_at_the_output_alone(load: LoadRunner) -> None:
    runner = load()
    favourites = {9: 10000.0, 10: 9900.0}  # far above the model's own logits
    presence = params(logit_bias=favourites, presence_penalty=500.0)
    assert Driver(runner).run([9, 3], presence, count=4) == [9, 10, 9, 9]
    frequency = params(logit_bias=favourites, frequency_penalty=500.0)
    assert Driver(runner).run([9, 3], frequency, count=4) == [9, 10, 9, 10]


def test_repetition_looks_at_prompt_and_output(load: LoadRunner, model: Any) -> None:
    tokens = Driver(load(**FLOAT)).run(PROMPT, params(repetition_penalty=1.6), count=20)
    for index, row in enumerate(reference_logits(model, PROMPT + tokens)[len(PROMPT) - 1 : -1].clone()):
        seen = torch.tensor(PROMPT + tokens[:index])
        row[seen] = torch.where(row[seen] > 0, row[seen] / 1.6, row[seen] * 1.6)
        assert tokens[index] == int(row.argmax())


def test_a_failed_step_leaves_the_runner_usable(load: LoadRunner, caplog: pytest.LogCaptureFixture) -> None:
    runner = load()
    good = Driver(runner).run(PROMPT, params(), count=3)
    runner.submit(StepPlan(50, [step(0, [VOCAB + 10_000], params=params(), history=[5])]))
    with pytest.raises(RunnerError):
        runner.collect()
    assert "step 50 failed" in caplog.text
    assert Driver(runner).run(PROMPT, params(), count=3) == good


def test_a_plan_without_sequences_is_answered(load: LoadRunner) -> None:
    runner = load()
    runner.submit(StepPlan(5, [], evicted_slots=[1]))
    result = runner.collect()
    assert (result.step_id, result.sampled, result.prompt_logprobs) == (5, [], [])


def test_warm_up_changes_nothing(load: LoadRunner) -> None:
    cold = Driver(load()).run(PROMPT, params(temperature=1.0, seed=4), count=5)
    assert Driver(load(USE_WARMUP="1")).run(PROMPT, params(temperature=1.0, seed=4), count=5) == cold


def test_progress_ends_ready(tiny_folder: Path) -> None:
    stages: list[tuple[str, float]] = []
    settings = Settings.from_environ({"MODEL_DIR": str(tiny_folder), "KERNELS": "reference", "MAX_SEQ_LEN": "64"})
    load_runner(settings, lambda stage, fraction: stages.append((stage, fraction))).close()
    assert stages[-1] == ("ready", 1.0)
    assert [fraction for stage, fraction in stages if stage == "weights"] == [0.0, 0.5, 1.0]


def test_a_long_max_seq_len_is_lowered_with_a_warning(load: LoadRunner, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        runner = load(MAX_SEQ_LEN="8192")
    assert "MAX_SEQ_LEN=8192 lowered to the model's context of 512" in caplog.text
    assert runner.info.num_blocks == 5 * 9


def test_what_cannot_be_loaded_says_so(load: LoadRunner, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load(tmp_path)
    with pytest.raises(ParallelError, match="MP_NUM=2"):
        load(MP_NUM="2")
    with pytest.raises(SettingsError, match=r"BLOCK_BS=0\.5"):
        load(BLOCK_BS="0.5")


def test_a_program_ends_after_the_step_under_way() -> None:
    """A worker writes to memory that the interpreter's end frees."""
    program = """
import time
from octavo.engine.plan_queues import PlanQueues

class Slow(PlanQueues):
    def __init__(self):
        super().__init__(None)
        self._start(self.work)

    def work(self):
        while self._plans.get() is not None:
            print("begun", flush=True)
            time.sleep(0.5)
            print("done", flush=True)

Slow().submit(1)
time.sleep(0.1)
"""
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRON, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "begun\ndone\n"), done.stderr[-2000:]
