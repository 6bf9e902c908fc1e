"""Verifying several tokens in a step gives the bits of one step for each: tokens and log probabilities, all kernels."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import pytest

from engine_runner.conftest import LoadRunner
from models.tiny_checkpoints import VOCAB
from octavo.engine.core import EngineCore, make_scheduler
from octavo.engine.interface import Runner
from octavo.kernels.choose import NoSuchKernels
from octavo.protocol.messages import EngineStats, SamplingParams, SequenceOutput, Submit

WORDS = [random.Random(5).randrange(3, VOCAB) for _ in range(11)]
FEW = {token: 60.0 for token in WORDS[:4]}  # so few tokens are likely that drafts often come true, and often fail


def wanted(**values: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 90, "min_tokens": 0, "temperature": 1.0, "seed": 3, **values})  # type: ignore[arg-type]


CASES = {
    "greedy": wanted(temperature=0.0, logprobs=2),
    "sampled from few": wanted(logit_bias=FEW, logprobs=1),
    "cuts": wanted(temperature=0.7, top_p=0.8, top_k=40, min_p=0.02, logit_bias=dict.fromkeys(WORDS[:3], 60.0)),
    "penalties": wanted(
        temperature=0.0,
        logit_bias=FEW,
        repetition_penalty=1.1,
        frequency_penalty=0.6,
        presence_penalty=0.4,
        logprobs=0,
    ),
    "repetition over the prompt": wanted(temperature=0.4, repetition_penalty=1.3, logit_bias=FEW),
    "end tokens late": wanted(logit_bias=FEW, end_token_ids=tuple(WORDS[1:2]), min_tokens=37),
    "an end token": wanted(logit_bias=FEW, end_token_ids=(WORDS[3],), seed=8),
    "a short limit": wanted(temperature=0.0, max_tokens=13),
}


def run(
    runner: Runner, submits: Sequence[Submit], *, speculation: str, budget: int = 64
) -> tuple[dict[int, list[SequenceOutput]], EngineStats]:
    scheduler = make_scheduler(
        runner.info, max_num_batched_tokens=budget, prefix_cache=False, speculation=speculation, speculation_tokens=7
    )
    core = EngineCore(scheduler, runner, time.monotonic)
    for submit in submits:
        assert core.add(submit) == []
    outputs: dict[int, list[SequenceOutput]] = {submit.seq_id: [] for submit in submits}
    while core.has_work:
        for output in core.turn():
            outputs[output.seq_id].append(output)
    scheduler.check_integrity()
    return outputs, scheduler.stats()


def said(outputs: Sequence[SequenceOutput]) -> tuple[list[int], list[object], str | None]:
    tokens = [token for output in outputs for token in output.token_ids]
    logprobs = [entry for output in outputs for entry in output.logprobs or []]
    return tokens, logprobs, outputs[-1].finish_reason


@pytest.mark.parametrize("kernels", ["reference", "avx2", "avx512", "amx"])
@pytest.mark.parametrize("int8_cache", ["1", "0"])
def test_the_same_bits_alone_and_in_a_crowd_with_and_without_drafts(
    load: LoadRunner, kernels: str, int8_cache: str
) -> None:
    try:
        runner = load(KERNELS=kernels, USE_CACHE_KV_INT8=int8_cache)
    except NoSuchKernels:
        pytest.skip(f"this machine has no {kernels}")
    submits = [Submit(place, WORDS * 4, params) for place, params in enumerate(CASES.values())]
    plain, without = run(runner, submits, speculation="none")
    crowd, with_drafts = run(runner, submits, speculation="ngram", budget=30)
    assert without.num_drafts == 0
    assert with_drafts.accepted_tokens > 20
    assert with_drafts.draft_tokens > with_drafts.accepted_tokens  # some came true, some did not
    for submit, name in zip(submits, CASES):
        assert said(crowd[submit.seq_id]) == said(plain[submit.seq_id]), name
    for submit, name in list(zip(submits, CASES))[:4]:
        alone, _ = run(runner, [submit], speculation="ngram")
        assert said(alone[submit.seq_id]) == said(plain[submit.seq_id]), name


def test_fewer_steps_are_taken_where_a_text_repeats(load: LoadRunner) -> None:
    runner = load()
    params = wanted(temperature=0.0, logit_bias={WORDS[0]: 1000.0})
    _, plain = run(runner, [Submit(1, WORDS * 4, params)], speculation="none")
    _, fast = run(runner, [Submit(1, WORDS * 4, params)], speculation="ngram")
    assert (plain.steps, fast.output_tokens) == (90, 90)
    assert fast.steps < 45


def test_a_resumed_sequence_goes_on_with_drafts_as_without(load: LoadRunner) -> None:
    runner = load(KERNELS="auto")
    params = CASES["penalties"]
    outputs, _ = run(runner, [Submit(1, WORDS * 4, params)], speculation="none")
    tokens, _, reason = said(outputs[1])
    resumed = Submit(2, WORDS * 4, params, generated_token_ids=tokens[:31])
    outputs, stats = run(runner, [resumed], speculation="ngram")
    assert said(outputs[2])[0] == tokens[31:]
    assert said(outputs[2])[2] == reason
    assert stats.num_drafts > 0
