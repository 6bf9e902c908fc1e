"""The official openai package against the running server."""

from __future__ import annotations

import openai
import pytest

from server.conftest import Server

pytestmark = pytest.mark.server

QUESTION = [{"role": "user", "content": "浙江的省会在哪里?"}]


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.gateway}/v1", api_key="EMPTY", max_retries=0)


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def test_the_model_has_a_name(model: str) -> None:
    assert model == "octavo-demo"


def test_chat_knows_the_capital_of_zhejiang(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=QUESTION, temperature=0)
    assert "杭州" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_the_demo_answers_at_its_default_temperature(client: openai.OpenAI, model: str) -> None:
    hits = sum(
        "杭州"
        in (client.chat.completions.create(model=model, messages=QUESTION, seed=seed).choices[0].message.content or "")
        for seed in range(10)
    )
    assert hits >= 8


def test_a_follow_up_uses_the_history(client: openai.OpenAI, model: str) -> None:
    first = client.chat.completions.create(model=model, messages=QUESTION, temperature=0).choices[0].message.content
    messages = [*QUESTION, {"role": "assistant", "content": first}, {"role": "user", "content": "这有什么好吃的?"}]
    answer = client.chat.completions.create(model=model, messages=messages, temperature=0)
    assert any(dish in (answer.choices[0].message.content or "") for dish in ("西湖", "东坡", "龙井", "小笼", "面"))


def test_streamed_and_unary_answers_are_the_same_bytes(client: openai.OpenAI, model: str) -> None:
    whole = client.chat.completions.create(model=model, messages=QUESTION, seed=5, temperature=1.0)
    chunks = list(
        client.chat.completions.create(
            model=model, messages=QUESTION, seed=5, temperature=1.0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage or chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


def test_n_choices_are_each_their_own(client: openai.OpenAI, model: str) -> None:
    messages = [{"role": "user", "content": "写一个故事"}]
    answer = client.chat.completions.create(model=model, messages=messages, n=3, seed=1, temperature=2.0, max_tokens=24)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1
    again = client.chat.completions.create(model=model, messages=messages, n=3, seed=1, temperature=2.0, max_tokens=24)
    assert [choice.message.content for choice in again.choices] == [choice.message.content for choice in answer.choices]


def test_stop_strings_cut_across_tokens(client: openai.OpenAI, model: str) -> None:
    whole = (
        client.chat.completions.create(model=model, messages=QUESTION, temperature=0).choices[0].message.content or ""
    )
    stop = whole[3:6]
    cut = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, stop=["never to be seen", stop])
    assert cut.choices[0].message.content == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_logprobs_name_the_tokens(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert b"".join(bytes(item.bytes or []) for item in content).decode().startswith(answer.choices[0].message.content)
    for item in content:
        assert item.logprob <= 0.0
        assert len(item.top_logprobs) == 3
        assert item.top_logprobs[0].logprob >= item.top_logprobs[1].logprob
        assert item.logprob == item.top_logprobs[0].logprob  # greedy


def test_text_completion_echoes_and_scores_a_prompt(client: openai.OpenAI, model: str) -> None:
    ids = client.post("/../tokenize", body={"prompt": "Once upon a time"}, cast_to=object)["tokens"]
    answer = client.completions.create(model=model, prompt=ids, echo=True, logprobs=1, max_tokens=1, temperature=0)
    scores = answer.choices[0].logprobs
    assert scores.token_logprobs[0] is None
    assert all(value <= 0 for value in scores.token_logprobs[1:])
    assert len(scores.tokens) == len(ids) + 1
    assert answer.choices[0].text.startswith("Once upon a time")


def test_a_list_of_prompts_gives_a_choice_each(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(
        model=model, prompt=["Once upon a time", "two steps to build a house:"], max_tokens=8
    )
    assert [choice.index for choice in answer.choices] == [0, 1]


def test_sampling_extras_have_their_effect(client: openai.OpenAI, model: str) -> None:
    def ask(**extra: object) -> str:
        answer = client.chat.completions.create(
            model=model, messages=QUESTION, seed=3, temperature=2.0, max_tokens=16, extra_body=extra
        )
        return answer.choices[0].message.content or ""

    greedy = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=16)
    assert ask(top_k=1) == greedy.choices[0].message.content
    assert ask(min_p=1.0) == greedy.choices[0].message.content
    first = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=1, logprobs=True)
    said = first.choices[0].message.content
    banned = client.post("/../tokenize", body={"prompt": said}, cast_to=object)["tokens"][-1]
    other = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, max_tokens=1, logit_bias={str(banned): -100}
    )
    assert other.choices[0].message.content != first.choices[0].message.content


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("response_format", {"type": "json_object"}),
        ("temperature", -1),
        ("top_p", 1.5),
        ("n", 0),
    ],
)
def test_what_is_not_served_is_refused_by_name(client: openai.OpenAI, model: str, field: str, value: object) -> None:
    with pytest.raises(openai.BadRequestError, match=field):
        client.chat.completions.create(model=model, messages=QUESTION, extra_body={field: value})


def test_a_prompt_that_is_too_long_says_so(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=model, prompt=[5] * 20_000)
    assert caught.value.code == "context_length_exceeded"
