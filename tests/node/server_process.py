"""Starts the stand-in server through the real start command, on free ports and in a run directory of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import numpy as np
from tritonclient import grpc as triton_grpc

STANDIN = Path(__file__).parent / "standin"
PORTS = ("HTTP_PORT", "GRPC_PORT", "METRICS_PORT", "INFER_QUEUE_PORT", "PUSH_MODE_HTTP_PORT")


def free_ports(count: int) -> list[int]:
    """Different loopback ports that were free a moment ago."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [sock.getsockname()[1] for sock in sockets]


def wait_until(condition: Callable[[], object], *, seconds: float) -> float:
    """Wait until the condition is true; how long it took. AssertionError if it does not come true."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not within {seconds} s"
        time.sleep(0.05)
    return time.monotonic() - began


def alive(pid: int) -> bool:
    """True for a process that is neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@dataclass
class ServerProcess:
    """One server: its environment, and questions about it."""

    folder: Path
    environ: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model = self.folder / "model"
        model.mkdir()
        (model / "config.json").write_text("{}")
        (model / "model.safetensors").touch()
        ports = dict(zip(PORTS, map(str, free_ports(len(PORTS)))))
        own = {"HOST": "127.0.0.1", "MODEL_DIR": str(model), "RUN_DIR": str(self.folder / "run"), "DRAIN_SECONDS": "20"}
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "VIRTUAL_ENV") if name in os.environ}
        source = str(Path(__file__).parents[2] / "serving")
        self.environ = {**kept, "PYTHONPATH": source, **ports, **own, "STANDIN_STEP": "0.02"}

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def command(self, *argv: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """Run Python with the server's environment."""
        return subprocess.run(
            [sys.executable, *argv], env={**self.environ, **changes}, capture_output=True, text=True, timeout=60
        )

    def start(self, **changes: str) -> subprocess.CompletedProcess[str]:
        return self.command(str(STANDIN / "launch.py"), **changes)

    def stop(self) -> subprocess.CompletedProcess[str]:
        return self.command("-m", "octavo.node.stop")

    def get(self, path: str, port: str = "HTTP_PORT") -> tuple[int, str]:
        """Status and body; (0, reason) if nobody answers."""
        try:
            with urlopen(f"http://127.0.0.1:{self.environ[port]}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except HTTPError as error:
            return error.code, error.read().decode()
        except (URLError, OSError) as error:
            return 0, str(error)

    def ready(self) -> bool:
        return self.get("/v2/health/ready")[0] == 200

    def health(self) -> dict:
        return json.loads(self.get("/v2/health")[1])

    def pid(self, name: str) -> int:
        """The pid of node, of the front end (the stub), or of a child."""
        health = self.health()
        if name == "node":
            return health["pid"]
        if name == "stub":
            return health["frontend"]["pid"]
        return next(process["pid"] for process in health["processes"] if process["name"] == name)

    def all_pids(self) -> list[int]:
        health = self.health()
        return [health["pid"], health["frontend"]["pid"], *(process["pid"] for process in health["processes"])]

    def shm_regions(self) -> list[str]:
        """Triton's shared memory of this server."""
        record = json.loads((self.run_dir / "node.json").read_text())
        return [entry.name for entry in Path("/dev/shm").iterdir() if entry.name.startswith(record["shm_prefix"])]

    def generate(self, count: int, *, on_token: Callable[[int], None] = lambda index: None) -> list[dict]:
        """Messages of one generation over Triton's gRPC."""
        import queue

        answers: queue.Queue = queue.Queue()
        messages: list[dict] = []
        with triton_grpc.InferenceServerClient(f"127.0.0.1:{self.environ['GRPC_PORT']}") as client:
            client.start_stream(lambda result, error: answers.put((result, error)))
            tensor = triton_grpc.InferInput("IN", [1], "BYTES")
            body = json.dumps([{"req_id": "test", "text": "a", "max_dec_len": count}]).encode()
            tensor.set_data_from_numpy(np.array([body], dtype=np.object_))
            client.async_stream_infer("model", [tensor], request_id="test")
            while not messages or not messages[-1].get("is_end"):
                result, error = answers.get(timeout=30)
                assert error is None, error
                messages.append(json.loads(result.as_numpy("OUT")[0])[0])
                on_token(len(messages))
        return messages

    def end(self) -> None:
        """Nothing may outlive a test, whatever it did."""
        self.stop()
        record = self.run_dir / "node.json"
        if record.exists():
            pid = json.loads(record.read_text())["node"]["pid"]
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
            self.stop()
