"""Starting and stopping: one clear line when it cannot be, nothing left when it ends."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from urllib.request import urlopen

import pytest

from server.conftest import Server, make_server

pytestmark = pytest.mark.server


def shared_memory(prefix: str) -> list[str]:
    """The regions of one server; others may run here."""
    return [name for name in os.listdir("/dev/shm") if name.startswith(prefix)]


def runs(pid: int) -> bool:
    """A zombie that nobody has reaped yet does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def refused(server: Server, *words: str) -> None:
    """The start fails with a line that has all the words, and leaves nothing that runs."""
    result = server.script("start_server.sh")
    assert result.returncode != 0
    lines = [line for line in (result.stdout + result.stderr).splitlines() if all(word in line for word in words)]
    assert lines, result.stdout + result.stderr
    assert not (server.run_dir / "node.pid").exists()


def test_a_bad_variable_is_one_line(tmp_path: Path) -> None:
    refused(make_server(tmp_path, BATCH_SIZE="500"), "BATCH_SIZE", "500", "1 to 128")


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    refused(make_server(tmp_path, MODEL_DIR=str(tmp_path / "none")), "MODEL_DIR", str(tmp_path / "none"))


def test_a_folder_without_a_model_is_never_replaced_by_the_demo(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(make_server(tmp_path, MODEL_DIR=str(tmp_path / "empty")), "config.json")


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    server = make_server(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", server.port("GRPC_PORT")))
        taken.listen()
        refused(server, "GRPC_PORT", str(server.port("GRPC_PORT")))


def test_two_servers_run_on_one_host_and_the_second_leaves_nothing(server: Server, tmp_path: Path) -> None:
    other = make_server(tmp_path, PUSH_MODE_HTTP_PORT="-1")
    started = other.script("start_server.sh")
    assert started.returncode == 0, started.stdout + started.stderr
    pids = [int(part) for part in (tmp_path / "node.pid").read_text().split()[:1]]
    assert urlopen(f"{other.health}/v2/health/ready", timeout=5).status == 200
    prefix = json.loads((tmp_path / "node.json").read_text())["shm_prefix"]
    assert shared_memory(prefix)
    again = other.script("start_server.sh")
    assert "already running" in again.stdout + again.stderr
    stopped = other.script("stop_server.sh")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert not any(runs(pid) for pid in pids)
    assert not shared_memory(prefix)
    assert urlopen(f"{server.health}/v2/health/ready", timeout=5).status == 200


def test_stopping_what_does_not_run_is_no_error(tmp_path: Path) -> None:
    result = make_server(tmp_path).script("stop_server.sh")
    assert result.returncode == 0
