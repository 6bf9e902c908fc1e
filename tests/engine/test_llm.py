"""The offline API over the fake runner and the demo model's tokenizer."""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest

import pytest

from octavo.engine.llm import LLM, Sampling
from octavo.protocol.errors import ContextLengthExceeded, InvalidRequest
from octavo.protocol.messages import SamplingParams
from octavo.settings import DEMO_MODEL, SettingsError, with_overrides
from octavo.text.tokenizer import Tokenizer
from scheduling.fake_runner import COPYING, FakeRunner, expected, make_info


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DEMO_MODEL)


@pytest.fixture
def llm(tokenizer) -> LLM:
    info = replace_info(make_info(64))
    return LLM.over(FakeRunner(info), tokenizer, with_overrides({"max_dec_len": 40, "max_seq_len": 1000}, environ={}))


def replace_info(info):
    return type(info)(**{**{name: getattr(info, name) for name in info.__struct_fields__}, "vocab_size": 4096})


def ids(*numbers: int) -> list[int]:
    return [100 + number for number in numbers]


def wanted(completion, **params) -> list[int]:
    sampling = SamplingParams(seed=completion.seed, **params)
    return expected(completion.prompt_token_ids, sampling)[0]


def test_completions_come_in_the_order_of_the_prompts(llm, tokenizer):
    prompts = [ids(1, 2, 3), ids(4), ids(*range(90))]
    options = [Sampling(max_tokens=count, ignore_eos=True) for count in (20, 3, 9)]
    completions = llm.generate(prompts, options, progress=False)
    assert [completion.prompt_token_ids for completion in completions] == prompts
    for completion, option in zip(completions, options):
        assert completion.token_ids == wanted(completion, max_tokens=option.max_tokens)
        assert completion.text == tokenizer.decode(completion.token_ids)
        assert completion.finish_reason == "length"
        assert completion.usage.completion_tokens == option.max_tokens


def test_a_seed_makes_an_answer_repeatable_and_none_draws_a_new_one(llm):
    first, again, other = (
        llm.generate([ids(1)], Sampling(seed=seed, max_tokens=8), progress=False)[0] for seed in (5, 5, None)
    )
    assert first == replace(again, usage=first.usage)
    assert other.seed != 5
    assert other.token_ids != first.token_ids


def test_a_text_goes_through_the_chat_template_unless_raw(llm, tokenizer):
    option = Sampling(max_tokens=1)
    chat, messages, raw = (
        llm.generate("hello", option, progress=False)[0],
        llm.chat([{"role": "user", "content": "hello"}], option),
        llm.generate("hello", option, raw=True, progress=False)[0],
    )
    assert chat.prompt_token_ids == messages.prompt_token_ids
    assert raw.prompt_token_ids == tokenizer.encode("hello", add_special_tokens=True)
    assert len(raw.prompt_token_ids) < len(chat.prompt_token_ids)


def test_an_end_token_ends_the_answer_and_is_not_part_of_it(llm):
    free = llm.generate([ids(1)], Sampling(seed=1, max_tokens=9), progress=False)[0]
    end = free.token_ids[4]
    cut = llm.generate([ids(1)], Sampling(seed=1, max_tokens=9, stop_token_ids=[end]), progress=False)[0]
    first = free.token_ids.index(end)
    assert cut.token_ids == free.token_ids[:first]
    assert (cut.finish_reason, cut.stop_reason, cut.usage.completion_tokens) == ("stop", end, first + 1)


def test_a_stop_string_cuts_the_text_and_ends_the_sequence(llm):
    free = llm.generate([ids(1)], Sampling(seed=3, max_tokens=30, ignore_eos=True), progress=False)[0]
    stop = free.text[10:13]
    cut = llm.generate([ids(1)], Sampling(seed=3, max_tokens=30, ignore_eos=True, stop=stop), progress=False)[0]
    assert cut.text == free.text[: free.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert llm.stats.num_running == 0
    assert llm.stats.num_used_blocks == 0


def test_a_stop_string_inside_a_draft_cuts_text_and_usage_as_it_does_without_drafts(llm):
    options = Sampling(seed=COPYING + 2, max_tokens=40, ignore_eos=True, logprobs=0)
    prompt = ids(*range(9)) * 4
    (free,) = llm.generate([prompt], options, progress=False)
    for place in range(3, len(free.text) - 4, 7):
        stop = free.text[place : place + 3]
        plain, fast = (
            llm.generate([prompt], replace(options, stop=stop, speculation=speculation), progress=False)[0]
            for speculation in (False, True)
        )
        assert fast == replace(plain, usage=fast.usage)
        assert fast.usage.completion_tokens == plain.usage.completion_tokens
    assert llm.stats.accepted_tokens > 20


@pytest.mark.parametrize("setting", ["none", "ngram"])
def test_speculation_is_on_by_a_setting_and_the_answer_is_the_same(tokenizer, setting):
    given = with_overrides({"max_dec_len": 60, "max_seq_len": 1000, "speculation": setting}, environ={})
    with LLM.over(FakeRunner(replace_info(make_info(64))), tokenizer, given) as llm:
        options = Sampling(seed=COPYING, max_tokens=60, ignore_eos=True)
        (answer,) = llm.generate([ids(*range(9)) * 4], options, progress=False)
        assert answer.token_ids == wanted(answer, max_tokens=60)
        assert (llm.stats.num_drafts > 0) == (setting == "ngram")


def test_a_stream_gives_the_same_answer_in_pieces(llm):
    whole = llm.generate([ids(1, 2)], Sampling(seed=8, max_tokens=12), progress=False)[0]
    deltas = list(llm.stream(ids(1, 2), Sampling(seed=8, max_tokens=12)))
    assert len(deltas) > 3
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids
    assert [delta.completion is None for delta in deltas] == [True] * (len(deltas) - 1) + [False]


def test_a_closed_stream_is_cancelled(llm):
    deltas = llm.stream(ids(1), Sampling(max_tokens=40))
    next(deltas)
    deltas.close()
    assert llm.stats.num_running == 0
    assert llm.stats.num_used_blocks == 0


def test_two_streams_are_served_by_the_same_steps(llm):
    alone = [list(llm.stream(ids(n), Sampling(seed=n, max_tokens=10)))[-1].completion.token_ids for n in (1, 2)]
    before = llm.stats.steps
    streams = [llm.stream(ids(n), Sampling(seed=n, max_tokens=10)) for n in (1, 2)]
    together = [[], []]
    for pair in zip_longest(*streams):
        for token_ids, delta in zip(together, pair):
            token_ids += delta.token_ids if delta is not None else []
    assert together == alone
    assert llm.stats.steps - before < 15


def test_logprobs_are_aligned(llm):
    option = Sampling(max_tokens=5, logprobs=0, prompt_logprobs=0, ignore_eos=True)
    completion = llm.generate([ids(*range(70))], option, progress=False)[0]
    assert [entry.token_id for entry in completion.logprobs] == completion.token_ids
    assert [entry.token_id for entry in completion.prompt_logprobs] == ids(*range(1, 70))


def test_sampling_params_are_taken_as_they_are(llm):
    params = SamplingParams(max_tokens=6, seed=4)
    completion = llm.generate([ids(1)], params, progress=False)[0]
    assert completion.token_ids == expected(ids(1), params)[0]


def test_what_cannot_be_answered_is_refused_before_anything_runs(llm):
    with pytest.raises(ContextLengthExceeded, match="MAX_SEQ_LEN"):
        llm.generate([ids(1), [5] * 1001], progress=False)
    with pytest.raises(ContextLengthExceeded, match="context"):
        llm.generate([ids(1)], Sampling(max_tokens=5000), progress=False)
    with pytest.raises(InvalidRequest):
        llm.generate([[]], progress=False)
    with pytest.raises(ValueError, match="2 entries for 1 prompts"):
        llm.generate([ids(1)], [Sampling(), Sampling()], progress=False)
    assert llm.stats.num_waiting == 0


def test_the_progress_bar_goes_to_stderr(llm, capsys):
    llm.generate([ids(1)], Sampling(max_tokens=3))
    out, errors = capsys.readouterr()
    assert out == ""
    assert "1/1" in errors


def test_a_wrong_setting_is_named():
    with pytest.raises(SettingsError, match="BATCH_SIZE=0"):
        LLM(DEMO_MODEL, batch_size=0)
    with pytest.raises(SettingsError, match="is not a setting"):
        LLM(DEMO_MODEL, settings={"batchsize": 3})


def test_closing_frees_the_runner(llm):
    llm.stream(ids(1), Sampling(max_tokens=40))
    llm.close()
    assert llm._core.runner.closed
    assert llm.stats.num_used_blocks == 0
