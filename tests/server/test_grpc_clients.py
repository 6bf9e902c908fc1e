"""Clients of the Triton interface: model `model`, IN, OUT, decoupled streams."""

from __future__ import annotations

import json
import queue
from functools import partial

import numpy as np
import pytest
import tritonclient.grpc as grpcclient

from octavo_client import Client, InvalidRequest, Options
from server.conftest import Server

pytestmark = pytest.mark.server


def infer(server: Server, request: dict[str, object], *, request_id: str = "") -> list[object]:
    """The decoded OUT of every response of one request, as tritonclient users write it."""
    results: queue.Queue[tuple[object, object]] = queue.Queue()
    with grpcclient.InferenceServerClient(server.grpc) as client:
        client.start_stream(callback=partial(lambda into, result, error: into.put((result, error)), results))
        tensor = grpcclient.InferInput("IN", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([json.dumps([request])], dtype=np.object_))
        client.async_stream_infer("model", [tensor], request_id=request_id)
        out = []
        while True:
            result, error = results.get(timeout=60)
            assert error is None, error
            value = json.loads(result.as_numpy("OUT")[0])
            out.append(value)
            if isinstance(value, dict) or value[0].get("is_end") == 1:
                final = result.get_response().parameters["triton_final_response"].bool_param
                assert final
                return out


def test_a_stream_of_tokens_ends_with_is_end_and_the_final_flag(server: Server) -> None:
    answer = infer(server, {"req_id": "one", "text": "hello, llm", "max_dec_len": 32, "temperature": 0})
    messages = [item[0] for item in answer]
    assert all("error_msg" not in message for message in messages)
    assert [message["send_idx"] for message in messages] == list(range(len(messages)))
    assert "".join(message["token"] for message in messages) == messages[-1]["tokens_all"]
    assert sum(len(message["token_ids"]) for message in messages) == messages[-1]["tokens_all_num"]
    assert all(message["req_id"] == "one" for message in messages)


def test_the_triton_request_id_is_the_req_id(server: Server) -> None:
    answer = infer(server, {"text": "hello, llm", "max_dec_len": 2}, request_id="from-triton")
    assert answer[0][0]["req_id"] == "from-triton"


def test_an_error_is_a_bare_object(server: Server) -> None:
    (answer,) = infer(server, {"req_id": "e", "text": "x", "max_dec_len": 1_000_000})
    assert isinstance(answer, dict)
    assert answer["error_code"] == 400
    assert "max_dec_len (1000000) exceeds MAX_DEC_LEN (8000)" in answer["error_msg"]


def test_the_client_library_gives_the_same_bytes_over_both_roads(server: Server) -> None:
    options = Options(infer_seed=11, temperature=1.5, max_dec_len=48)
    with Client(f"grpc://{server.grpc}") as over_grpc, Client(server.gateway) as over_http:
        answers = [client.generate("写一个故事", options=options) for client in (over_grpc, over_http)]
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].text == answers[1].text


def test_a_request_goes_on_from_the_tokens_already_received(server: Server) -> None:
    base = {"text": "写一个故事", "infer_seed": 4, "temperature": 1.2, "max_dec_len": 40}
    whole = [item[0] for item in infer(server, {**base, "req_id": "whole"})]
    for cut in (1, len(whole) // 2, len(whole) - 1):
        held = [token for message in whole[:cut] for token in message["token_ids"]]
        rest = infer(server, {**base, "req_id": "rest", "generated_token_ids": held, "send_idx": cut, "attempt": 1})
        messages = [item[0] for item in rest]
        assert messages[0]["send_idx"] == cut
        text = "".join(message["token"] for message in whole[:cut] + messages)
        assert text == whole[-1]["tokens_all"] == messages[-1]["tokens_all"]
        assert messages[-1]["usage"] == whole[-1]["usage"] | {
            "prompt_tokens_details": messages[-1]["usage"].get("prompt_tokens_details")
        }


def test_the_library_raises_what_the_server_says(server: Server) -> None:
    with Client(f"grpc://{server.grpc}") as client, pytest.raises(InvalidRequest, match="topp"):
        client.generate("x", options=Options(topp=1.5))
