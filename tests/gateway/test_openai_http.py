"""The official client against the gateway: shapes, streams, choices, log probabilities."""

from __future__ import annotations

import json

import openai
import pytest
import requests

from gateway.conftest import Stack
from gateway.fake_triton import WORDS

TEXT = "".join(WORDS)
HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client(stack: Stack) -> openai.Client:
    return openai.Client(base_url=f"{stack.url}/v1", api_key="none", max_retries=0)


def events(stack: Stack, path: str, body: dict) -> list[dict | str]:
    """Raw server-sent events, the end mark as a string."""
    answer = requests.post(stack.url + path, json={**body, "stream": True}, timeout=10)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    parts = answer.text.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    said = [part.removeprefix("data: ") for part in parts]
    return [one if one == "[DONE]" else json.loads(one) for one in said]


def test_chat_answer(client: openai.Client, stack: Stack) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0, max_tokens=64, seed=7)
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", "tiny")
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 6, 9)
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    sent = stack.fake.requests[0]
    assert sent["messages"] == HELLO
    assert (sent["dialect"], sent["infer_seed"], sent["temperature"], sent["max_dec_len"]) == ("openai", 7, 0, 64)
    assert sent["req_id"] == answer.id


def test_chat_stream_has_the_shapes_that_clients_insist_on(stack: Stack) -> None:
    said = events(stack, "/v1/chat/completions", {"model": "m", "messages": HELLO})
    assert said[-1] == "[DONE]"
    chunks = said[:-1]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    first, *middle, last = [chunk["choices"][0] for chunk in chunks]
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert [choice["delta"] for choice in middle] == [{"content": word} for word in WORDS]
    assert last["delta"] == {}
    assert [choice["finish_reason"] for choice in (first, *middle)] == [None] * 7
    assert last["finish_reason"] == "stop"
    assert all("usage" not in chunk for chunk in chunks)


def test_usage_comes_in_a_chunk_without_choices_when_asked(stack: Stack) -> None:
    body = {"model": "m", "messages": HELLO, "stream_options": {"include_usage": True}}
    chunks = events(stack, "/v1/chat/completions", body)[:-1]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 9
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_usage_comes_with_every_chunk_when_asked(stack: Stack) -> None:
    body = {"model": "m", "prompt": "a", "stream_options": {"continuous_usage_stats": True}}
    chunks = events(stack, "/v1/completions", body)[:-1]
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 5, 6]
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {3}


def test_text_answer_is_not_templated_and_short_by_default(client: openai.Client, stack: Stack) -> None:
    answer = client.completions.create(model="m", prompt="Once")
    assert answer.id.startswith("cmpl-")
    assert (answer.object, answer.choices[0].text) == ("text_completion", TEXT)
    sent = stack.fake.requests[0]
    assert (sent["text"], sent["raw_text"], sent["max_dec_len"]) == ("Once", True, 16)


def test_text_stream(stack: Stack) -> None:
    chunks = events(stack, "/v1/completions", {"model": "m", "prompt": "Once", "max_tokens": 3})[:-1]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert [chunk["choices"][0]["text"] for chunk in chunks] == WORDS[:3]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]


@pytest.mark.parametrize(
    ("prompt", "inputs"),
    [
        ("a", [{"text": "a", "raw_text": True}]),
        (["a", "b"], [{"text": "a", "raw_text": True}, {"text": "b", "raw_text": True}]),
        ([5, 6], [{"input_ids": [5, 6]}]),
        ([[5, 6], [7]], [{"input_ids": [5, 6]}, {"input_ids": [7]}]),
    ],
)
def test_prompts_in_all_four_forms(client: openai.Client, stack: Stack, prompt: object, inputs: list[dict]) -> None:
    answer = client.completions.create(model="m", prompt=prompt, max_tokens=2, n=2)
    assert [choice.index for choice in answer.choices] == list(range(2 * len(inputs)))
    assert {choice.text for choice in answer.choices} == {"Hello,"}
    assert answer.usage.prompt_tokens == 3 * len(inputs)
    assert answer.usage.completion_tokens == 4 * len(inputs)
    sent = [
        {name: one[name] for name in ("text", "raw_text", "input_ids") if name in one} for one in stack.fake.requests
    ]
    assert sorted(map(repr, sent)) == sorted(map(repr, inputs))
    assert len({one["infer_seed"] for one in stack.fake.requests}) == len(inputs)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_several_choices_stream_interleaved(stack: Stack, path: str) -> None:
    chunks = events(stack, path, {"model": "m", "messages": HELLO, "prompt": ["a", "b"], "n": 3, "max_tokens": 4})[:-1]
    texts: dict[int, str] = {}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts.setdefault(choice["index"], "")
        texts[choice["index"]] += choice.get("text", "") or choice.get("delta", {}).get("content", "")
    count = 3 if "chat" in path else 6
    assert texts == {index: "Hello, world" for index in range(count)}
    assert sum(chunk["choices"][0]["finish_reason"] == "length" for chunk in chunks) == count


def test_chat_logprobs(client: openai.Client) -> None:
    answer = client.chat.completions.create(model="m", messages=HELLO, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert [entry.token for entry in content] == WORDS
    assert content[4].bytes == list(" 世界".encode())
    assert content[0].logprob == -0.25
    assert [one.token for one in content[0].top_logprobs] == ["Hello", "Hello~"]


def test_chat_logprobs_stream(client: openai.Client) -> None:
    stream = client.chat.completions.create(model="m", messages=HELLO, logprobs=True, stream=True)
    entries = [one for chunk in stream if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content]
    assert [entry.token for entry in entries] == WORDS
    assert all(entry.top_logprobs == [] for entry in entries)


@pytest.mark.parametrize(("max_tokens", "generated"), [(1, ["Hello"]), (0, [])])
def test_echo_scores_the_prompt_as_evaluation_harnesses_read_it(
    client: openai.Client, stack: Stack, max_tokens: int, generated: list[str]
) -> None:
    answer = client.completions.create(
        model="m", prompt=[[1, 2, 3]], echo=True, logprobs=1, max_tokens=max_tokens, temperature=0
    )
    (choice,) = answer.choices
    tokens = ["The", " cap", "ital", *generated]
    assert choice.text == "".join(tokens)
    assert choice.logprobs.tokens == tokens
    assert choice.logprobs.token_logprobs == [None] + [-0.25] * (len(tokens) - 1)
    assert choice.logprobs.text_offset == [0, 3, 7, 11][: len(tokens)]
    assert choice.logprobs.top_logprobs == [None] + [{token: -0.25} for token in tokens[1:]]
    assert answer.usage.completion_tokens == max_tokens
    assert choice.finish_reason == "length"
    sent = stack.fake.requests[0]
    assert (sent["max_dec_len"], sent["logprobs"], sent["prompt_logprobs"], sent["return_prompt"]) == (1, 1, 1, True)


def test_echo_stream_sends_the_prompt_first(stack: Stack) -> None:
    chunks = events(stack, "/v1/completions", {"model": "m", "prompt": "x", "echo": True, "max_tokens": 2})[:-1]
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["The capitalHello", ","]


def test_models(client: openai.Client, stack: Stack) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.max_model_len) == ("tiny", "model", 4096)
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_strict_model_refuses_other_names(make_stack) -> None:
    stack = make_stack(STRICT_MODEL="1")
    client = openai.Client(base_url=f"{stack.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="other", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert client.chat.completions.create(model="tiny", messages=HELLO).choices[0].message.content == TEXT


def test_every_field_reaches_the_model_under_its_native_name(client: openai.Client, stack: Stack) -> None:
    client.chat.completions.create(
        model="m",
        messages=[{"role": "developer", "content": [{"type": "text", "text": word} for word in ("be ", "kind")]}],
        max_completion_tokens=9,
        top_p=0.5,
        frequency_penalty=1,
        presence_penalty=-1,
        logit_bias={"5": -100},
        stop=["a", "b"],
        user="someone",
        store=False,
        metadata={"a": "b"},
        tools=[],
        response_format={"type": "text"},
        extra_body={
            "top_k": 4, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True, "min_tokens": 0, "logprobs": None,
            "stop_token_ids": [3], "priority": -5, "unknown_field": {"a": [1]},
            "chat_template_kwargs": {"thinking": False},
        },
    )  # fmt: skip
    sent = stack.fake.requests[0]
    assert len(sent.pop("owner")) == 16
    assert sent.pop("tenant") == "127.0.0.1"  # nobody has keys here
    assert sent["messages"] == [{"role": "system", "content": "be kind"}]
    del sent["messages"], sent["req_id"], sent["infer_seed"]
    assert sent == {
        "dialect": "openai", "max_dec_len": 9, "topp": 0.5, "frequency_score": 1, "presence_score": -1,
        "logit_bias": {"5": -100},
        "stop": ["a", "b"], "top_k": 4, "min_p": 0.1, "penalty_score": 1.2, "ignore_eos": True,
        "eos_token_ids": [3], "priority": -5, "chat_template_kwargs": {"thinking": False},
    }  # fmt: skip


def test_disable_streaming_sends_one_message(stack: Stack) -> None:
    stack.fake.disable_streaming = True
    chunks = events(stack, "/v1/chat/completions", {"model": "m", "messages": HELLO})[:-1]
    contents = [chunk["choices"][0]["delta"].get("content") for chunk in chunks]
    assert contents == ["", TEXT, None]


def test_native_fields_with_openai_answers(stack: Stack) -> None:
    body = {"text": "hi", "response_type": "openai", "max_dec_len": 2, "req_id": "mine"}
    answer = requests.post(f"{stack.url}/v1/chat/completions", json=body, timeout=10).json()
    assert (answer["id"], answer["object"]) == ("mine", "chat.completion")
    assert answer["choices"][0]["message"]["content"] == "Hello,"
    assert "dialect" not in stack.fake.requests[0]
    chunks = events(stack, "/v1/completions", body)
    assert [chunk["choices"][0]["text"] for chunk in chunks[:-1]] == ["Hello", ","]


async def test_async_client(stack: Stack) -> None:
    client = openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none")
    stream = await client.chat.completions.create(model="m", messages=HELLO, stream=True)
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == TEXT
    await client.close()
