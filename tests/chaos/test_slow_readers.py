"""Clients that ask for streams and never read: over HTTP they cost bounded memory, over raw gRPC what they ask for (no
backpressure in Triton); nobody else notices either way.
"""

from __future__ import annotations

import contextlib
import json
import socket
import statistics
import time
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from tritonclient.grpc import service_pb2_grpc

from chaos.conftest import start
from chaos.scoreboard import Row
from chaos.victims import Victim, wait_until
from fuzz.test_bad_input import in_tensor
from server.conftest import make_server

pytestmark = [pytest.mark.server, pytest.mark.slow]

READERS, GRPC_READERS = 1000, 50
TOKENS = 400  # with 20 log probabilities each: some 600 kB, several times what the buffers of one connection hold
GROWTH_MB = {"gateway-1": 250, "triton": 250, "stub": 400, "engine": 300, "node": 50}
OWN_CHANNEL = [("grpc.use_local_subchannel_pool", 1)]
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"


def slow_body(number: int) -> dict[str, object]:
    return {
        "text": "x",
        "stream": True,
        "req_id": f"slow-{number}",
        "max_dec_len": TOKENS,
        "min_dec_len": TOKENS,
        "ignore_eos": True,
        "logprobs": 20,
        "timeout": 600,
    }


def ask_and_never_read(port: int, number: int) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", port))
    raw = json.dumps(slow_body(number)).encode()
    connection.sendall(POST % (len(raw), raw))
    return connection


def read_on(connection: socket.socket) -> list[dict[str, Any]]:
    """The lines of a reader that comes back."""
    connection.settimeout(30)
    response = HTTPResponse(connection)
    response.begin()
    return [json.loads(line) for line in response.read().splitlines()]


def check_complete(said: list[dict[str, Any]]) -> None:
    """One answer, whole, in order, ended once."""
    assert [one["send_idx"] for one in said] == list(range(len(said)))
    assert sum(one["is_end"] for one in said) == 1
    assert (said[-1]["finish_reason"], said[-1]["tokens_all_num"]) == ("length", TOKENS)
    assert sum(len(one["token_ids"]) for one in said) == TOKENS
    assert sum(len(one.get("logprobs", ())) for one in said) == TOKENS
    assert "".join(one["token"] for one in said) == said[-1]["tokens_all"]


def latency(http: httpx.Client) -> float:
    began = time.monotonic()
    answer = http.post("/v1/completions", json={"text": "x", "max_dec_len": 20, "ignore_eos": True})
    assert answer.status_code == 200, answer.text
    return time.monotonic() - began


def wait_generated(victim: Victim, count: int) -> None:
    wait_until(lambda: victim.health()["frontend"]["accepted"] >= count, seconds=60, what="all accepted")
    wait_until(lambda: engine_idle(victim), seconds=240, what="all generated")


def growth(victim: Victim, before: dict[str, int]) -> dict[str, int]:
    now = victim.footprint().memory_mb
    return {name: now[name] - before[name] for name in before}


def engine_idle(victim: Victim) -> bool:
    gauges = victim.health()["engine"]
    return not (gauges["num_running"] or gauges["num_waiting"])


def test_a_thousand_slow_readers(tmp_path: Path, row: Row) -> None:
    server = make_server(
        tmp_path, BATCH_SIZE="128", MAX_CACHED_TASK_NUM="2000", BLOCK_BS="128", MAX_DEC_LEN="1024", MAX_SEQ_LEN="256"
    )
    victim = start(server)
    http = httpx.Client(base_url=server.gateway, timeout=60, trust_env=False)
    try:
        before, calm = victim.footprint(), statistics.median(latency(http) for _ in range(15))
        with contextlib.ExitStack() as opened:
            port = server.port("PUSH_MODE_HTTP_PORT")
            readers = [
                opened.enter_context(contextlib.closing(ask_and_never_read(port, number))) for number in range(READERS)
            ]
            row.streams = READERS
            wait_generated(victim, READERS)
            beside = statistics.median(latency(http) for _ in range(15))
            memory = growth(victim, before.memory_mb)
            print(f"latency {calm * 1e3:.0f} ms alone, {beside * 1e3:.0f} ms beside; growth in MB: {memory}")
            print("front end:", victim.health()["frontend"])
            assert beside <= 3 * calm + 0.1
            assert all(memory[name] <= most for name, most in GROWTH_MB.items() if name in memory), memory
            for number in (0, READERS // 2, READERS - 1):
                check_complete(read_on(readers[number]))
        victim.wait_idle(seconds=30)
        wait_until(
            lambda: victim.leaks(before, descriptors=40) == [],
            seconds=20,
            what="no leak",
            why=lambda: str(victim.leaks(before)),
        )
    finally:
        http.close()
        victim.close()
        assert server.script("stop_server.sh").returncode == 0


def test_slow_readers_over_raw_grpc(tmp_path: Path, row: Row) -> None:
    """Triton keeps what is not read; what each may ask for is bounded by MAX_DEC_LEN, and others do not wait."""
    server = make_server(tmp_path, BATCH_SIZE="64", BLOCK_BS="64", MAX_DEC_LEN="1024", MAX_SEQ_LEN="256")
    victim = start(server)
    http = httpx.Client(base_url=server.gateway, timeout=60, trust_env=False)
    try:
        before, calm = victim.footprint().memory_mb, statistics.median(latency(http) for _ in range(15))
        with contextlib.ExitStack() as opened:
            calls = []
            for number in range(GRPC_READERS):
                channel = opened.enter_context(grpc.insecure_channel(server.grpc, OWN_CHANNEL))
                stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
                calls.append(stub.ModelStreamInfer(iter([in_tensor(json.dumps([slow_body(number)]).encode())])))
            row.streams = GRPC_READERS
            wait_generated(victim, GRPC_READERS)
            beside = statistics.median(latency(http) for _ in range(15))
            print(f"latency {calm * 1e3:.0f} ms alone, {beside * 1e3:.0f} ms beside; in MB: {growth(victim, before)}")
            assert beside <= 3 * calm + 0.1
            for call in calls:
                call.cancel()
        victim.wait_idle(seconds=30)
    finally:
        http.close()
        victim.close()
        assert server.script("stop_server.sh").returncode == 0
