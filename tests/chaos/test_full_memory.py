"""/dev/shm is full: whoever is struck hears of it at once, nobody else notices, and afterwards all is as before.

The server gets a small /dev/shm of its own in a private mount namespace, which needs rights that not everyone has.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import httpx
import pytest
from tritonclient.grpc import service_pb2_grpc

from chaos.scoreboard import Row
from chaos.victims import Victim, wait_until
from fuzz.test_bad_input import in_tensor
from server.conftest import REPOSITORY, Server, make_server

pytestmark = [pytest.mark.server, pytest.mark.slow]

SHM_MB = 24
NAMESPACE = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o size={SHM_MB}m tmpfs /dev/shm && exec "$@"', "sh"]


def may_unshare() -> bool:
    try:
        return subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


needs_rights = pytest.mark.skipif(not may_unshare(), reason="no right to a mount namespace")


@contextmanager
def small_server(tmp_path: Path, **variables: str) -> Iterator[tuple[Server, Victim]]:
    server = make_server(tmp_path, BATCH_SIZE="8", MAX_DEC_LEN="8000", **variables)
    command = [*NAMESPACE, "bash", str(REPOSITORY / "start_server.sh")]
    started = subprocess.run(command, env=server.environ, text=True, capture_output=True, timeout=120, check=False)
    assert started.returncode == 0, started.stdout + started.stderr
    victim = Victim(server)
    try:
        yield server, victim
    finally:
        victim.close()
        assert server.script("stop_server.sh").returncode == 0


@contextmanager
def full(victim: Victim) -> Iterator[None]:
    """Fill the server's /dev/shm; what Triton took of it before stays its own."""
    shared = Path(f"/proc/{victim.node}/root/dev/shm")
    free = os.statvfs(shared)
    assert free.f_blocks * free.f_frsize == SHM_MB << 20, "not the machine's own"
    filler = shared / "filler"
    filler.write_bytes(bytes(free.f_bavail * free.f_frsize))
    try:
        yield
    finally:
        filler.unlink()


def ask(server: Server, req_id: str, **body: object) -> tuple[float, list[dict]]:
    """Over raw gRPC: seconds, and every message."""
    began, messages = time.monotonic(), []
    request = in_tensor(json.dumps([{"req_id": req_id, "text": "x", "ignore_eos": True, **body}]).encode())
    with grpc.insecure_channel(server.grpc, [("grpc.max_receive_message_length", 1 << 28)]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for response in stub.ModelStreamInfer(iter([request]), timeout=60):
            assert not response.error_message, response.error_message
            value = json.loads(response.infer_response.raw_output_contents[0][4:])
            messages.append(value[0] if isinstance(value, list) else value)
    return time.monotonic() - began, messages


@needs_rights
def test_an_answer_too_large_for_a_full_memory_is_an_error_at_once(tmp_path: Path, row: Row) -> None:
    large = {"max_dec_len": 2000, "min_dec_len": 2000, "logprobs": 20}  # some 3 MB in one message
    with small_server(tmp_path, DISABLE_STREAMING="1") as (server, victim):
        with full(victim), ThreadPoolExecutor(2) as pool:
            row.faults, row.streams = 1, 2
            struck = pool.submit(ask, server, "large", **large)
            other = pool.submit(ask, server, "small", max_dec_len=30)
            seconds, messages = struck.result()
            assert seconds < 30
            assert messages[-1]["error_code"] == 503
            assert "shared memory" in messages[-1]["error_msg"]
            assert other.result()[1][-1]["tokens_all_num"] == 30
        _, messages = ask(server, "large", **large)
        assert messages[-1]["tokens_all_num"] == 2000, "as before"
        victim.wait_idle()
        row.check()


@needs_rights
def test_an_order_that_finds_no_room_ends_its_request_alone(tmp_path: Path, row: Row) -> None:
    """A prompt of 3 MB on the gateway's stream, while others run on it."""
    with small_server(tmp_path) as (server, victim), httpx.Client(base_url=server.gateway, timeout=90) as http:
        lines: list[str] = []

        def run() -> None:
            body = {"text": "x", "stream": True, "max_dec_len": 6000, "ignore_eos": True}
            with http.stream("POST", "/v1/completions", json=body) as response:
                lines.extend(response.iter_lines())

        other = threading.Thread(target=run)
        other.start()
        row.faults, row.streams = 1, 2
        wait_until(lambda: victim.health()["engine"]["num_running"] == 1, seconds=20, what="running")
        with full(victim):
            answer = http.post("/v1/completions", json={"text": "y" * 3_000_000, "timeout": 5})
            assert answer.status_code in (408, 503), answer.text
        other.join(60)
        said = [json.loads(line) for line in lines]
        assert said[-1]["tokens_all_num"] == 6000
        assert [one["send_idx"] for one in said] == list(range(len(said)))
        log = "".join(path.read_text(errors="replace") for path in server.run_dir.rglob("*.log"))
        assert "the order carry failed" in log
        answer = http.post("/v1/completions", json={"text": "y" * 3_000_000})
        assert answer.status_code == 400, "as before: too many tokens"
        row.check()
