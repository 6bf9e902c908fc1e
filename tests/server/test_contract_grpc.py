"""The Triton interface, sentence by sentence, with plain tritonclient."""

from __future__ import annotations

import json
import uuid

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from server.conftest import Server
from server.contract_calls import STORY, check_native_stream, joined, tokens_of, triton

pytestmark = pytest.mark.server


def test_the_model_is_decoupled_with_one_string_in_and_one_out(server: Server) -> None:
    with grpcclient.InferenceServerClient(server.grpc) as client:
        assert client.is_server_live()
        assert client.is_model_ready("model")
        metadata = client.get_model_metadata("model", as_json=True)
    for side, name in (("inputs", "IN"), ("outputs", "OUT")):
        (tensor,) = metadata[side]
        assert (tensor["name"], tensor["datatype"], tensor["shape"]) == (name, "BYTES", ["1"])


@pytest.mark.parametrize("protocol", ["repository", "config", "shared memory", "trace", "log"])
def test_restricted_protocols_are_closed(server: Server, protocol: str) -> None:
    with grpcclient.InferenceServerClient(server.grpc) as client, pytest.raises(InferenceServerException):
        {
            "repository": client.get_model_repository_index,
            "config": lambda: client.get_model_config("model"),
            "shared memory": client.get_system_shared_memory_status,
            "trace": client.get_trace_settings,
            "log": client.get_log_settings,
        }[protocol]()


def test_every_message_is_a_list_of_one_object_without_error_msg(server: Server) -> None:
    answer = triton(server, {"req_id": "g", "text": STORY, "max_dec_len": 9, "temperature": 0})
    assert all(isinstance(item, list) and len(item) == 1 for item in answer)
    messages = [item[0] for item in answer]
    assert not any({"error_msg", "error_code"} & set(item) for item in messages)
    last = check_native_stream(messages)
    assert (last["req_id"], last["finish_reason"], last["tokens_all_num"]) == ("g", "length", 9)


def test_a_bare_object_is_taken_too(server: Server) -> None:
    answer = triton(server, {"req_id": "b", "text": STORY, "max_dec_len": 2}, as_list=False)
    assert answer[-1][0]["tokens_all_num"] == 2


def test_stream_false_changes_nothing_here(server: Server) -> None:
    body = {"req_id": "s", "text": STORY, "max_dec_len": 4000, "ignore_eos": True, "stream": False}
    assert len(triton(server, body)) > 2  # a sender that is behind joins tokens, but never seconds of them


def test_a_req_id_is_needed_and_the_triton_id_is_one(server: Server) -> None:
    (error,) = triton(server, {"text": STORY})
    assert error["error_code"] == 400
    assert "req_id" in error["error_msg"]
    assert triton(server, {"text": STORY, "max_dec_len": 1}, request_id="t")[0][0]["req_id"] == "t"


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ("{", "JSON"),
        ("[]", "one"),
        ('[{"req_id":"a","text":"x"},{"req_id":"b","text":"x"}]', "one"),
        ("5", "object"),
        ('[{"req_id":"a"}]', "text"),
        ('[{"req_id":"a","text":"x","topp":7}]', "topp (7)"),
        ('[{"op":"fly"}]', "op"),
    ],
)
def test_an_error_is_one_bare_object_with_the_final_flag(server: Server, body: str, word: str) -> None:
    (error,) = triton(server, body)
    assert isinstance(error, dict)
    assert error["error_code"] == 400
    assert word in error["error_msg"]


def test_a_body_over_the_limit_is_413(server: Server) -> None:
    (error,) = triton(server, {"req_id": "a", "text": "x" * (5 << 20)})
    assert error["error_code"] == 413
    assert "MAX_BODY_BYTES" in error["error_msg"]


def test_a_timeout_is_a_bare_object_after_the_tokens(server: Server) -> None:
    *tokens, error = triton(
        server, {"req_id": "a", "text": STORY, "max_dec_len": 8000, "min_dec_len": 8000, "timeout": 1}
    )
    assert tokens
    assert all(isinstance(item, list) for item in tokens)
    assert (error["error_code"], error["req_id"]) == (408, "a")


def test_a_req_id_can_be_used_again_as_soon_as_it_ends(server: Server) -> None:
    for _ in range(10):
        assert triton(server, {"req_id": "same", "text": STORY, "max_dec_len": 2})[-1][0]["is_end"] == 1


def test_choices_have_an_index_their_own_count_and_one_final_flag(server: Server) -> None:
    request = {"req_id": "n", "text": STORY, "n": 3, "infer_seed": 5, "temperature": 3, "topp": 1, "max_dec_len": 12}
    messages = [item[0] for item in triton(server, request)]
    texts = []
    for index in range(3):
        last = check_native_stream([item for item in messages if item["index"] == index])
        texts.append(last["tokens_all"])
    assert len(set(texts)) == 3
    alone = triton(server, {**request, "n": 1})
    assert alone[-1][0]["tokens_all"] == texts[0]
    assert all("index" not in item[0] for item in alone)


def test_logprobs_are_aligned_with_token_ids(server: Server) -> None:
    answer = triton(server, {"req_id": "l", "text": STORY, "logprobs": 2, "temperature": 0, "max_dec_len": 8})
    for (message,) in answer:
        assert [item["id"] for item in message["logprobs"]] == message["token_ids"]
        for item in message["logprobs"]:
            assert item["logprob"] <= 0
            assert [one["logprob"] for one in item["top"]] == sorted(
                (one["logprob"] for one in item["top"]), reverse=True
            )
            assert (item["rank"], item["top"][0]["id"], len(item["top"])) == (1, item["id"], 2)


def test_ops_answer_with_bare_objects(server: Server) -> None:
    (tokens,) = triton(server, {"op": "tokenize", "text": STORY})
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    (text,) = triton(server, {"op": "detokenize", "tokens": tokens_of(server, STORY)})
    assert text["text"] == STORY
    (aborted,) = triton(server, {"op": "abort", "req_id": "nobody"})
    assert aborted["aborted"] is False
    (info,) = triton(server, {"op": "info"})
    assert info["state"] == "ready"
    assert info["limits"]["max_dec_len"] == 8000


def test_a_chat_bot_class_of_this_interface_works(server: Server) -> None:
    """The loop that such classes have: async_stream_infer, then read until is_end or an error."""
    import queue
    from functools import partial

    completed: queue.Queue[object] = queue.Queue()
    req_id = str(uuid.uuid4())
    client = grpcclient.InferenceServerClient(url=server.grpc, verbose=False)
    client.start_stream(callback=partial(lambda q, result, error: q.put(error or result), completed))
    inputs = [grpcclient.InferInput("IN", [1], "BYTES")]
    body = {"req_id": req_id, "text": STORY, "seq_len": 20, "topp": 0.0, "temperature": 1.0, "penalty_score": 1.0}
    inputs[0].set_data_from_numpy(np.array([json.dumps([body])], dtype=np.object_))
    outputs = [grpcclient.InferRequestedOutput("OUT")]
    client.async_stream_infer(
        "model", inputs, outputs=outputs, request_id=req_id, sequence_start=True, sequence_end=True
    )
    messages = []
    while not messages or messages[-1]["is_end"] != 1:
        (message,) = json.loads(completed.get(timeout=30).as_numpy("OUT")[0])
        assert "error_msg" not in message
        messages.append(message)
    client.stop_stream(cancel_requests=True)
    client.close()
    assert len(joined(messages)[1]) == 20
