"""The closed list of errors on HTTP, its shapes and headers; health and metrics of the running server."""

from __future__ import annotations

import json
import re
import socket
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.conftest import Server
from server.contract_calls import CHAT, COMPLETIONS, STORY, ask, native_error, openai_error, post

pytestmark = pytest.mark.server

GENERATION = (CHAT, COMPLETIONS, "/v1/chat/completions/completions", "/v1/chat/completions/chat/completions")
MESSAGES = [{"role": "user", "content": STORY}]


@pytest.mark.parametrize("path", GENERATION)
@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"5", b"null", b'"x"', b"\xff", b'{"text": NaN}', b"[" * 5000, b"{}"]
)
def test_what_is_no_json_object_is_400_with_one_json_object(server: Server, path: str, body: bytes) -> None:
    answer = httpx.post(
        f"{server.gateway}{path}", content=body, headers={"content-type": "application/json"}, timeout=10
    )
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/json"
    value = answer.json()
    if path in GENERATION[2:]:
        openai_error(answer, 400)
    else:
        assert value.get("error_code") == 400 or "error" in value
    assert "Traceback" not in answer.text


def test_the_content_type_of_a_body_does_not_matter(server: Server) -> None:
    body = json.dumps({"text": STORY, "max_dec_len": 1})
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        answer = httpx.post(f"{server.gateway}{CHAT}", content=body, headers={"content-type": kind}, timeout=10)
        assert answer.status_code == 200


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_dec_len": "9"}, "max_dec_len must be a whole number, not a string"),
        ({"max_dec_len": 0}, "max_dec_len (0)"),
        ({"max_dec_len": 2.5}, "max_dec_len (2.5)"),
        ({"max_dec_len": True}, "max_dec_len must be a whole number, not a boolean"),
        ({"seq_len": [1]}, "seq_len must be a whole number, not a list"),
        ({"min_dec_len": 0}, "min_dec_len (0)"),
        ({"min_dec_len": 9, "max_dec_len": 8}, "min_dec_len (9) exceeds max_dec_len (8)"),
        ({"topp": 1.01}, "topp (1.01) must be in [0, 1]"),
        ({"top_p": -0.1}, "top_p (-0.1) must be in [0, 1]"),
        ({"temperature": -1}, "temperature (-1)"),
        ({"temperature": {}}, "temperature must be a number, not an object"),
        ({"frequency_score": 2.5}, "frequency_score (2.5) must be in [-2, 2]"),
        ({"presence_score": -3}, "presence_score (-3) must be in [-2, 2]"),
        ({"penalty_score": 0}, "penalty_score (0) must be in (0, 2]"),
        ({"penalty_score": 2.1}, "penalty_score (2.1) must be in (0, 2]"),
        ({"top_k": -2}, "top_k (-2)"),
        ({"infer_seed": 2**64}, "18446744073709551615"),
        ({"seed": "a"}, "seed must be a whole number, not a string"),
        ({"eos_token_ids": [4096]}, "4096"),
        ({"eos_token_ids": ["a"]}, "eos_token_ids[0] must be a whole number, not a string"),
        ({"stop": 5}, "stop must be a string, not a number"),
        ({"stop": [""]}, "stop[0] has 0 characters"),
        ({"stop": ["x"] * 17}, "stop has 17 entries; at most 16"),
        ({"stop": "x" * 257}, "stop has 257 characters"),
        ({"timeout": 0}, "timeout (0)"),
        ({"timeout": "5"}, "timeout must be a number, not a string"),
        ({"return_usage": "yes"}, "return_usage must be true or false, not a string"),
        ({"return_all_tokens": 1}, "return_all_tokens must be true or false, not a number"),
        ({"benchmark": 1}, "benchmark must be true or false, not a number"),
        ({"stream": "yes"}, "stream must be true or false, not a string"),
        ({"system": 5}, "system must be a string, not a number"),
        ({"req_id": 5}, "req_id must be a string of 1 to 256 characters, not a number"),
        ({"req_id": "x" * 257}, "req_id has 257 characters"),
        ({"req_id": ""}, "req_id has 0 characters"),
        ({"text": 5}, "text must be a string, not a number"),
        ({"text": None, "messages": "x"}, "messages must be a list, not a string"),
        ({"text": None, "messages": []}, "messages"),
        ({"text": None, "messages": [{"role": "king", "content": "x"}]}, "messages[0].role ('king')"),
        ({"text": None, "messages": [{"role": "user", "content": 5}]}, "messages[0].content must be"),
        ({"text": None, "messages": [{"content": "x"}]}, "messages[0].role"),
        ({"text": None, "messages": ["x"]}, "messages[0] must be an object"),
        ({"text": None, "input_ids": []}, "input_ids"),
        ({"text": None, "input_ids": [1.5]}, "input_ids[0] (1.5)"),
        ({"text": None, "input_ids": [-1]}, "input_ids[0] (-1)"),
        ({"text": None, "input_ids": [4096]}, "4096"),
        ({"text": None, "input_ids": "abc"}, "input_ids must be a list, not a string"),
    ],
)
def test_a_message_names_the_field_the_value_and_the_limit(server: Server, fields: dict[str, Any], words: str) -> None:
    body = {"text": STORY, "req_id": "bad", **fields}
    assert words in native_error(post(server, body), 400)


def test_long_values_are_not_echoed(server: Server) -> None:
    for fields in ({"temperature": "x" * 5000}, {"response_type": "x" * 5000}, {"messages": [{"role": "x" * 5000}]}):
        assert len(native_error(post(server, {"req_id": "b", **fields}), 400)) < 400


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/nothing"), ("POST", "/v1/embeddings"), ("GET", "/v1/models/none")]
)
def test_an_unknown_route_or_model_is_404(server: Server, method: str, path: str) -> None:
    answer = httpx.request(method, f"{server.gateway}{path}", timeout=10)
    assert answer.status_code == 404
    assert "error" in answer.json()


def test_no_status_is_outside_the_list(server: Server) -> None:
    """422 never, whatever is wrong."""
    allowed = {200, 400, 401, 404, 408, 409, 413, 429, 499, 500, 503}
    bodies: list[object] = [{}, [], None, {"messages": 5}, {"model": 5}, {"prompt": {}}, {"stream": {}}, {"req_id": []}]
    for path in (*GENERATION, "/tokenize", "/detokenize", "/v1/abort"):
        for body in bodies:
            status = post(server, body, path).status_code
            assert status in allowed - {200, 500}


def test_the_package_raises_its_own_errors_and_does_not_retry_conflicts(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.gateway}/v1", api_key="k", max_retries=5)
    body = {"text": STORY, "req_id": "taken", "stream": True, "max_dec_len": 8000, "min_dec_len": 8000}
    with httpx.stream("POST", f"{server.gateway}{CHAT}", json=body, timeout=60) as response:
        lines = response.iter_lines()  # kept: dropping it would close the stream
        next(lines)
        extra = {"req_id": "taken", "response_type": "openai"}
        with pytest.raises(openai.ConflictError):
            client.chat.completions.create(model="m", messages=MESSAGES, extra_body=extra)


def test_an_error_within_an_openai_stream_is_an_event_that_the_package_raises(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.gateway}/v1", api_key="k", max_retries=0)
    extra = {"response_type": "openai", "timeout": 1, "max_dec_len": 8000, "min_dec_len": 8000}
    stream = client.chat.completions.create(model="m", messages=MESSAGES, stream=True, extra_body=extra)
    chunks = iter(stream)
    assert [next(chunks).choices[0].index for _ in range(3)] == [0, 0, 0]
    with pytest.raises(openai.APIError) as caught:
        list(chunks)
    assert "(1 s)" in str(caught.value)
    raw = post(server, {"text": STORY, "stream": True, **extra}).text
    *_, last, done = raw.strip().split("\n\n")
    assert done == "data: [DONE]"
    event = json.loads(last.removeprefix("data: "))
    assert set(event["error"]) >= {"message", "type", "param", "code"}
    assert event["error"]["type"] == "timeout_error"


def test_control_characters_of_headers_and_ids_do_no_harm(server: Server) -> None:
    answer = post(server, {"text": STORY, "req_id": "a\nb\x1b[31m", "max_dec_len": 1})
    assert answer.json()["req_id"] == "a\nb\x1b[31m"
    shown = post(server, {"text": STORY, "max_dec_len": 1}, **{"x-request-id": "a b\t<c>"}).headers["x-request-id"]
    assert re.fullmatch(r"[A-Za-z0-9._:\-]+", shown)
    for log in server.run_dir.rglob("*.log"):
        assert "\x1b[31m" not in log.read_text(errors="replace")


def test_a_header_without_an_end_is_cut_off(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port("PUSH_MODE_HTTP_PORT")), timeout=20) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nx: ")
        try:
            for _ in range(300):
                connection.sendall(b"a" * 1024)
            answer = connection.recv(65536)
        except OSError:
            answer = b""
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")


# ---- health and metrics


def test_health_has_states_reasons_and_progress(server: Server) -> None:
    for route in ("live", "ready"):
        assert httpx.get(f"{server.health}/v2/health/{route}", timeout=5).status_code == 200
    body = httpx.get(f"{server.health}/v2/health", timeout=5).json()
    assert {"state", "reason", "progress"} <= set(body)
    assert body["progress"]["fraction"] == 1.0
    assert httpx.get(f"{server.gateway}/health", timeout=5).json()["status"] == "ready"


def metrics(server: Server) -> dict[str, float]:
    """Sum of every sample by name."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(server.metrics, timeout=10).text):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums


@pytest.mark.parametrize(
    "words",
    [
        *("nv_", "octavo_requests_running", "octavo_requests_waiting", "octavo_.*block", "octavo_.*preempt"),
        *("octavo_time_to_first_token.*_bucket|octavo_ttft.*_bucket", "octavo_(inter_token|itl).*_bucket"),
        *(
            "octavo_(e2e|request).*_bucket",
            "octavo_.*queue_time.*_bucket",
            "octavo_.*token.*total",
            "octavo_.*prefix.*",
        ),
        *(
            "octavo_.*restart",
            "octavo_request_success_total",
            "batch_size$",
            "block_num$",
            "max_batch_size$",
            "max_block_num$",
        ),
        *("available_resource$", "vllm:num_requests_running", "vllm:num_requests_waiting"),
        *("vllm:time_to_first_token_seconds_bucket", "vllm:e2e_request_latency_seconds_bucket"),
        *("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total"),
        *("vllm:(gpu|kv)_cache_usage_perc", "vllm:request_queue_time_seconds_bucket"),
    ],
)
def test_the_metrics_page_has(server: Server, words: str) -> None:
    names = metrics(server)
    assert any(re.match(words, name) for name in names), sorted(name for name in names if name.startswith("octavo"))


def test_one_request_moves_the_counters_by_itself(server: Server) -> None:
    before = metrics(server)
    answer = ask(server, text=STORY, max_dec_len=7, ignore_eos=True, return_usage=True)
    after = metrics(server)
    for name, step in (
        ("vllm:generation_tokens_total", 7),
        ("vllm:prompt_tokens_total", answer["usage"]["prompt_tokens"]),
        ("vllm:request_success_total", 1),
        ("vllm:e2e_request_latency_seconds_count", 1),
        ("vllm:time_to_first_token_seconds_count", 1),
        ("vllm:request_queue_time_seconds_count", 1),
    ):
        assert after[name] - before.get(name, 0) == step, name
