"""The worker process: start, drain, orphanhood, a port in use."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from gateway.conftest import Stack, until

SERVING = str(Path(__file__).parents[2] / "serving")


def environ(stack: Stack, port: int, **more: str) -> dict[str, str]:
    known = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
    ports = {"GRPC_PORT": str(stack.fake.port), "PUSH_MODE_HTTP_PORT": str(port), "HOST": "127.0.0.1"}
    return {**known, **ports, "PYTHONPATH": SERVING, "DRAIN_SECONDS": "5", **more}


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


def start(stack: Stack, listener: socket.socket, *, beat: int | None = None) -> subprocess.Popen[bytes]:
    given = [listener.fileno(), *([beat] if beat is not None else [])]
    command = [sys.executable, "-m", "octavo.gateway"]
    for option, handle in zip(("--fd", "--beat"), given):
        command += [option, str(handle)]
    port = listener.getsockname()[1]
    return subprocess.Popen(
        command,
        env=environ(stack, port),
        pass_fds=given,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def test_a_worker_serves_an_inherited_socket_and_drains_on_sigterm(stack: Stack, listener: socket.socket) -> None:
    stack.fake.delay = 0.2
    process = start(stack, listener)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        assert requests.get(f"{url}/health", timeout=20).status_code == 200
        body = {"text": "SECRET", "stream": True}
        with requests.post(f"{url}/v1/completions", json=body, stream=True, timeout=10) as answer:
            said = answer.iter_lines()
            next(said)
            process.send_signal(signal.SIGTERM)
            assert json.loads(list(said)[-1])["is_end"] == 1
        assert process.wait(10) == 0
    finally:
        process.kill()
        log = process.communicate()[1].decode()
    assert "POST /v1/completions 200" in log
    assert "SECRET" not in log
    assert "Traceback" not in log


def test_a_worker_ends_with_its_parent(stack: Stack, listener: socket.socket, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    middle = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-m', 'octavo.gateway', '--fd', '{listener.fileno()}'],"
        f" pass_fds=[{listener.fileno()}])\n"
        f"open({str(pid_file)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    port = listener.getsockname()[1]
    parent = subprocess.Popen(
        [sys.executable, "-c", middle],
        env=environ(stack, port),
        pass_fds=[listener.fileno()],
        stderr=subprocess.DEVNULL,
    )
    try:
        assert requests.get(f"http://127.0.0.1:{port}/health", timeout=20).status_code == 200
        worker = int(pid_file.read_text())
    finally:
        parent.kill()
        parent.wait()

    def gone() -> bool:
        try:
            return Path(f"/proc/{worker}/stat").read_text().split()[2] == "Z"
        except FileNotFoundError:
            return True

    until(gone, 5)


def test_a_port_in_use_is_one_line_and_exit_code_3(stack: Stack, listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    result = subprocess.run(
        [sys.executable, "-m", "octavo.gateway"], env=environ(stack, port), capture_output=True, text=True, timeout=20
    )
    assert result.returncode == 3
    assert result.stderr == f"octavo: error: PUSH_MODE_HTTP_PORT={port}: cannot listen: Address already in use\n"


@pytest.mark.parametrize("bad", [{"PUSH_MODE_HTTP_PORT": "-1"}, {"BATCH_SIZE": "900"}])
def test_settings_that_cannot_work_are_one_line_and_exit_code_2(stack: Stack, bad: dict[str, str]) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "octavo.gateway"],
        env=environ(stack, 1, **bad),
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert result.returncode == 2
    assert result.stderr.startswith(f"octavo: error: {next(iter(bad))}=")
    assert result.stderr.count("\n") == 1


def test_requests_that_outlast_the_drain_end_with_an_answer(stack: Stack, listener: socket.socket) -> None:
    stack.fake.first_delay = 30.0
    command = [sys.executable, "-m", "octavo.gateway", "--fd", str(listener.fileno())]
    port = listener.getsockname()[1]
    env = environ(stack, port, DRAIN_SECONDS="1")
    process = subprocess.Popen(command, env=env, pass_fds=[listener.fileno()], stderr=subprocess.DEVNULL)
    try:
        requests.get(f"http://127.0.0.1:{port}/health", timeout=20)
        raw = b'{"text": "x", "req_id": "late"}'
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(raw), raw)
            )
            until(lambda: stack.fake.requests)
            start = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert b" 503 " in connection.recv(1 << 16).split(b"\r\n")[0]
            assert time.monotonic() - start < 5
        assert process.wait(10) == 0
        until(lambda: stack.fake.aborts == ["late"])
    finally:
        process.kill()
        process.wait()


def test_a_stream_that_outlasts_the_drain_ends_with_an_error_line(stack: Stack, listener: socket.socket) -> None:
    stack.fake.words, stack.fake.delay = ["a"] * 1000, 0.05
    port = listener.getsockname()[1]
    command = [sys.executable, "-m", "octavo.gateway", "--fd", str(listener.fileno())]
    env = environ(stack, port, DRAIN_SECONDS="1")
    process = subprocess.Popen(command, env=env, pass_fds=[listener.fileno()], stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        requests.get(f"{url}/health", timeout=20)
        body = {"text": "x", "req_id": "late", "stream": True}
        with requests.post(f"{url}/v1/completions", json=body, stream=True, timeout=20) as answer:
            said = answer.iter_lines()
            next(said)
            process.send_signal(signal.SIGTERM)
            last = json.loads(list(said)[-1])
        assert (last["error_code"], last["is_end"], last["req_id"]) == (503, 1, "late")
        assert process.wait(10) == 0
        until(lambda: stack.fake.aborts == ["late"])
    finally:
        process.kill()
        process.wait()


def test_a_worker_tells_its_parent_of_requests_that_ended_well(stack: Stack, listener: socket.socket) -> None:
    read, write = os.pipe()
    process = start(stack, listener, beat=write)
    os.close(write)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/completions"
    try:
        assert requests.post(url, json={"text": "x", "max_dec_len": -1}, timeout=20).status_code == 400
        said = b"".join(os.read(read, 4096) for _ in range(3))
        assert b"." in said
        assert b"*" not in said
        assert requests.post(url, json={"text": "x"}, timeout=20).status_code == 200
        while b"*" not in os.read(read, 4096):
            pass
    finally:
        process.kill()
        process.wait()
        os.close(read)
