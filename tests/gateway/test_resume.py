"""A stream to the server that breaks is taken up again with the tokens received so far."""

from __future__ import annotations

import json
import threading
import time

import pytest
import requests

from gateway.conftest import Stack
from gateway.fake_triton import WORDS
from octavo.gateway.resume import Progress
from octavo.protocol.answers import TokenMessage

TEXT = "".join(WORDS)


def lines(stack: Stack, **body: object) -> list[dict]:
    answer = requests.post(f"{stack.url}/v1/completions", json={"text": "x", "stream": True, **body}, timeout=20)
    assert answer.status_code == 200
    return [json.loads(line) for line in answer.text.splitlines()]


def test_a_broken_stream_goes_on_where_it_stopped(stack: Stack) -> None:
    stack.fake.breaks = [2, 1]
    said = lines(stack, req_id="r", timeout=50)
    assert [one["token"] for one in said] == WORDS
    assert [one["send_idx"] for one in said] == list(range(6))
    first, second, third = stack.fake.requests
    assert "attempt" not in first
    assert (second["generated_token_ids"], second["send_idx"], second["attempt"]) == ([1000, 1001], 2, 1)
    assert (third["generated_token_ids"], third["send_idx"], third["attempt"]) == ([1000, 1001, 1002], 3, 2)
    assert {one["infer_seed"] for one in stack.fake.requests} == {first["infer_seed"]}
    assert 40 < third["timeout"] < 50
    assert third["resume_inside"] is True
    assert stack.fake.aborts == []


def test_a_stream_that_breaks_before_its_first_message_is_replayed(stack: Stack) -> None:
    stack.fake.breaks = [0]
    assert requests.post(f"{stack.url}/v1/completions", json={"text": "x"}, timeout=20).json()["result"] == TEXT
    assert stack.fake.requests[1]["attempt"] == 1
    assert "generated_token_ids" not in stack.fake.requests[1]


def test_every_choice_goes_on_where_it_stopped(stack: Stack) -> None:
    stack.fake.breaks = [3]
    body = {"model": "m", "prompt": "x", "n": 2, "logprobs": 0, "echo": True}
    answer = requests.post(f"{stack.url}/v1/completions", json=body, timeout=20).json()
    assert [choice["text"] for choice in answer["choices"]] == ["The capital" + TEXT] * 2
    assert [choice["logprobs"]["tokens"] for choice in answer["choices"]] == [["The", " cap", "ital", *WORDS]] * 2
    resumed = stack.fake.requests[1]
    assert (resumed["generated_token_ids"], resumed["send_idx"]) == ([[1000, 1001], [1000]], [2, 1])
    assert not {"return_prompt", "prompt_logprobs"} & set(resumed)


def test_a_request_that_breaks_every_stream_is_given_up(stack: Stack) -> None:
    stack.fake.breaks = [1] + [0] * 20
    said = lines(stack)
    assert [one["token"] for one in said[:-1]] == ["Hello"]
    assert (said[-1]["error_code"], said[-1]["is_end"]) == (503, 1)
    assert len(stack.fake.requests) == 4


def test_a_server_that_restarts_is_waited_for(make_stack) -> None:
    stack: Stack = make_stack()
    stack.fake.delay = 0.1

    def restart() -> None:
        time.sleep(0.25)
        stack.run(stack.fake.stop())
        time.sleep(0.5)
        stack.run(stack.fake.start())

    restarting = threading.Thread(target=restart)
    restarting.start()
    said = lines(stack)
    restarting.join()
    assert [one["token"] for one in said] == WORDS
    assert len(stack.fake.requests) >= 2


def test_a_server_that_stays_away_ends_the_request(make_stack) -> None:
    stack: Stack = make_stack()
    stack.fake.delay = 0.1
    stopping = threading.Timer(0.25, lambda: stack.run(stack.fake.stop()))
    stopping.start()
    said = lines(stack)
    stopping.join()
    assert 1 <= len(said) - 1 < len(WORDS)
    assert said[-1]["error_code"] == 503
    start = time.monotonic()
    answer = requests.post(f"{stack.url}/v1/completions", json={"text": "x"}, timeout=10)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    assert time.monotonic() - start < 2, "a new request is refused at once while the server is away"
    assert requests.get(f"{stack.url}/health", timeout=5).json()["status"] == "down"
    assert requests.get(f"{stack.url}/v1/models", timeout=5).json()["data"][0]["id"] == "tiny"


def message(send_idx: int, *, index: int = 0, is_end: int = 0) -> TokenMessage:
    return TokenMessage("r", "t", [send_idx], send_idx, is_end, 0, index=index)


def test_repeated_messages_are_not_passed_on() -> None:
    progress = Progress({"n": 2})
    assert [progress.accept(message(at)) for at in (0, 1, 1, 0, 2)] == [True, True, False, False, True]
    assert progress.accept(message(0, index=1, is_end=1))
    assert not progress.accept(message(1, index=1))
    assert not progress.accept(message(0, index=2))
    assert not progress.closed
    assert progress.accept(message(3, is_end=1))
    assert progress.closed


@pytest.mark.parametrize("n", [None, 0, -1, "2", True, 129])
def test_a_bad_number_of_choices_is_left_to_the_front_end(n: object) -> None:
    assert len(Progress({"n": n}).choices) == 1
