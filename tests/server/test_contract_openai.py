"""The OpenAI dialect over HTTP: raw shapes that real clients insist on, and what each field does."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from server.conftest import Server
from server.contract_calls import CHAT, COMPLETIONS, STORY, ask, events, openai_error, post, tokens_of

pytestmark = pytest.mark.server

MESSAGES = [{"role": "user", "content": STORY}]
PROMPT = "Once upon a time"
GREEDY: dict[str, Any] = {"temperature": 0}
WILD: dict[str, Any] = {"temperature": 3.0}
CHAT_ROUTES = (CHAT, "/v1/chat/completions/chat/completions")
TEXT_ROUTES = (COMPLETIONS, "/v1/chat/completions/completions")


def chat(server: Server, path: str = CHAT, **body: object) -> dict[str, Any]:
    return ask(server, path, **{"model": "default", "messages": MESSAGES, **body})


def text(server: Server, path: str = COMPLETIONS, **body: object) -> dict[str, Any]:
    return ask(server, path, **{"model": "default", "prompt": PROMPT, **body})


def content(answer: dict[str, Any], index: int = 0) -> str:
    return answer["choices"][index]["message"]["content"]


def streamed_text(chunks: list[dict[str, Any]], index: int = 0) -> str:
    parts = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(part["text"] if "text" in part else part["delta"].get("content", "") for part in parts)


# ---- shapes


@pytest.mark.parametrize("path", CHAT_ROUTES)
def test_a_chat_answer_has_this_shape(server: Server, path: str) -> None:
    answer = chat(server, path, max_tokens=4, **GREEDY)
    assert {"id", "object", "created", "model", "choices", "usage"} <= set(answer)
    assert (answer["object"], answer["model"]) == ("chat.completion", "default")
    assert answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert choice.items() >= {"index": 0, "finish_reason": "length", "logprobs": None}.items()
    assert choice["message"]["role"] == "assistant"
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + 4


@pytest.mark.parametrize("path", TEXT_ROUTES)
def test_a_text_answer_has_this_shape(server: Server, path: str) -> None:
    answer = text(server, path, max_tokens=4, **GREEDY)
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    (choice,) = answer["choices"]
    assert choice.items() >= {"index": 0, "finish_reason": "length", "logprobs": None}.items()
    assert isinstance(choice["text"], str)


@pytest.mark.parametrize("path", CHAT_ROUTES)
def test_a_chat_stream_has_these_chunks(server: Server, path: str) -> None:
    chunks = events(server, path, messages=MESSAGES, **GREEDY)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in choice["delta"] for choice in choices[1:])
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert choices[-1]["delta"] == {}
    assert not any(chunk.get("usage") for chunk in chunks)
    assert streamed_text(chunks) == content(chat(server, **GREEDY))


@pytest.mark.parametrize("path", TEXT_ROUTES)
def test_a_text_stream_has_these_chunks(server: Server, path: str) -> None:
    chunks = events(server, path, prompt=PROMPT, **GREEDY)
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert streamed_text(chunks) == text(server, **GREEDY)["choices"][0]["text"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_usage_comes_in_a_chunk_of_its_own_when_asked(server: Server, path: str) -> None:
    given = {"messages": MESSAGES} if path == CHAT else {"prompt": PROMPT}
    chunks = events(server, path, **given, max_tokens=5, stream_options={"include_usage": True}, **GREEDY)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 5
    assert all(chunk.get("usage") is None and chunk["choices"] for chunk in chunks[:-1])


def test_headers_of_streams_and_answers(server: Server) -> None:
    for extra in ({}, {"stream": True}):
        body = {"model": "m", "messages": MESSAGES, "max_tokens": 2, **extra}
        answer = post(server, body, **{"x-request-id": "mine-1"})
        assert answer.headers["x-request-id"] == "mine-1"
        assert post(server, body).headers["x-request-id"]
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["content-type"].startswith("text/event-stream")


def test_ids_differ_between_requests(server: Server) -> None:
    assert chat(server, max_tokens=1)["id"] != chat(server, max_tokens=1)["id"]


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions/models"])
def test_models_are_listed(server: Server, path: str) -> None:
    body = httpx.get(f"{server.gateway}{path}", timeout=10).json()
    assert body["object"] == "list"
    (model,) = body["data"]
    assert (model["id"], model["object"]) == ("octavo-demo", "model")
    assert httpx.get(f"{server.gateway}{path}/octavo-demo", timeout=10).json()["id"] == "octavo-demo"
    assert openai_error(httpx.get(f"{server.gateway}{path}/other", timeout=10), 404)["code"] == "model_not_found"


# ---- lengths, template, defaults


def test_text_makes_16_tokens_by_default_and_chat_the_rest(server: Server) -> None:
    assert text(server, ignore_eos=True)["usage"]["completion_tokens"] == 16
    answer = chat(server, **GREEDY)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] > 16


def test_max_tokens_is_an_upper_bound_that_is_lowered(server: Server) -> None:
    assert chat(server, max_tokens=10**6, **GREEDY)["choices"][0]["finish_reason"] == "stop"
    assert chat(server, max_completion_tokens=3)["usage"]["completion_tokens"] == 3


def test_text_does_not_go_through_the_template(server: Server) -> None:
    raw = tokens_of(server, PROMPT, add_special_tokens=True)
    answer = text(server, max_tokens=3, **GREEDY)
    assert answer["usage"]["prompt_tokens"] == len(raw)
    assert text(server, prompt=raw, max_tokens=3, **GREEDY)["choices"][0]["text"] == answer["choices"][0]["text"]


def test_sampling_is_at_temperature_one_by_default(server: Server) -> None:
    """The model has no values of its own: the answer is the one of temperature 1 and top_p 1."""
    for seed in range(3):
        plain = text(server, seed=seed, max_tokens=40)["choices"][0]["text"]
        assert plain == text(server, seed=seed, max_tokens=40, temperature=1, top_p=1)["choices"][0]["text"]


def test_content_may_be_parts_and_a_developer_is_a_system(server: Server) -> None:
    parts = [{"type": "text", "text": STORY[:2]}, {"type": "text", "text": STORY[2:]}]
    whole = chat(server, max_tokens=8, **GREEDY)
    assert content(chat(server, messages=[{"role": "user", "content": parts}], max_tokens=8, **GREEDY)) == content(
        whole
    )
    pair = [{"role": role, "content": "Be brief."} for role in ("system", "developer")]
    prompts = {chat(server, messages=[one, *MESSAGES], max_tokens=1)["usage"]["prompt_tokens"] for one in pair}
    assert len(prompts) == 1


def test_nulls_are_absent_and_unknown_fields_ignored(server: Server) -> None:
    names = "stop logprobs top_logprobs max_tokens seed n tools response_format stream stream_options logit_bias suffix"
    answer = chat(server, **dict.fromkeys(names.split()), nonsense=1, metadata={}, **GREEDY)
    assert content(answer) == content(chat(server, **GREEDY))


# ---- sampling fields


def test_a_seed_repeats_and_others_differ(server: Server) -> None:
    first, second, other = (content(chat(server, seed=seed, max_tokens=20, **WILD)) for seed in (5, 5, 6))
    assert first == second != other


@pytest.mark.parametrize(
    "field",
    [{"frequency_penalty": 2}, {"presence_penalty": 2}, {"repetition_penalty": 2}, {"min_p": 0.5}, {"top_k": 2}],
)
def test_each_sampling_field_changes_the_answer(server: Server, field: dict[str, float]) -> None:
    common = {"seed": 4, "max_tokens": 60, "ignore_eos": True, "temperature": 1.5}
    assert content(chat(server, **common, **field)) != content(chat(server, **common))


def test_logit_bias_forces_and_forbids(server: Server) -> None:
    (token,) = tokens_of(server, "猫")
    forced = chat(server, logit_bias={str(token): 100}, max_tokens=3, **GREEDY)
    assert content(forced) == "猫猫猫"
    whole = content(chat(server, **GREEDY))
    assert "猫" in whole
    assert "猫" not in content(chat(server, logit_bias={str(token): -100}, max_tokens=60, **GREEDY))


def test_min_tokens_and_stop_token_ids(server: Server) -> None:
    natural = chat(server, **GREEDY)["usage"]["completion_tokens"]
    assert (
        chat(server, min_tokens=natural + 9, max_tokens=natural + 9, **GREEDY)["usage"]["completion_tokens"]
        == natural + 9
    )
    (token,) = tokens_of(server, "塔")
    cut = chat(server, stop_token_ids=[token], **GREEDY)
    assert cut["choices"][0]["finish_reason"] == "stop"
    assert content(cut) == content(chat(server, **GREEDY)).split("塔")[0]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_stop_longer_than_a_token_never_shows(server: Server, path: str) -> None:
    given: dict[str, Any] = {"messages": MESSAGES} if path == CHAT else {"prompt": PROMPT, "max_tokens": 40}
    whole = streamed_text(events(server, path, **given, **GREEDY))
    for stop in (whole[6:9], [whole[9:16], "never"]):
        chunks = events(server, path, **given, stop=stop, **GREEDY)
        cut = stop if isinstance(stop, str) else stop[0]
        assert streamed_text(chunks) == whole[: whole.index(cut)]
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


# ---- several choices and prompts


def test_choices_of_a_stream_are_those_of_the_answer(server: Server) -> None:
    body = {"messages": MESSAGES, "n": 3, "seed": 8, "max_tokens": 12, **WILD}
    answer = chat(server, **body)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert len({content(answer, index) for index in range(3)}) == 3
    chunks = events(server, **body)
    for index in range(3):
        mine = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert [one["finish_reason"] for one in mine] == [None] * (len(mine) - 1) + ["length"]
        assert streamed_text(chunks, index) == content(answer, index)
    assert answer["usage"]["completion_tokens"] == 36


@pytest.mark.parametrize("as_ids", [False, True])
def test_a_list_of_prompts_gives_choices_in_their_order(server: Server, as_ids: bool) -> None:
    prompts = [PROMPT, "Hello", "Spring"]
    given: list[Any] = [tokens_of(server, one, add_special_tokens=True) for one in prompts] if as_ids else prompts
    alone = [text(server, prompt=one, max_tokens=6, **GREEDY)["choices"][0]["text"] for one in given]
    answer = text(server, prompt=given, n=2, max_tokens=6, **GREEDY)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert [choice["text"] for choice in answer["choices"]] == [one for one in alone for _ in range(2)]
    chunks = events(server, COMPLETIONS, prompt=given, n=2, max_tokens=6, **GREEDY)
    assert [streamed_text(chunks, index) for index in range(6)] == [one for one in alone for _ in range(2)]


# ---- logprobs and echo


def test_chat_logprobs_cover_the_answer(server: Server) -> None:
    answer = chat(server, logprobs=True, top_logprobs=2, max_tokens=12, **GREEDY)
    items = answer["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(item["bytes"]) for item in items).decode() == content(answer)
    assert all(len(item["top_logprobs"]) == 2 and item["logprob"] <= 0 for item in items)
    bare = chat(server, logprobs=True, max_tokens=3, **GREEDY)["choices"][0]["logprobs"]["content"]
    assert [(item["token"], item["top_logprobs"]) for item in bare] == [(item["token"], []) for item in items[:3]]
    chunks = events(server, messages=MESSAGES, logprobs=True, top_logprobs=2, max_tokens=12, **GREEDY)
    streamed = [item for chunk in chunks for item in (chunk["choices"][0]["logprobs"] or {}).get("content") or []]
    assert [item["token"] for item in streamed] == [item["token"] for item in items]


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_echo_with_logprobs_scores_every_prompt_token(server: Server, max_tokens: int) -> None:
    ids = tokens_of(server, PROMPT, add_special_tokens=True)
    answer = text(server, prompt=ids, echo=True, logprobs=1, max_tokens=max_tokens, **GREEDY)
    choice = answer["choices"][0]
    scores = choice["logprobs"]
    sizes = {name: len(scores[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
    assert set(sizes.values()) == {len(ids) + max_tokens}
    assert scores["token_logprobs"][0] is None
    assert all(value < 0 or value == 0 for value in scores["token_logprobs"][1:])
    assert choice["text"].startswith(PROMPT)
    assert "".join(scores["tokens"]) == choice["text"]
    for token, offset in zip(scores["tokens"], scores["text_offset"]):
        assert choice["text"].startswith(token, offset)


def test_echo_without_logprobs_only_puts_the_prompt_first(server: Server) -> None:
    plain, echoed = (text(server, echo=echo, max_tokens=5, **GREEDY)["choices"][0] for echo in (False, True))
    assert echoed["text"] == PROMPT + plain["text"]
    chunks = events(server, COMPLETIONS, prompt=PROMPT, echo=True, max_tokens=5, **GREEDY)
    assert streamed_text(chunks) == echoed["text"]


def test_prompt_scores_do_not_depend_on_the_prefix_cache(server: Server) -> None:
    prompt = [1, *(100 + (7 * place) % 900 for place in range(200))]
    first, second = (
        text(server, prompt=prompt, echo=True, logprobs=0, max_tokens=1, **GREEDY)["choices"][0]["logprobs"]
        for _ in range(2)
    )
    assert len(first["token_logprobs"]) == len(second["token_logprobs"]) == 202
    assert all(abs(a - b) < 0.05 for a, b in zip(first["token_logprobs"][1:], second["token_logprobs"][1:]))


# ---- refusals


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("functions", [{}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("suffix", "x"),
        ("best_of", 4),
        ("prompt_logprobs", 1),
        ("guided_json", {}),
        ("use_beam_search", True),
    ],
)
def test_what_is_not_served_is_refused_by_name(server: Server, field: str, value: object) -> None:
    error = openai_error(post(server, {"model": "m", "messages": MESSAGES, field: value}), 400)
    assert error["param"] == field
    assert field in error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"max_tokens": 0}, "max_tokens", "1"),
        ({"max_tokens": "5"}, "max_tokens", "a string"),
        ({"top_p": 2}, "top_p", "top_p (2)"),
        ({"n": 129}, "n", "128"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
        ({"stop": ["x"] * 17}, "stop", "16"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "100"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "4096"),
        ({"stop_token_ids": [99999]}, "stop_token_ids", "4096"),
        ({"min_tokens": 9, "max_tokens": 4}, "min_tokens", "min_tokens (9) exceeds max_tokens (4)"),
        ({"stream": 1}, "stream", "a number"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
            "messages",
            "image_url",
        ),
        ({"messages": "hello"}, "messages", "a string"),
        ({"messages": None}, "messages", "required"),
    ],
)
def test_a_refusal_names_the_field_as_openai_calls_it(
    server: Server, fields: dict[str, Any], param: str, words: str
) -> None:
    error = openai_error(post(server, {"model": "m", "messages": MESSAGES, **fields}), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"].split("[")[0] == param
    assert words in error["message"]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_prompt_that_is_too_long_is_context_length_exceeded(server: Server, streamed: bool) -> None:
    for path, given in (
        (COMPLETIONS, {"prompt": [5] * 8193}),
        (CHAT, {"messages": [{"role": "user", "content": "猫" * 8300}]}),
    ):
        error = openai_error(post(server, {"model": "m", "stream": streamed, **given}, path), 400)
        assert error["code"] == "context_length_exceeded"
        assert "8192" in error["message"]


@pytest.mark.parametrize("prompt", [[], [[]], [1, "a"], ["a", [1]], {"a": 1}, 5, [True], [-1], [4096]])
def test_a_prompt_that_is_none_is_refused(server: Server, prompt: object) -> None:
    assert openai_error(post(server, {"model": "m", "prompt": prompt}, COMPLETIONS), 400)["param"] == "prompt"


# ---- tools


def test_tokenize_and_detokenize_are_each_others_inverse(server: Server) -> None:
    plain = post(server, {"prompt": "Hello, 世界 😀"}, "/tokenize").json()
    assert plain["count"] == len(plain["tokens"])
    assert plain["max_model_len"] == 16384
    assert plain["tokens"][1:] == tokens_of(server, "Hello, 世界 😀")
    assert post(server, {"tokens": plain["tokens"]}, "/detokenize").json()["prompt"] == "Hello, 世界 😀"
    answer = post(server, {"tokens": [4096]}, "/detokenize")
    assert answer.status_code == 400
    assert "4096" in answer.json()["error_msg"]
    assert post(server, {}, "/tokenize").status_code == 400


def test_the_package_reads_the_streams_and_errors(server: Server) -> None:
    openai = pytest.importorskip("openai")
    for base in ("/v1", "/v1/chat/completions"):
        client = openai.OpenAI(base_url=server.gateway + base, api_key="none", max_retries=0)
        stream = client.chat.completions.create(model="m", messages=MESSAGES, stream=True, temperature=0, max_tokens=6)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == content(
            chat(server, max_tokens=6, **GREEDY)
        )
        with pytest.raises(openai.BadRequestError, match=r"top_p \(3"):
            client.chat.completions.create(model="m", messages=MESSAGES, top_p=3)
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="m", input="x")


def test_nothing_but_data_lines_is_in_a_stream(server: Server) -> None:
    answer = post(server, {"model": "m", "messages": MESSAGES, "stream": True})
    assert all(re.match(r"data: .", line) for line in answer.text.split("\n") if line)
