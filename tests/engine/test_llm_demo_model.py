"""The offline API over the bundled model and the reference kernels: real answers, the same in every company."""

from __future__ import annotations

from dataclasses import replace

import pytest

from octavo.engine.llm import LLM, Sampling
from octavo.settings import DEMO_MODEL

PROMPTS = ["hello, llm", "What is octavo?", "tell me a story", "你好!"]
OPTION = Sampling(seed=11, max_tokens=62, temperature=1.0, ignore_eos=True)


def open_demo(**settings) -> LLM:
    if not (DEMO_MODEL / "model.safetensors").is_file():
        pytest.skip("the bundled model has not been built")
    small = {"kernels": "reference", "num_threads": 1, "max_seq_len": 64, "max_dec_len": 64}
    return LLM(DEMO_MODEL, settings={**small, **settings}, progress=False)


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    with open_demo(batch_size=1) as llm:
        return [llm.generate(prompt, OPTION, progress=False)[0].token_ids for prompt in PROMPTS]


def test_the_model_knows_a_capital():
    with open_demo() as llm:
        (answer,) = llm.generate("What is the capital of France?", Sampling(temperature=0), progress=False)
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"


def test_a_batch_gives_what_each_gives_alone(alone):
    with open_demo(batch_size=4) as llm:
        together = [answer.token_ids for answer in llm.generate(PROMPTS, OPTION, progress=False)]
    assert together == alone


def test_chunks_and_preemption_change_nothing(alone):
    with open_demo(batch_size=4, block_bs=1.5, max_num_batched_tokens=5) as llm:
        together = [answer.token_ids for answer in llm.generate(PROMPTS * 2, OPTION, progress=False)]
        assert llm.stats.num_preemptions > 0
    assert together == alone * 2


def test_a_prefix_hit_changes_nothing():
    prompt = list(range(100, 200))
    with open_demo(max_seq_len=128) as llm:
        miss, hit = (llm.generate(prompt, OPTION, progress=False)[0] for _ in range(2))
    assert (miss.usage.cached_tokens, hit.usage.cached_tokens) == (0, 64)
    assert hit.token_ids == miss.token_ids


def test_speculation_changes_nothing():
    prompts = [list(range(100, 118)) * 3, [*range(300, 310)] * 5, "tell me a story"]
    option = Sampling(seed=3, max_tokens=60, ignore_eos=True, logprobs=1, temperature=1.0)
    same = replace(option, logit_bias={500: 100.0})  # what repeats itself comes true
    options = [same, option, replace(option, temperature=0.0)]
    with open_demo(batch_size=4) as llm:
        plain = llm.generate(prompts, options, progress=False)
    with open_demo(batch_size=4, speculation="ngram") as llm:
        fast = llm.generate(prompts, options, progress=False)
        assert llm.stats.accepted_tokens > 0
    for one, other in zip(plain, fast):
        assert (one.text, one.token_ids, one.logprobs) == (other.text, other.token_ids, other.logprobs)
