"""Health and metrics of the running server on their own ports."""

from __future__ import annotations

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.conftest import Server

pytestmark = pytest.mark.server

EXPECTED = {
    "octavo_requests_running",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:time_to_first_token_seconds",
    "vllm:generation_tokens",
    "batch_size",
    "block_num",
    "max_batch_size",
    "max_block_num",
    "available_resource",
}


def test_one_page_has_ours_tritons_and_the_common_names(server: Server) -> None:
    httpx.post(f"{server.gateway}/v1/chat/completions", json={"text": "hello, llm"}, timeout=60)
    page = httpx.get(server.metrics, timeout=10).text
    names = {family.name for family in text_string_to_metric_families(page)}
    assert names >= EXPECTED, EXPECTED - names
    assert any(name.startswith("nv_") for name in names)


def test_counters_count(server: Server) -> None:
    def generated() -> float:
        families = text_string_to_metric_families(httpx.get(server.metrics, timeout=10).text)
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == "vllm:generation_tokens_total"
        )

    before = generated()
    answer = httpx.post(
        f"{server.gateway}/v1/chat/completions",
        timeout=60,
        json={"text": "hello, llm", "max_dec_len": 5, "ignore_eos": True, "return_usage": True},
    ).json()
    assert answer["usage"]["completion_tokens"] == 5
    assert generated() - before == 5


def test_health_tells_states_and_reasons(server: Server) -> None:
    body = httpx.get(f"{server.health}/v2/health", timeout=5).json()
    assert body["state"] == "ready"
    assert httpx.get(f"{server.gateway}/health", timeout=5).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 400, "text"),
        ({"text": "x", "max_dec_len": 9000}, 400, "max_dec_len (9000) exceeds MAX_DEC_LEN (8000)"),
        ({"text": "x", "topp": 2}, 400, "topp"),
        ({"text": "x", "temperature": "hot"}, 400, "temperature"),
        ({"text": "x", "max_dec_len": 5, "seq_len": 5}, 400, "seq_len"),
        ({"messages": [{"role": "king", "content": "x"}], "req_id": "k"}, 400, "role"),
        ({"input_ids": [10**9]}, 400, "input_ids"),
        ({"input_ids": [5] * 9000}, 400, "MAX_SEQ_LEN (8192)"),
    ],
)
def test_a_refusal_names_the_field_and_the_limit(
    server: Server, body: dict[str, object], status: int, words: str
) -> None:
    answer = httpx.post(f"{server.gateway}/v1/chat/completions", json=body, timeout=30)
    assert answer.status_code == status
    assert answer.json()["error_code"] == status
    assert words in answer.json()["error_msg"]


def test_what_is_not_json_or_too_large_or_unknown(server: Server) -> None:
    url = f"{server.gateway}/v1/chat/completions"
    assert httpx.post(url, content=b"{", timeout=10).status_code == 400
    assert httpx.post(url, content=b'{"text":"' + b"x" * (5 << 20) + b'"}', timeout=10).status_code == 413
    assert httpx.get(f"{server.gateway}/nothing", timeout=10).status_code == 404
