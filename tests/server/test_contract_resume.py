"""Going on from tokens already received: at every cut, over HTTP and gRPC, the rest is what it would have been."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import httpx
import pytest

from server.conftest import Server
from server.contract_calls import (
    CHAT,
    LONG,
    STORY,
    WILD,
    check_native_stream,
    joined,
    native_error,
    post,
    stream,
    tokens_of,
    triton,
)

pytestmark = pytest.mark.server

Message = dict[str, Any]
CASES: dict[str, Message] = {
    "plain": {"temperature": 1.3, "infer_seed": 3, "max_dec_len": 24},
    "split characters": {**WILD, "infer_seed": 5, "max_dec_len": 40, "ignore_eos": True},
    "penalties": {
        **{"temperature": 1.2, "infer_seed": 9, "max_dec_len": 40, "ignore_eos": True},
        **{"frequency_score": 0.7, "presence_score": 0.5, "penalty_score": 1.2},
    },
    "stop string": {"temperature": 0, "stop": ["一位老人和", "白猫。每", "塔里没有"], "infer_seed": 1},
    "stop within one character": {"temperature": 0, "stop": ["灯", "老虎"], "min_dec_len": 14, "infer_seed": 1},
    "end token": {"temperature": 0, "infer_seed": 1},
    "min_dec_len": {"temperature": 0, "infer_seed": 1, "min_dec_len": 60, "max_dec_len": 64},
    "logit_bias": {"temperature": 0.9, "infer_seed": 2, "max_dec_len": 20, "logit_bias": {"368": 5, "271": -100}},
}


def over_http(server: Server, **body: object) -> list[Message]:
    return stream(server, **body)


def over_grpc(server: Server, **body: object) -> list[Message]:
    answer = triton(server, {"req_id": "resumed", **body})
    assert all(isinstance(item, list) for item in answer), answer
    return [item[0] for item in answer]


def resume_of(held: list[Message], **extra: object) -> Message:
    """The fields that a holder of these messages sends."""
    fields = {"generated_token_ids": joined(held)[1], "send_idx": len(held), "attempt": 1}
    return {**fields, "fingerprint": held[0]["fingerprint"], "infer_seed": held[0]["infer_seed"], **extra}


def check_rest(whole: list[Message], held: list[Message], rest: list[Message]) -> None:
    last, expected = check_native_stream(rest, start=len(held)), whole[-1]
    text, ids = joined(held + rest)
    assert text == expected["tokens_all"] == last["tokens_all"]
    assert ids == joined(whole)[1]
    for name in ("finish_reason", "tokens_all_num", "stop_reason", "fingerprint"):
        assert last.get(name) == expected.get(name)
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert last["usage"][name] == expected["usage"][name]


@pytest.mark.parametrize("road", [over_http, over_grpc])
@pytest.mark.parametrize("name", CASES)
def test_a_stream_goes_on_from_every_cut(server: Server, name: str, road: Any) -> None:
    base = {"text": STORY, **CASES[name]}
    whole = over_grpc(server, **base)
    check_native_stream(whole)
    step = len(whole) // 40 + 1 if road is over_grpc else len(whole) // 8 + 1
    cuts = {*range(1, len(whole), step), len(whole) - 2, len(whole) - 1}  # every one of a short stream
    for cut in cuts - {0, -1}:
        held = whole[:cut]
        check_rest(whole, held, road(server, **{**base, **resume_of(held)}))


def test_an_input_of_ids_and_one_of_messages_go_on_too(server: Server) -> None:
    for given in ({"input_ids": tokens_of(server, STORY)}, {"messages": [{"role": "user", "content": STORY}]}):
        base = {**given, "temperature": 1.5, "infer_seed": 4, "max_dec_len": 16}
        whole = over_grpc(server, **base)
        check_rest(whole, whole[:5], over_grpc(server, **{**base, **resume_of(whole[:5])}))


def test_logprobs_of_the_rest_alone_are_sent(server: Server) -> None:
    base = {"text": STORY, "logprobs": 2, "stop": ["白猫"], "temperature": 1.3, "infer_seed": 7, "max_dec_len": 30}
    whole = over_grpc(server, **base)
    for cut in range(1, len(whole), 3):
        rest = over_grpc(server, **{**base, **resume_of(whole[:cut])})
        check_rest(whole, whole[:cut], rest)
        for message in rest:
            assert [item["id"] for item in message["logprobs"]] == message["token_ids"]
        entries, again = ([item for message in part for item in message["logprobs"]] for part in (whole[cut:], rest))
        for one, other in zip(entries, again):
            assert abs(one["logprob"] - other["logprob"]) < 0.05


def choice_of(messages: list[Message], index: int) -> list[Message]:
    return [item for item in messages if item["index"] == index]


@pytest.mark.parametrize("road", [over_http, over_grpc])
def test_each_of_two_choices_goes_on_from_its_own_tokens(server: Server, road: Any) -> None:
    base = {"text": STORY, "n": 2, "stop": ["白猫", "灯塔，塔"], "infer_seed": 6, "max_dec_len": 24, **WILD}
    whole = over_grpc(server, **base)
    for cut in range(2, len(whole), 3 if road is over_grpc else 9):
        parts = [choice_of(whole[:cut], index) for index in range(2)]
        fields = {
            "generated_token_ids": [joined(part)[1] for part in parts],
            "send_idx": [len(part) for part in parts],
            "attempt": 1,
            "fingerprint": whole[0]["fingerprint"],
        }
        rest = road(server, **{**base, **fields})
        for index, part in enumerate(parts):
            if part and part[-1]["is_end"]:
                last = choice_of(rest, index)
                assert len(last) <= 1
                assert all(
                    joined(last)[1] == [] and item["finish_reason"] == part[-1]["finish_reason"] for item in last
                )
            else:
                check_rest(choice_of(whole, index), part, choice_of(rest, index))


def test_a_finished_choice_is_not_run_again(server: Server) -> None:
    base = {"text": STORY, "n": 2, "infer_seed": 6, "max_dec_len": 60, "ignore_eos": True, **WILD}
    whole = over_grpc(server, **base)
    parts = [choice_of(whole, 0), choice_of(whole, 1)[:2]]
    fields = {
        "generated_token_ids": [joined(part)[1] for part in parts],
        "send_idx": [len(part) for part in parts],
        "attempt": 1,
    }
    rest = over_grpc(server, **{**base, **fields})
    (again,) = choice_of(rest, 0)
    assert (again["finish_reason"], again["token_ids"], again["token"]) == ("length", [], "")
    assert again["tokens_all"] == parts[0][-1]["tokens_all"]
    check_rest(choice_of(whole, 1), parts[1], choice_of(rest, 1))


def test_a_character_that_never_became_whole_is_not_said_twice(server: Server) -> None:
    piece = tokens_of(server, "😀")[0]
    base = {"text": STORY, "temperature": 0, "infer_seed": 1, "max_dec_len": 3, "logit_bias": {str(piece): 100}}
    whole = over_grpc(server, **base)
    assert whole[-1]["tokens_all"].endswith("\ufffd")
    (last,) = over_grpc(server, **{**base, **resume_of(whole)})
    assert (last["token"], last["token_ids"], last["tokens_all"]) == ("", [], whole[-1]["tokens_all"])


@pytest.mark.parametrize("road", [over_http, over_grpc])
@pytest.mark.parametrize("name", ["stop string", "end token", "plain"])
def test_what_has_ended_already_finishes_at_once(server: Server, name: str, road: Any) -> None:
    base = {"text": STORY, **CASES[name]}
    whole = over_grpc(server, **base)
    ids = joined(whole)[1] + ([2] if name == "end token" else [])
    if name == "stop string":  # the tokens that complete it, as a holder with ids of its own would have them
        free = over_grpc(server, **{**base, "stop": None})
        ids = joined(free)[1][: whole[-1]["usage"]["completion_tokens"]]
    rest = road(server, **{**base, **resume_of(whole), "generated_token_ids": ids})
    (last,) = rest
    assert (last["is_end"], last["token"], last["token_ids"], last["send_idx"]) == (1, "", [], len(whole))
    for field in ("finish_reason", "tokens_all", "tokens_all_num"):
        assert last[field] == whole[-1][field]
    assert last["usage"]["completion_tokens"] == whole[-1]["usage"]["completion_tokens"]


def test_an_answer_that_is_not_streamed_holds_all_of_it(server: Server) -> None:
    base = {"text": STORY, **CASES["plain"]}
    whole = over_grpc(server, **base)
    answer = post(server, {**base, **resume_of(whole[:6])}).json()
    assert (answer["tokens_all"], answer["tokens_all_num"]) == (whole[-1]["tokens_all"], whole[-1]["tokens_all_num"])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"fingerprint": "0" * 32}, "fingerprint"),
        ({"generated_token_ids": [4096]}, "generated_token_ids"),
        ({"generated_token_ids": [-1]}, "generated_token_ids"),
        ({"generated_token_ids": ["a"]}, "generated_token_ids"),
        ({"generated_token_ids": 5}, "generated_token_ids"),
        ({"generated_token_ids": [[1], [2]]}, "generated_token_ids"),
        ({"n": 2, "generated_token_ids": [5]}, "generated_token_ids"),
        ({"send_idx": -1}, "send_idx"),
        ({"attempt": -1}, "attempt"),
        ({"attempt": "1"}, "attempt"),
    ],
)
def test_what_cannot_be_resumed_is_refused(server: Server, fields: Message, words: str) -> None:
    body = {"text": STORY, "generated_token_ids": [9], "send_idx": 1, "attempt": 1, "stream": True, **fields}
    assert words in native_error(post(server, body), 400)
    (error,) = triton(server, {"req_id": "r", **body})
    assert error["error_code"] == 400
    assert words in error["error_msg"]


def held_stream(server: Server, got: list[Message], started: threading.Event) -> None:
    body = {"text": STORY, "req_id": "superseded", "stream": True, "infer_seed": 1, **LONG}
    with httpx.stream("POST", f"{server.gateway}{CHAT}", json=body, timeout=60) as response:
        for line in response.iter_lines():
            got.append(json.loads(line))
            if len(got) == 4:
                started.set()


def test_a_higher_attempt_supersedes_and_an_equal_one_does_not(server: Server) -> None:
    got: list[Message] = []
    started = threading.Event()
    older = threading.Thread(target=held_stream, args=(server, got, started))
    older.start()
    assert started.wait(10)
    body = {"text": STORY, "req_id": "superseded", "infer_seed": 1, "max_dec_len": 12}
    native_error(post(server, body), 409)
    native_error(post(server, {**body, "attempt": 0}), 409)
    held = got[:4]
    rest = stream(server, **{**body, **resume_of(held)})
    assert check_native_stream(rest, start=4)["tokens_all_num"] == 12
    older.join(10)
    assert not older.is_alive()
    assert got[-1]["error_code"] == 409
    time.sleep(0.05)
    assert post(server, {"text": STORY, "req_id": "superseded", "max_dec_len": 1}).status_code == 200
