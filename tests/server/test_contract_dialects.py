"""Which dialect a body speaks: the table of routes and fields, row by row."""

from __future__ import annotations

from typing import Any

import pytest

from server.conftest import Server
from server.contract_calls import CHAT, COMPLETIONS, STORY, events, native_error, openai_error, post, stream

pytestmark = pytest.mark.server

MESSAGES = [{"role": "user", "content": STORY}]
BELOW = ("/v1/chat/completions/completions", "/v1/chat/completions/chat/completions")
NATIVE_FIELDS: dict[str, Any] = {
    "text": None,
    "input_ids": None,
    "req_id": "d",
    "max_dec_len": 2,
    "min_dec_len": 1,
    "seq_len": 2,
    "topp": 0.5,
    "penalty_score": 1.1,
    "frequency_score": 0.5,
    "presence_score": 0.5,
    "eos_token_ids": [7],
    "infer_seed": 3,
    "return_all_tokens": True,
    "return_usage": True,
    "benchmark": True,
    "system": "Be brief.",
    "timeout": 30,
}


def dialect_of(server: Server, body: dict[str, Any], path: str) -> str:
    answer = post(server, body, path)
    assert answer.status_code == 200, answer.text
    return {True: "native", False: "openai"}["tokens_all" in answer.json()]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("name", NATIVE_FIELDS)
def test_one_native_field_beside_a_model_means_native(server: Server, name: str, path: str) -> None:
    body: dict[str, Any] = {"model": "m", "messages": MESSAGES, name: NATIVE_FIELDS[name]}
    if name in ("text", "input_ids"):
        body = {"model": "m", name: {"text": STORY, "input_ids": [1, 4, 50]}[name], "max_tokens": 2}
    assert dialect_of(server, body, path) == "native"


@pytest.mark.parametrize("name", [name for name in NATIVE_FIELDS if name not in ("text", "input_ids")])
def test_a_native_field_that_is_null_is_absent(server: Server, name: str) -> None:
    body = {"model": "m", "messages": MESSAGES, name: None, "max_tokens": 2}
    assert dialect_of(server, body, CHAT) == "openai"


def test_a_model_or_a_prompt_means_openai_and_bare_messages_native(server: Server) -> None:
    assert dialect_of(server, {"model": "m", "messages": MESSAGES, "max_tokens": 2}, CHAT) == "openai"
    assert dialect_of(server, {"model": "m", "prompt": STORY, "max_tokens": 2}, COMPLETIONS) == "openai"
    assert dialect_of(server, {"prompt": STORY, "max_tokens": 2}, COMPLETIONS) == "openai"
    for path in (CHAT, COMPLETIONS):
        assert dialect_of(server, {"messages": MESSAGES, "max_tokens": 2}, path) == "native"
        assert (
            dialect_of(server, {"messages": MESSAGES, "max_tokens": 2, "temperature": 0.3, "stop": "x"}, path)
            == "native"
        )


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_response_type_decides_over_the_fields(server: Server, path: str) -> None:
    given = {"messages": MESSAGES} if path == CHAT else {"prompt": STORY}
    native = {"text": STORY} if path == COMPLETIONS else given
    assert (
        dialect_of(server, {"model": "m", **native, "response_type": "fastdeploy", "max_tokens": 2}, path) == "native"
    )
    assert dialect_of(server, {**given, "timeout": 20, "response_type": "openai", "max_tokens": 2}, path) == "openai"


@pytest.mark.parametrize("name", [name for name in NATIVE_FIELDS if name not in ("text", "input_ids")])
def test_routes_below_chat_completions_are_always_openai(server: Server, name: str) -> None:
    for path, given in zip(BELOW, ({"prompt": STORY}, {"messages": MESSAGES})):
        body = {**given, "max_tokens": 2, name: NATIVE_FIELDS[name], "response_type": "fastdeploy"}
        answer = post(server, body, path)
        assert "error_msg" not in answer.json()
        assert "choices" in answer.json(), answer.text


def test_a_text_alone_below_chat_completions_is_an_openai_error(server: Server) -> None:
    assert openai_error(post(server, {"text": STORY}, BELOW[0]), 400)["param"] == "prompt"
    assert openai_error(post(server, {"text": STORY}, BELOW[1]), 400)["param"] == "messages"


def test_response_type_openai_turns_a_native_answer_into_an_openai_one(server: Server) -> None:
    for given in ({"text": STORY}, {"messages": MESSAGES}):
        body = {**given, "response_type": "openai", "max_dec_len": 3, "temperature": 0}
        answer = post(server, body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["object"] == "chat.completion"
        native = post(server, {**body, "response_type": "fastdeploy"}).json()
        assert answer.json()["choices"][0]["message"]["content"] == native["tokens_all"]


def test_an_unknown_response_type_is_refused(server: Server) -> None:
    answer = post(server, {"text": STORY, "response_type": "xml"})
    assert "response_type" in native_error(answer, 400)


def test_the_dialect_of_a_stream_is_chosen_the_same_way(server: Server) -> None:
    assert stream(server, messages=MESSAGES, max_tokens=2)[-1]["tokens_all_num"] == 2
    assert events(server, messages=MESSAGES, max_tokens=2)[-1]["choices"][0]["finish_reason"] == "length"


def test_errors_speak_the_dialect_of_the_body(server: Server) -> None:
    assert "temperature" in native_error(post(server, {"text": STORY, "temperature": -1}), 400)
    error = openai_error(post(server, {"model": "m", "messages": MESSAGES, "temperature": -1}), 400)
    assert (error["param"], error["type"]) == ("temperature", "invalid_request_error")
