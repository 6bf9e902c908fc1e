"""The native dialect over HTTP, sentence by sentence: every field has its effect, every shape is as written."""

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
    COMPLETIONS,
    LONG,
    STORY,
    WILD,
    ask,
    check_native_stream,
    joined,
    lines_of,
    native_error,
    post,
    stream,
    tokens_of,
)

pytestmark = pytest.mark.server

GREEDY: dict[str, Any] = {"temperature": 0}
GOOD_END = {"error_msg": "", "error_code": 0}


@pytest.fixture(scope="module")
def story(server: Server) -> list[dict[str, Any]]:
    """The greedy answer to STORY, streamed."""
    return stream(server, text=STORY, **GREEDY)


# ---- shapes


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_an_answer_that_is_not_streamed_has_this_shape(server: Server, path: str) -> None:
    answer = ask(server, path, text=STORY, req_id="shape", max_dec_len=4)
    assert {"req_id", "tokens_all", "result", "tokens_all_num", "finish_reason"} <= set(answer)
    assert answer.items() >= {"req_id": "shape", "finish_reason": "length", "tokens_all_num": 4, **GOOD_END}.items()
    assert answer["result"] == answer["tokens_all"] != ""
    assert "usage" not in answer


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_stream_has_this_shape(server: Server, path: str) -> None:
    answer = post(server, {"text": STORY, "stream": True, "max_dec_len": 12}, path)
    assert "\n\n" not in answer.text
    messages = lines_of(answer.text)
    for item in messages:
        assert {"req_id", "token", "token_ids", "send_idx", "is_end", "infer_seed", "error_msg", "error_code"} <= set(
            item
        )
        assert (item["error_msg"], item["error_code"]) == ("", 0)
    for item in messages[:-1]:
        assert not {"finish_reason", "tokens_all", "tokens_all_num", "usage"} & set(item)
    last = check_native_stream(messages)
    assert (last["finish_reason"], last["tokens_all_num"], last["usage"]["completion_tokens"]) == ("length", 12, 12)


def test_streamed_or_not_the_answer_is_the_same(server: Server, story: list[dict[str, Any]]) -> None:
    answer = ask(server, text=STORY, return_usage=True, **GREEDY)
    last = check_native_stream(story)
    for name in ("tokens_all", "tokens_all_num", "finish_reason"):
        assert answer[name] == last[name]
    assert answer["usage"]["completion_tokens"] == last["usage"]["completion_tokens"]


def test_the_end_token_is_counted_by_usage_alone(server: Server, story: list[dict[str, Any]]) -> None:
    last = story[-1]
    assert last["finish_reason"] == "stop"
    assert last["usage"]["completion_tokens"] == last["tokens_all_num"] + 1
    assert 2 not in joined(story)[1]


def test_a_message_that_is_behind_nothing_carries_one_token(server: Server) -> None:
    """Whether the sender is behind is the machine's business too, so one try in ten must find it free."""
    shares, body = [], {"text": STORY, "stream": True, **GREEDY}
    for _ in range(10):
        with httpx.stream("POST", f"{server.gateway}{CHAT}", json=body) as response:
            messages = [json.loads(line) for line in response.iter_lines()]
        shares.append(len(messages) / len(joined(messages)[1]))
        if shares[-1] > 0.5:
            return
    pytest.fail(f"messages per token: {shares}")


def test_a_random_req_id_is_made_for_each(server: Server) -> None:
    first, second = (ask(server, text=STORY, max_dec_len=1)["req_id"] for _ in range(2))
    assert first
    assert second
    assert first != second


def test_a_character_split_over_tokens_is_held_back_with_its_tokens(server: Server) -> None:
    """With biased bytes the text is made of pieces of characters: no message may end inside one."""
    for seed in range(12):
        messages = stream(server, text=STORY, infer_seed=seed, max_dec_len=60, ignore_eos=True, **WILD)
        last = check_native_stream(messages)
        assert last["tokens_all_num"] == 60
        detokenized = post(server, {"tokens": joined(messages)[1]}, "/detokenize").json()["text"]
        assert last["tokens_all"] == detokenized


# ---- inputs


def test_one_input_is_needed_and_only_one(server: Server) -> None:
    assert "text" in native_error(post(server, {"req_id": "r"}), 400)
    messages = [{"role": "user", "content": STORY}]
    for pair in (
        {"text": "a", "input_ids": [5]},
        {"text": "a", "messages": messages},
        {"messages": messages, "input_ids": [5]},
    ):
        native_error(post(server, {"req_id": "r", **pair}), 400)


def test_text_goes_through_the_template_and_input_ids_go_in_as_they_are(server: Server) -> None:
    templated = post(server, {"messages": [{"role": "user", "content": STORY}]}, "/tokenize").json()["tokens"]
    common = {**GREEDY, "return_usage": True}
    by_text = ask(server, text=STORY, **common)
    by_messages = ask(server, messages=[{"role": "user", "content": STORY}], **common)
    by_ids = ask(server, input_ids=templated, **common)
    for answer in (by_text, by_messages, by_ids):
        assert answer["tokens_all"] == by_text["tokens_all"]
        assert answer["usage"]["prompt_tokens"] == len(templated)
    bare = ask(server, input_ids=tokens_of(server, STORY), max_dec_len=2, return_usage=True)
    assert bare["usage"]["prompt_tokens"] == len(tokens_of(server, STORY))


def test_system_is_a_message_before_the_text(server: Server) -> None:
    pair = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": STORY}]
    common = {**GREEDY, "return_usage": True, "max_dec_len": 20}
    by_messages = ask(server, messages=pair, **common)
    for given in ({"text": STORY}, {"messages": pair[1:]}):
        answer = ask(server, system="Be brief.", **given, **common)
        assert answer["usage"]["prompt_tokens"] == by_messages["usage"]["prompt_tokens"]
        assert answer["tokens_all"] == by_messages["tokens_all"]


@pytest.mark.parametrize("dialect", ["fastdeploy", "openai"])
def test_system_may_come_second(server: Server, dialect: str) -> None:
    messages = [
        {"role": "user", "content": "Hello, who are you"},
        {"role": "system", "content": "I'm a helpful AI assistant."},
        {"role": "user", "content": "List 3 countries and their capitals."},
    ]
    assert post(server, {"messages": messages, "response_type": dialect, "max_tokens": 4}).status_code == 200


# ---- lengths


@pytest.mark.parametrize("name", ["max_dec_len", "seq_len", "max_tokens"])
def test_each_name_of_max_dec_len_bounds_the_answer(server: Server, name: str) -> None:
    answer = ask(server, text=STORY, **{name: 3})
    assert (answer["tokens_all_num"], answer["finish_reason"]) == (3, "length")


@pytest.mark.parametrize(
    "pair",
    [
        {"max_dec_len": 5, "seq_len": 5},
        {"max_dec_len": 5, "max_tokens": 5},
        {"seq_len": 5, "max_tokens": 6},
        {"topp": 0.5, "top_p": 0.5},
        {"infer_seed": 1, "seed": 1},
    ],
)
def test_two_names_of_one_field_are_an_error(server: Server, pair: dict[str, float]) -> None:
    message = native_error(post(server, {"text": "x", **pair}), 400)
    assert any(name in message for name in pair)


def test_an_alias_beside_a_null_is_no_conflict(server: Server) -> None:
    assert ask(server, text=STORY, max_dec_len=None, seq_len=2, max_tokens=None)["tokens_all_num"] == 2


def test_min_dec_len_keeps_an_answer_going(server: Server, story: list[dict[str, Any]]) -> None:
    natural = story[-1]["tokens_all_num"]
    longer = ask(
        server, text=STORY, min_dec_len=natural + 20, max_dec_len=natural + 40, return_all_tokens=True, **GREEDY
    )
    assert longer["tokens_all_num"] >= natural + 20
    assert longer["tokens_all"].startswith(story[-1]["tokens_all"])
    exact = ask(server, text=STORY, min_dec_len=natural + 20, max_dec_len=natural + 20, return_usage=True, **GREEDY)
    assert exact["usage"]["completion_tokens"] == exact["tokens_all_num"] == natural + 20
    assert exact["finish_reason"] == "length"


def test_min_dec_len_counts_what_was_sampled_and_then_lets_go(server: Server, story: list[dict[str, Any]]) -> None:
    natural = story[-1]["tokens_all_num"]
    assert ask(server, text=STORY, min_dec_len=natural, **GREEDY)["tokens_all"] == story[-1]["tokens_all"]


# ---- sampling


def test_temperature_zero_topp_zero_and_top_k_one_are_greedy(server: Server, story: list[dict[str, Any]]) -> None:
    for fields in (
        {"temperature": 0},
        {"topp": 0, "temperature": 5},
        {"top_p": 0, "temperature": 5},
        {"top_k": 1, "temperature": 5},
    ):
        for seed in (1, 2):
            assert ask(server, text=STORY, infer_seed=seed, **fields)["tokens_all"] == story[-1]["tokens_all"]


def test_temperature_and_topp_widen_the_choice(server: Server, story: list[dict[str, Any]]) -> None:
    wide = ask(server, text=STORY, infer_seed=3, max_dec_len=30, **WILD)["tokens_all"]
    assert wide != ask(server, text=STORY, infer_seed=3, max_dec_len=30, temperature=3.0, topp=0.1)["tokens_all"]
    assert wide != story[-1]["tokens_all"][: len(wide)]


def test_top_k_narrows_the_choice(server: Server) -> None:
    common = {"text": STORY, "infer_seed": 5, "max_dec_len": 30, **WILD}
    off = ask(server, **common)["tokens_all"]
    assert ask(server, top_k=0, **common)["tokens_all"] == off
    assert ask(server, top_k=-1, **common)["tokens_all"] == off
    assert ask(server, top_k=2, **common)["tokens_all"] != off


@pytest.mark.parametrize("name", ["infer_seed", "seed"])
@pytest.mark.parametrize("seed", [0, 7, -1, 2**64 - 1, -(2**63)])
def test_a_seed_repeats_an_answer(server: Server, name: str, seed: int) -> None:
    first, second = (ask(server, text=STORY, max_dec_len=20, **{name: seed}, **WILD) for _ in range(2))
    assert first["tokens_all"] == second["tokens_all"]
    other = ask(server, text=STORY, max_dec_len=20, **{name: 99}, **WILD)
    assert other["tokens_all"] != first["tokens_all"]


def test_the_seed_that_a_stream_names_repeats_it(server: Server) -> None:
    first = stream(server, text=STORY, max_dec_len=20, **WILD)
    assert check_native_stream(first)["infer_seed"] >= 0
    again = stream(server, text=STORY, max_dec_len=20, infer_seed=first[0]["infer_seed"], **WILD)
    assert again[-1]["tokens_all"] == first[-1]["tokens_all"]
    fresh = stream(server, text=STORY, max_dec_len=20, **WILD)
    assert fresh[0]["infer_seed"] != first[0]["infer_seed"]


@pytest.mark.parametrize("field", [{"frequency_score": 2.0}, {"presence_score": 2.0}, {"penalty_score": 2.0}])
def test_each_penalty_makes_repeats_rarer(server: Server, field: dict[str, float]) -> None:
    def repeats(**fields: float) -> int:
        answer = ask(server, text=STORY, min_dec_len=300, max_dec_len=300, return_all_tokens=True, **GREEDY, **fields)
        return 300 - len(set(answer["tokens_all_ids"]))

    assert repeats(**field) < repeats()


def test_a_penalty_below_its_neutral_value_makes_repeats_commoner(server: Server) -> None:
    def kinds(**fields: float) -> int:
        answer = ask(server, text=STORY, min_dec_len=300, max_dec_len=300, return_all_tokens=True, **GREEDY, **fields)
        return len(set(answer["tokens_all_ids"]))

    assert kinds(frequency_score=-2.0) < kinds()
    assert kinds(penalty_score=0.2) < kinds()


def test_neutral_penalties_change_nothing(server: Server, story: list[dict[str, Any]]) -> None:
    answer = ask(server, text=STORY, frequency_score=0, presence_score=0.0, penalty_score=1, **GREEDY)
    assert answer["tokens_all"] == story[-1]["tokens_all"]


# ---- ends


def test_eos_token_ids_are_added_to_the_models_own(server: Server, story: list[dict[str, Any]]) -> None:
    ids = joined(story)[1]
    for place in (1, 10):
        end = next(token for token in ids[place:] if token not in ids[:place])
        cut = ids.index(end)
        messages = stream(server, text=STORY, eos_token_ids=[end], **GREEDY)
        last = check_native_stream(messages)
        assert joined(messages)[1] == ids[:cut]
        assert (last["finish_reason"], last["usage"]["completion_tokens"]) == ("stop", cut + 1)
    unseen = next(token for token in range(300, 4096) if token not in ids)
    assert ask(server, text=STORY, eos_token_ids=[unseen], **GREEDY)["finish_reason"] == "stop"


def test_min_dec_len_holds_for_ends_that_the_request_adds(server: Server, story: list[dict[str, Any]]) -> None:
    end = joined(story)[1][5]
    answer = ask(server, text=STORY, eos_token_ids=[end], min_dec_len=20, max_dec_len=30, **GREEDY)
    assert answer["tokens_all_num"] >= 20


@pytest.mark.parametrize("width", [1, 2, 3, 7])
def test_a_stop_string_ends_and_is_not_in_the_answer(server: Server, story: list[dict[str, Any]], width: int) -> None:
    whole = story[-1]["tokens_all"]
    stop = whole[5 : 5 + width]
    cut = whole.index(stop)
    messages = stream(server, text=STORY, stop=["never to be seen", stop, whole[20:24]], **GREEDY)
    last = check_native_stream(messages)
    assert (last["tokens_all"], last["finish_reason"]) == (whole[:cut], "stop")
    assert last["usage"]["completion_tokens"] > last["tokens_all_num"]
    assert joined(messages)[1] == joined(story)[1][: last["tokens_all_num"]]
    one = ask(server, text=STORY, stop=stop, return_usage=True, **GREEDY)  # a bare string too
    assert one["tokens_all"] == whole[:cut]
    assert one["usage"]["completion_tokens"] == last["usage"]["completion_tokens"]


def test_the_earliest_of_overlapping_stop_strings_wins(server: Server, story: list[dict[str, Any]]) -> None:
    whole = story[-1]["tokens_all"]
    answer = ask(server, text=STORY, stop=[whole[7:9], whole[6:12], whole[5:8]], **GREEDY)
    assert answer["tokens_all"] == whole[:5]  # whole[5:8] is complete before the others


def test_what_only_looked_like_a_stop_string_is_given_out_late(server: Server, story: list[dict[str, Any]]) -> None:
    whole = story[-1]["tokens_all"]
    near = whole[4:8] + "☃"
    messages = stream(server, text=STORY, stop=near, **GREEDY)
    assert check_native_stream(messages)["tokens_all"] == whole
    late = next(item for item in messages if whole[4:8] in item["token"])
    assert len(late["token_ids"]) > 4 - 1
    assert joined(messages)[1] == joined(story)[1]


def test_text_held_back_at_the_end_is_given_out_when_the_length_ends_it(
    server: Server, story: list[dict[str, Any]]
) -> None:
    whole = story[-1]["tokens_all"]
    messages = stream(server, text=STORY, stop=whole[:30], max_dec_len=6, **GREEDY)
    last = check_native_stream(messages)
    assert (last["finish_reason"], last["tokens_all_num"], len(messages)) == ("length", 6, 1)
    assert last["tokens_all"] == ask(server, text=STORY, max_dec_len=6, **GREEDY)["tokens_all"]
    assert joined(messages)[1] == joined(story)[1][:6]


def test_a_stop_string_in_the_prompt_stops_nothing(server: Server, story: list[dict[str, Any]]) -> None:
    assert STORY not in story[-1]["tokens_all"]
    assert ask(server, text=STORY, stop=STORY, **GREEDY)["tokens_all"] == story[-1]["tokens_all"]


# ---- extras of the answer


def test_usage_times_and_all_tokens_come_when_asked(server: Server, story: list[dict[str, Any]]) -> None:
    answer = ask(server, text=STORY, return_usage=True, return_all_tokens=True, benchmark=True, **GREEDY)
    assert answer["usage"]["completion_tokens"] == answer["tokens_all_num"] + 1
    assert answer["tokens_all_ids"] == joined(story)[1]
    assert 0 <= answer["times"]["queue_s"] <= answer["times"]["ttft_s"] <= answer["times"]["e2e_s"] < 30
    plain = ask(server, text=STORY, **GREEDY)
    assert not {"usage", "times", "tokens_all_ids"} & set(plain)
    false = ask(server, text=STORY, return_usage=False, benchmark=False, return_all_tokens=False, **GREEDY)
    assert set(false) == set(plain)


def test_null_counts_as_absent_in_every_field(server: Server, story: list[dict[str, Any]]) -> None:
    names = (
        "messages input_ids req_id max_dec_len min_dec_len topp frequency_score presence_score penalty_score top_k "
        "infer_seed seed eos_token_ids stop stream timeout return_usage return_all_tokens system benchmark "
        "response_type seq_len max_tokens top_p logprobs n"
    )
    answer = post(server, {**dict.fromkeys(names.split()), "text": STORY, **GREEDY})
    assert answer.status_code == 200, answer.text
    assert answer.json()["tokens_all"] == story[-1]["tokens_all"]


# ---- timeout, abort, req_id


def test_a_timeout_before_the_answer_is_408(server: Server) -> None:
    answer = post(server, {"text": STORY, "req_id": "late", "timeout": 0.1, **LONG})
    native_error(answer, 408)
    assert answer.headers["x-should-retry"] == "false"


def test_a_timeout_within_a_stream_is_its_last_line(server: Server) -> None:
    *messages, last = stream(server, text=STORY, req_id="late", timeout=1, **LONG)
    assert [item["send_idx"] for item in messages] == list(range(len(messages)))
    assert all(item["is_end"] == 0 for item in messages)
    assert last["error_code"] == 408
    assert last["error_msg"]
    assert last["req_id"] == "late"


def test_an_abort_ends_an_answer_that_is_not_streamed(server: Server) -> None:
    got: list[httpx.Response] = []
    reader = threading.Thread(target=lambda: got.append(post(server, {"text": STORY, "req_id": "to-end", **LONG})))
    reader.start()
    time.sleep(0.2)
    assert ask(server, "/v1/abort", req_id="to-end")["aborted"] is True
    reader.join(10)
    (answer,) = got
    if answer.status_code == 200:
        assert answer.json()["finish_reason"] == "cancelled"
    else:
        native_error(answer, 499)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_req_id_is_free_before_its_last_message_leaves(server: Server, streamed: bool) -> None:
    with httpx.Client(base_url=server.gateway, timeout=30) as client:
        for _ in range(25):
            body = {"text": STORY, "req_id": "again", "stream": streamed, "max_dec_len": 2}
            with client.stream("POST", CHAT, json=body) as response:
                assert response.status_code == 200
                last = [line for line in response.iter_lines()][-1]
                assert json.loads(last)["finish_reason"] == "length"


def test_a_req_id_in_flight_is_409_in_both_dialects(server: Server) -> None:
    body = {"text": STORY, "req_id": "busy", "stream": True, **LONG}
    with httpx.stream("POST", f"{server.gateway}{CHAT}", json=body, timeout=60) as response:
        lines = response.iter_lines()  # kept: dropping it would close the stream
        next(lines)
        answer = post(server, {"text": "x", "req_id": "busy"})
        assert "busy" in native_error(answer, 409)
        assert answer.headers["x-should-retry"] == "false"
        streamed = post(server, {"text": "x", "req_id": "busy", "stream": True})
        native_error(streamed, 409)
        openai = post(server, {"text": "x", "req_id": "busy", "response_type": "openai"})
        assert openai.status_code == 409
        assert "error" in openai.json()
