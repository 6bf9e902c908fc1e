"""The real node and Triton around stand-ins: start, ready, drain, deaths. Each test starts a server of its own."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from tritonclient.grpc import InferenceServerClient as grpc_client
from tritonclient.utils import InferenceServerException

from node.server_process import ServerProcess, alive, wait_until

pytestmark = pytest.mark.server


def test_starts_streams_and_shows_all_metrics(started: ServerProcess) -> None:
    assert started.ready()
    messages = started.generate(5)
    assert [message["send_idx"] for message in messages] == [0, 1, 2, 3, 4]
    status, page = started.get("/metrics", "METRICS_PORT")
    assert status == 200
    assert 'octavo_state{state="ready"} 1.0' in page
    assert "nv_inference_count" in page
    assert "octavo_requests_total 2" in page  # the proving token and this one
    health = started.health()
    assert (health["ready"], health["state"]) == (True, "ready")
    assert started.get("/v2/health/live")[0] == 200


def test_protocols_that_nobody_uses_are_closed(started: ServerProcess) -> None:
    with grpc_client(f"127.0.0.1:{started.environ['GRPC_PORT']}") as client:
        assert client.is_server_live()
        for call in (
            client.get_model_repository_index,
            client.get_log_settings,
            client.get_system_shared_memory_status,
        ):
            with pytest.raises(InferenceServerException, match="restricted"):
                call()


def test_second_start_is_refused_in_one_line(started: ServerProcess) -> None:
    again = started.start()
    assert again.returncode == 4
    assert again.stderr.splitlines() == [
        f"octavo: error: already running (pid {started.pid('node')}); stop it with stop_server.sh"
    ]
    assert started.ready()


def test_stop_lets_a_running_request_end_and_leaves_nothing(started: ServerProcess) -> None:
    pids, regions = started.all_pids(), started.shm_regions()
    assert regions
    messages: list[dict] = []
    first = threading.Event()
    client = threading.Thread(target=lambda: messages.extend(started.generate(60, on_token=lambda n: first.set())))
    client.start()
    assert first.wait(10)
    stopper = threading.Thread(target=started.stop)
    stopper.start()
    wait_until(lambda: started.get("/v2/health/ready")[0] == 503, seconds=2)
    assert "draining" in started.get("/v2/health/ready")[1]
    client.join(30)
    stopper.join(30)
    assert len(messages) == 60
    assert not any(map(alive, pids))
    assert not any((Path("/dev/shm") / name).exists() for name in regions)
    assert not (started.run_dir / "node.pid").exists()
    again = started.stop()
    assert (again.returncode, again.stdout) == (0, "octavo: no server is running\n")


def test_while_loading_ready_says_how_far(server: ServerProcess) -> None:
    starter = threading.Thread(target=lambda: server.start(STANDIN_LOAD_SECONDS="3"))
    starter.start()
    wait_until(lambda: "loading weights" in server.get("/v2/health/ready")[1], seconds=15)
    status, reason = server.get("/v2/health/ready")
    assert status == 503
    assert reason.startswith("loading: loading weights ")
    assert 'octavo_state{state="loading"} 1.0' in server.get("/metrics", "METRICS_PORT")[1]
    assert server.get("/v2/health/live")[0] == 200
    starter.join(30)
    assert server.ready()


def test_killed_stub_brings_a_new_triton(started: ServerProcess) -> None:
    triton, stub, regions = started.pid("triton"), started.pid("stub"), started.shm_regions()
    os.kill(stub, signal.SIGKILL)
    wait_until(lambda: not started.ready(), seconds=2)
    assert wait_until(started.ready, seconds=15) < 10
    assert not alive(triton)
    assert started.pid("stub") != stub
    assert set(regions).isdisjoint(started.shm_regions())
    assert len(started.generate(3)) == 3
    assert 'octavo_restarts_total{process="triton"} 1.0' in started.get("/metrics", "METRICS_PORT")[1]


def test_killed_engine_and_gateway_are_started_again(started: ServerProcess) -> None:
    old = {name: started.pid(name) for name in ("engine", "gateway-1")}
    for pid in old.values():
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: all(started.pid(name) not in (None, pid) for name, pid in old.items()), seconds=5)
    wait_until(started.ready, seconds=5)
    assert started.get("/", "PUSH_MODE_HTTP_PORT") == (200, f"{started.pid('gateway-1')}\n")


def test_frozen_front_end_is_not_ready_until_it_goes_on(started: ServerProcess) -> None:
    stub = started.pid("stub")
    os.kill(stub, signal.SIGSTOP)
    try:
        assert wait_until(lambda: not started.ready(), seconds=4) < 2.5
        assert "front end has not answered" in started.get("/v2/health/ready")[1]
    finally:
        os.kill(stub, signal.SIGCONT)
    wait_until(started.ready, seconds=4)


def test_children_of_a_killed_node_end_and_the_next_start_works(started: ServerProcess) -> None:
    pids, regions = started.all_pids(), started.shm_regions()
    os.kill(started.pid("node"), signal.SIGKILL)
    assert wait_until(lambda: not any(map(alive, pids)), seconds=5) < 3
    again = started.start()
    assert again.returncode == 0, again.stderr
    assert started.ready()
    assert not any((Path("/dev/shm") / name).exists() for name in regions)


def test_stop_cleans_up_after_a_killed_node(started: ServerProcess) -> None:
    regions = started.shm_regions()
    os.kill(started.pid("node"), signal.SIGKILL)
    assert started.stop().returncode == 0
    assert not any((Path("/dev/shm") / name).exists() for name in regions)
    assert not (started.run_dir / "node.pid").exists()


def test_stop_kills_a_node_that_hangs(started: ServerProcess) -> None:
    pids = started.all_pids()
    record = started.run_dir / "node.json"
    record.write_text(record.read_text().replace('"drain_seconds": 20', '"drain_seconds": -29'))
    os.kill(started.pid("node"), signal.SIGSTOP)
    began = time.monotonic()
    stopped = started.stop()
    assert "killing it" in stopped.stdout
    assert time.monotonic() - began < 15
    wait_until(lambda: not any(map(alive, pids)), seconds=3)


def test_engine_that_refuses_the_model_stops_the_start_with_its_own_line(server: ServerProcess) -> None:
    done = server.start(STANDIN_ENGINE_EXIT="2")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "octavo: error: the stand-in has no model"
    assert not (server.run_dir / "node.pid").exists()
    assert server.get("/v2/health/live")[0] == 0


def test_front_end_that_fails_stops_the_start_with_the_reason(server: ServerProcess) -> None:
    done = server.start(STANDIN_FAIL="1")
    assert done.returncode == 1
    assert "told to fail" in done.stderr.splitlines()[-1]
    assert not (server.run_dir / "node.pid").exists()


@pytest.mark.parametrize("name", ["HTTP_PORT", "GRPC_PORT", "METRICS_PORT", "INFER_QUEUE_PORT", "PUSH_MODE_HTTP_PORT"])
def test_port_in_use_stops_the_start_in_one_line(server: ServerProcess, name: str) -> None:
    with socket.create_server(("127.0.0.1", int(server.environ[name]))):
        done = server.start()
    assert done.returncode == 3
    assert done.stderr == f"octavo: error: {name}={server.environ[name]}: the port is in use on 127.0.0.1\n"


def test_grpc_alone_needs_no_gateway(server: ServerProcess) -> None:
    done = server.start(PUSH_MODE_HTTP_PORT="-1")
    assert done.returncode == 0, done.stderr
    assert server.ready()
    assert [process["name"] for process in server.health()["processes"]] == ["engine", "triton"]
