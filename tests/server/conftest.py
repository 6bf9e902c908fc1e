"""A real server for the whole session: start_server.sh on free ports with the demo model, stop_server.sh at the end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PORT_NAMES = ("HTTP_PORT", "GRPC_PORT", "METRICS_PORT", "INFER_QUEUE_PORT", "PUSH_MODE_HTTP_PORT")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for item in sockets:
        item.bind(("127.0.0.1", 0))
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


@dataclass(frozen=True)
class Server:
    """Where a running server is found."""

    environ: dict[str, str]
    run_dir: Path

    def port(self, name: str) -> int:
        return int(self.environ[name])

    @property
    def gateway(self) -> str:
        return f"http://127.0.0.1:{self.port('PUSH_MODE_HTTP_PORT')}"

    @property
    def health(self) -> str:
        return f"http://127.0.0.1:{self.port('HTTP_PORT')}"

    @property
    def metrics(self) -> str:
        return f"http://127.0.0.1:{self.port('METRICS_PORT')}/metrics"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.port('GRPC_PORT')}"

    def script(self, name: str, *, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run start_server.sh or stop_server.sh with this server's variables."""
        return subprocess.run(
            ["bash", str(REPOSITORY / name)],
            env=self.environ,
            text=True,
            timeout=timeout,
            capture_output=True,
            check=False,
        )


def make_server(run_dir: Path, **variables: str) -> Server:
    """A server that is not started yet, on ports of its own."""
    ports = dict(zip(PORT_NAMES, map(str, free_ports(len(PORT_NAMES)))))
    dropped = (*PORT_NAMES, "MODEL_DIR", "RUN_DIR", "LOG_DIR")
    keep = {name: value for name, value in os.environ.items() if name not in dropped}
    environ = {
        **keep,
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
        "HOST": "127.0.0.1",
        "RUN_DIR": str(run_dir),
        "NUM_THREADS": "2",
        "BLOCK_BS": "8",
        **ports,
        **variables,
    }
    return Server(environ, run_dir)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model on real Triton; MAX_DEC_LEN is large so that a test can act while a request runs."""
    one = make_server(tmp_path_factory.mktemp("run"), BATCH_SIZE="48", MAX_DEC_LEN="8000")
    started = one.script("start_server.sh")
    assert started.returncode == 0, started.stdout[-4000:] + started.stderr[-4000:]
    yield one
    stopped = one.script("stop_server.sh")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
