"""How the contract tests speak to a server: plain HTTP and tritonclient, nothing of the product's own code."""

from __future__ import annotations

import json
import queue
import re
from functools import partial
from typing import Any

import httpx
import numpy as np
import tritonclient.grpc as grpcclient

from server.conftest import Server

STORY = "写一个故事"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
LONG = {"max_dec_len": 8000, "min_dec_len": 8000}  # runs until it is stopped
WILD = {"temperature": 3.0, "topp": 1.0}  # any token, split characters too
Json = dict[str, Any]


def post(server: Server, body: object, path: str = CHAT, **headers: str) -> httpx.Response:
    # verify=False: plain HTTP, and reading certificates would take longer than the request
    return httpx.post(f"{server.gateway}{path}", json=body, headers=headers, timeout=60, verify=False)


def ask(server: Server, path: str = CHAT, **body: object) -> Json:
    """The one object of an answer that is not streamed and must be good."""
    answer = post(server, body, path)
    assert answer.status_code == 200, answer.text
    return answer.json()


def lines_of(text: str) -> list[Json]:
    """Every line is an object: no blank line, no prefix, and the last line ends too."""
    assert text.endswith("\n")
    return [json.loads(line) for line in text[:-1].split("\n")]


def stream(server: Server, path: str = CHAT, **body: object) -> list[Json]:
    answer = post(server, {**body, "stream": True}, path)
    assert answer.status_code == 200, answer.text
    return lines_of(answer.text)


def events(server: Server, path: str = CHAT, **body: object) -> list[Json]:
    """The chunks of a server-sent stream, checked for its framing; [DONE] is taken off."""
    answer = post(server, {"model": "default", **body, "stream": True}, path)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    parts = answer.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    assert all(re.fullmatch(r"data: \{.*\}", part) for part in parts[:-2])
    return [json.loads(part[6:]) for part in parts[:-2]]


def triton(server: Server, request: object, *, request_id: str = "", as_list: bool = True) -> list[Any]:
    """The decoded OUT of every response up to the one with the FINAL flag, and no further."""
    results: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with grpcclient.InferenceServerClient(server.grpc) as client:
        client.start_stream(callback=partial(lambda into, result, error: into.put((result, error)), results))
        tensor = grpcclient.InferInput("IN", [1], "BYTES")
        text = request if isinstance(request, str) else json.dumps([request] if as_list else request)
        tensor.set_data_from_numpy(np.array([text], dtype=np.object_))
        client.async_stream_infer("model", [tensor], request_id=request_id)
        out = []
        while True:
            result, error = results.get(timeout=60)
            assert error is None, error
            out.append(json.loads(result.as_numpy("OUT")[0]))
            if result.get_response().parameters["triton_final_response"].bool_param:
                return out


def tokens_of(server: Server, text: str, *, add_special_tokens: bool = False) -> list[int]:
    body = {"prompt": text, "add_special_tokens": add_special_tokens}
    return post(server, body, "/tokenize").json()["tokens"]


def joined(messages: list[Json]) -> tuple[str, list[int]]:
    return "".join(item["token"] for item in messages), [one for item in messages for one in item["token_ids"]]


def check_native_stream(messages: list[Json], *, start: int = 0) -> Json:
    """What holds for every good stream of one choice; the last message."""
    last = messages[-1]
    assert [item["send_idx"] for item in messages] == list(range(start, start + len(messages)))
    assert [item["is_end"] for item in messages] == [0] * (len(messages) - 1) + [1]
    assert len({(item["req_id"], item["infer_seed"]) for item in messages}) == 1
    assert last["finish_reason"] in ("stop", "length", "cancelled")
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + last["usage"]["completion_tokens"]
    if not start:
        assert joined(messages)[0] == last["tokens_all"]
        assert len(joined(messages)[1]) == last["tokens_all_num"]
    return last


def openai_error(answer: httpx.Response, status: int) -> Json:
    """The error object of the OpenAI dialect, checked for its shape."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def native_error(answer: httpx.Response, status: int) -> str:
    """The message of the native dialect's error, checked for its shape."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body["error_code"] == status
    assert body["error_msg"]
    assert "Traceback" not in answer.text
    return body["error_msg"]
