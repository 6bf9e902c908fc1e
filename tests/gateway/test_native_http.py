"""The native dialect over plain HTTP: lines, whole answers, ops."""

from __future__ import annotations

import json

import pytest
import requests

from gateway.conftest import Stack
from gateway.fake_triton import WORDS

TEXT = "".join(WORDS)


def post(stack: Stack, path: str = "/v1/chat/completions", **body: object) -> requests.Response:
    return requests.post(stack.url + path, json=body, timeout=10)


def lines(answer: requests.Response) -> list[dict]:
    assert answer.status_code == 200
    assert answer.text.endswith("\n")
    assert "\n\n" not in answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_stream_is_one_object_a_line(stack: Stack, path: str) -> None:
    said = lines(post(stack, path, text="hi", stream=True, req_id="r1", infer_seed=5))
    assert [one["token"] for one in said] == WORDS
    assert [one["send_idx"] for one in said] == list(range(len(WORDS)))
    assert [one["is_end"] for one in said] == [0] * 5 + [1]
    assert {(one["req_id"], one["infer_seed"], one["error_msg"], one["error_code"]) for one in said} == {
        ("r1", 5, "", 0)
    }
    assert said[-1]["tokens_all"] == TEXT
    assert (said[-1]["finish_reason"], said[-1]["tokens_all_num"]) == ("stop", 6)
    assert said[-1]["usage"]["prompt_tokens"] == 3


def test_whole_answer(stack: Stack) -> None:
    answer = post(stack, text="hi", req_id="r1", return_all_tokens=True).json()
    assert answer["tokens_all"] == answer["result"] == TEXT
    assert (answer["req_id"], answer["tokens_all_num"], answer["finish_reason"]) == ("r1", 6, "stop")
    assert (answer["error_msg"], answer["error_code"]) == ("", 0)
    assert answer["tokens_all_ids"] == list(range(1000, 1006))
    assert not {"usage", "token", "token_ids", "send_idx", "is_end"} & set(answer)


def test_usage_is_in_a_whole_answer_only_if_asked(stack: Stack) -> None:
    assert post(stack, text="hi", return_usage=True).json()["usage"]["total_tokens"] == 9


def test_fields_go_on_as_they_are_with_an_id_and_a_seed(stack: Stack) -> None:
    post(
        stack,
        messages=[{"role": "user", "content": "x"}],
        topp=0.5,
        made_up={"a": 1},
        stop=None,
        stream=False,
        model="m",
    )
    sent = stack.fake.requests[0]
    assert 0 <= sent.pop("infer_seed") < 1 << 63
    assert len(sent.pop("req_id")) == 32
    assert len(sent.pop("owner")) == 16
    assert sent.pop("tenant") == "127.0.0.1"
    assert sent == {"messages": [{"role": "user", "content": "x"}], "topp": 0.5, "made_up": {"a": 1}}


def test_log_probabilities_of_all_messages_are_in_a_whole_answer(stack: Stack) -> None:
    answer = post(stack, text="hi", logprobs=1, prompt_logprobs=0, return_prompt=True).json()
    assert [one["token"] for one in answer["logprobs"]] == WORDS
    assert [one and one["token"] for one in answer["prompt_logprobs"]] == [None, " cap", "ital"]
    assert answer["prompt"] == "The capital"


def test_bare_messages_are_native_and_a_model_makes_them_openai(stack: Stack) -> None:
    messages = [{"role": "user", "content": "x"}]
    assert "result" in post(stack, messages=messages).json()
    assert "choices" in post(stack, messages=messages, model="m").json()
    assert "result" in post(stack, messages=messages, model="m", max_dec_len=4).json()
    assert "result" in post(stack, messages=messages, model="m", response_type="fastdeploy").json()
    assert "choices" in post(stack, messages=messages, response_type="openai").json()
    alias = post(stack, "/v1/chat/completions/chat/completions", messages=messages, max_dec_len=4).json()
    assert "choices" in alias


def test_choices_stream_but_do_not_fit_a_whole_answer(stack: Stack) -> None:
    said = lines(post(stack, text="hi", n=2, stream=True))
    assert [one["index"] for one in said if one["is_end"]] == [0, 1]
    assert post(stack, text="hi", n=2).status_code == 400


@pytest.mark.parametrize("name", ["op", "dialect", "raw_text", "resume_inside", "owner", "key", "tenant"])
def test_words_of_the_inner_wire_are_refused(stack: Stack, name: str) -> None:
    answer = post(stack, text="hi", **{name: "drain"})
    assert (answer.status_code, answer.json()["error_field"]) == (400, name)
    assert not stack.fake.ops
    assert not stack.fake.requests


def test_a_resumption_goes_through(stack: Stack) -> None:
    said = lines(
        post(stack, text="hi", stream=True, generated_token_ids=[1000, 1001], send_idx=2, attempt=1, infer_seed=1)
    )
    assert [one["send_idx"] for one in said] == [2, 3, 4, 5]
    assert "".join(one["token"] for one in said) == "".join(WORDS[2:])


def test_disable_streaming_sends_one_line(stack: Stack) -> None:
    stack.fake.disable_streaming = True
    (line,) = lines(post(stack, text="hi", stream=True))
    assert (line["token"], line["is_end"]) == (TEXT, 1)


def test_abort_ends_a_running_request(stack: Stack) -> None:
    stack.fake.delay = 0.05
    with requests.post(
        f"{stack.url}/v1/completions", json={"text": "x", "req_id": "gone", "stream": True}, stream=True, timeout=10
    ) as answer:
        said = answer.iter_lines()
        next(said)
        assert post(stack, "/v1/abort", req_id="gone").json()["aborted"] is True
        assert json.loads(list(said)[-1])["finish_reason"] == "cancelled"
    assert post(stack, "/v1/abort", req_id="gone").json()["aborted"] is False


def test_an_aborted_openai_stream_ends_with_an_error(stack: Stack) -> None:
    stack.fake.delay = 0.05
    body = {"model": "m", "prompt": "x", "stream": True}
    with requests.post(f"{stack.url}/v1/completions", json=body, stream=True, timeout=10) as answer:
        said = answer.iter_lines()
        answer_id = json.loads(next(said).removeprefix(b"data: "))["id"]
        assert post(stack, "/v1/abort", req_id=answer_id).json()["aborted"] is True
        rest = [line for line in said if line]
    assert json.loads(rest[-2].removeprefix(b"data: "))["error"]["type"] == "cancelled_error"
    assert rest[-1] == b"data: [DONE]"


def test_tokenize_and_back(stack: Stack) -> None:
    answer = post(stack, "/tokenize", prompt="hé").json()
    assert answer == {"tokens": [104, 233], "token_strs": ["h", "é"], "count": 2, "max_model_len": 4096}
    assert post(stack, "/tokenize", messages=[{"role": "user", "content": "ab"}]).json()["count"] == 2
    assert post(stack, "/detokenize", tokens=[104, 233]).json()["prompt"] == "hé"
    assert post(stack, "/tokenize").status_code == 400
    assert post(stack, "/detokenize", tokens=["a"]).status_code == 400


@pytest.mark.parametrize("state", ["ready", "loading", "draining", "down"])
def test_health_is_readiness(make_stack, state: str) -> None:
    stack = make_stack()
    stack.fake.state = state
    answer = requests.get(f"{stack.url}/health", timeout=5)
    assert answer.status_code == (200 if state == "ready" else 503)
    assert answer.json()["status"] == state


def test_openapi_describes_both_dialects(stack: Stack) -> None:
    schema = requests.get(f"{stack.url}/openapi.json", timeout=5).json()
    operation = schema["paths"]["/v1/chat/completions"]["post"]
    ours, native = operation["requestBody"]["content"]["application/json"]["schema"]["anyOf"]
    assert ours["properties"]["top_logprobs"]["maximum"] == 20
    assert {"text", "input_ids", "topp"} <= set(native["properties"])
    assert "422" not in operation["responses"]
    assert {"/tokenize", "/v1/abort", "/v1/models", "/health"} <= set(schema["paths"])
    assert requests.get(f"{stack.url}/docs", timeout=5).status_code == 200
