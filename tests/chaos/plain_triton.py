"""What plain Triton does when its Python stub is killed: the row beside ours.

    python tests/chaos/plain_triton.py

A decoupled Python model that only counts, on the same tritonserver, started directly; 32 streams, kill -9 of the stub.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

for root in ("serving", "client", "tests"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / root))

import numpy as np  # noqa: E402
import tritonclient.grpc as grpcclient  # noqa: E402

from octavo.node import run_dir, triton  # noqa: E402
from octavo.settings import Settings  # noqa: E402
from server.conftest import free_ports  # noqa: E402

STREAMS, WATCH_SECONDS = 32, 30.0
MODEL = """
import threading, time
import numpy as np, triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            threading.Thread(target=self.count, args=(request.get_response_sender(),), daemon=True).start()

    def count(self, sender):
        for number in range(200):
            out = pb_utils.Tensor("OUT", np.array([str(number).encode()], dtype=np.object_))
            sender.send(pb_utils.InferenceResponse(output_tensors=[out]))
            time.sleep(0.02)
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
CONFIG = """
name: "model"
backend: "python"
max_batch_size: 0
model_transaction_policy { decoupled: true }
input [ { name: "IN" data_type: TYPE_STRING dims: [1] } ]
output [ { name: "OUT" data_type: TYPE_STRING dims: [1] } ]
"""


def make_repository(folder: Path) -> Path:
    (folder / "repository" / "model" / "1").mkdir(parents=True)
    (folder / "repository" / "model" / "config.pbtxt").write_text(CONFIG)
    (folder / "repository" / "model" / "1" / "model.py").write_text(MODEL)
    return folder / "repository"


def start(folder: Path, prefix: str) -> tuple[subprocess.Popen[bytes], str]:
    """Triton itself, without a node; its process and its gRPC address."""
    install = triton.find_triton(Settings.from_environ())
    prepared = triton.prepare(install, folder / "prepared")
    grpc_port, metrics_port = free_ports(2)
    ports = triton.TritonPorts("127.0.0.1", grpc_port, metrics_port)
    command = triton.command(
        install, prepared=prepared, repository=make_repository(folder), ports=ports, shm_prefix=prefix, secret="none"
    )
    environ = triton.environ(os.environ, install, prepared=prepared)
    with open(folder / "triton.log", "wb") as log:
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
    return process, f"127.0.0.1:{grpc_port}"


def main() -> None:
    folder, prefix = Path(tempfile.mkdtemp()), f"octavo_plain{os.getpid():08d}_"
    process, address = start(folder, prefix)
    try:
        client = grpcclient.InferenceServerClient(address)
        wait_live(client)
        print(measure(client, address, process.pid))
        client.close()
    finally:
        process.kill()
        process.wait()
        left = [entry.name for entry in Path("/dev/shm").iterdir() if entry.name.startswith(prefix)]
        print(f"left in /dev/shm after kill -9 of tritonserver: {len(left)}")
        run_dir.remove_shared_memory(prefix)


def wait_live(client: grpcclient.InferenceServerClient) -> None:
    for _ in range(200):
        try:
            if client.is_model_ready("model"):
                return
        except grpcclient.InferenceServerException:
            time.sleep(0.1)
    raise SystemExit("Triton did not start")


def measure(client: grpcclient.InferenceServerClient, address: str, server_pid: int) -> str:
    results: queue.Queue = queue.Queue()
    clients = [grpcclient.InferenceServerClient(address) for _ in range(STREAMS)]
    for number, one in enumerate(clients):
        one.start_stream(lambda result, error, number=number: results.put((number, error)))
        tensor = grpcclient.InferInput("IN", [1], "BYTES")
        tensor.set_data_from_numpy(np.array(["x"], dtype=np.object_))
        one.async_stream_infer("model", [tensor])
    for _ in range(STREAMS * 5):
        results.get(timeout=10)
    stub = triton.find_stub(server_pid)
    assert stub is not None
    os.kill(stub, signal.SIGKILL)
    time.sleep(1.0)  # what was under way
    while not results.empty():
        results.get()
    ready_times, heard, began = 0, set(), time.monotonic()
    while time.monotonic() - began < WATCH_SECONDS:
        ready_times += bool(client.is_server_ready() and client.is_model_ready("model"))
        while not results.empty():
            heard.add(results.get()[0])
        time.sleep(0.5)
    for one in clients:
        one.stop_stream(cancel_requests=True)
    return (
        f"kill -9 of the stub with {STREAMS} streams: in {WATCH_SECONDS:.0f} s {STREAMS - len(heard)} streams "
        f"heard neither a token nor an error; ready was claimed {ready_times} of {int(WATCH_SECONDS / 0.5)} times; "
        f"new stub: {'yes' if (new := triton.find_stub(server_pid)) and run_dir.ProcessId.of(new) else 'no'}"
    )


if __name__ == "__main__":
    main()
