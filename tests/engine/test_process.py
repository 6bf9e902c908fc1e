"""The engine as a process: lock, key, port, signals, exit codes and one-line errors."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from engine.test_server import Peer
from octavo.engine import run_dir
from octavo.protocol.messages import Attached, Loading, Shutdown, StepOutputs
from scheduling.factories import submit

ROOT = Path(__file__).resolve().parents[2]
FAKE = [sys.executable, str(Path(__file__).with_name("fake_engine.py"))]
REAL = [sys.executable, "-m", "octavo.engine"]
SECONDS = 20.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Engines:
    """Starts engine processes in one run directory and ends them with the test."""

    def __init__(self, folder: Path) -> None:
        self.run_dir = folder / "run"
        self.port = free_port()
        self.children: list[subprocess.Popen] = []
        self.context = zmq.Context()

    def environ(self, **variables: str) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        path = f"{ROOT / 'serving'}:{ROOT / 'tests'}"
        ours = {"PYTHONPATH": path, "RUN_DIR": str(self.run_dir), "INFER_QUEUE_PORT": str(self.port)}
        return {**kept, **ours, **variables}

    def start(self, command: list[str] = FAKE, *args: str, **variables: str) -> subprocess.Popen:
        child = subprocess.Popen(
            [*command, *args],
            env=self.environ(**variables),
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        self.children.append(child)
        return child

    def started(self, *args: str, **variables: str) -> subprocess.Popen:
        child = self.start(FAKE, *args, **variables)
        wait_for(lambda: run_dir.read_key(self.run_dir) is not None or child.poll() is not None)
        return child

    def peer(self) -> Peer:
        return Peer(self.context, self.port)

    def attached(self) -> Peer:
        peer = self.peer()
        assert isinstance(peer.attach(key=run_dir.read_key(self.run_dir)), Attached)
        return peer

    def close(self) -> None:
        self.context.destroy(linger=0)
        for child in self.children:
            if child.poll() is None:
                child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout, child.stderr):
                if pipe is not None:
                    pipe.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


def end_of(child: subprocess.Popen) -> tuple[int, list[str]]:
    """Exit code and lines that start with the program's name."""
    _, errors = child.communicate(timeout=SECONDS)
    return child.returncode, [line for line in errors.splitlines() if line.startswith("octavo: error: ")]


@pytest.fixture
def engines(tmp_path) -> Iterator[Engines]:
    made = Engines(tmp_path)
    yield made
    made.close()


def test_an_engine_serves_and_ends_when_asked(engines):
    child = engines.started()
    peer = engines.attached()
    peer.send(submit(1, 20, max_tokens=5))
    assert peer.outputs_until_finished(1)[1][-1].finish_reason == "length"
    assert run_dir.is_locked(engines.run_dir)
    assert run_dir.running_pid(engines.run_dir) == child.pid
    peer.send(Shutdown())
    assert end_of(child) == (0, [])
    assert run_dir.read_key(engines.run_dir) is None
    assert not run_dir.is_locked(engines.run_dir)


def test_the_run_directory_and_the_key_are_private(engines):
    engines.started()
    assert stat.S_IMODE(engines.run_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE((engines.run_dir / run_dir.KEY_NAME).stat().st_mode) == 0o600
    assert len(bytes.fromhex(run_dir.read_key(engines.run_dir))) == 32


def test_every_engine_has_a_key_of_its_own(engines):
    first = engines.started()
    key = run_dir.read_key(engines.run_dir)
    first.terminate()
    assert end_of(first)[0] == 0
    engines.started()
    assert run_dir.read_key(engines.run_dir) != key


def test_sigterm_ends_the_engine_and_cancels(engines):
    child = engines.started("0", "0.005")
    peer = engines.attached()
    peer.send(submit(1, 20, max_tokens=900))
    peer.expect(StepOutputs)
    child.send_signal(signal.SIGTERM)
    assert peer.outputs_until_finished(1)[1][-1].finish_reason == "cancelled"
    assert end_of(child)[0] == 0


def test_sigterm_ends_an_engine_that_still_loads(engines):
    child = engines.started("30")
    peer = engines.peer()
    wait_for(lambda: isinstance(_first_answer(peer, engines), Loading))
    child.terminate()
    assert end_of(child)[0] == 0


def _first_answer(peer: Peer, engines: Engines):
    from octavo.protocol.messages import PROTOCOL_VERSION, Attach

    peer.send(Attach(PROTOCOL_VERSION, run_dir.read_key(engines.run_dir), 1))
    return peer.receive()


def test_a_second_engine_finds_the_lock(engines):
    first = engines.started()
    key = run_dir.read_key(engines.run_dir)
    code, lines = end_of(engines.start(INFER_QUEUE_PORT=str(free_port())))
    assert code == 4
    assert len(lines) == 1
    assert str(first.pid) in lines[0]
    assert run_dir.read_key(engines.run_dir) == key


def test_a_lock_dies_with_its_engine(engines):
    first = engines.started()
    first.kill()
    first.wait()
    child = engines.start()
    wait_for(lambda: run_dir.is_locked(engines.run_dir) or child.poll() is not None)
    assert child.poll() is None


def test_a_taken_port_is_one_line(engines):
    with socket.socket() as foreign:
        foreign.bind(("127.0.0.1", engines.port))
        foreign.listen()
        code, lines = end_of(engines.start())
    assert code == 3
    assert lines == [f"octavo: error: INFER_QUEUE_PORT={engines.port}: Address already in use"]
    assert run_dir.read_key(engines.run_dir) is None


def test_a_bad_setting_is_one_line(engines):
    code, lines = end_of(engines.start(BATCH_SIZE="many"))
    assert code == 2
    assert lines == ["octavo: error: BATCH_SIZE=many: must be a whole number from 1 to 128"]


def test_a_run_directory_that_others_may_write_is_refused(engines):
    engines.run_dir.mkdir()
    engines.run_dir.chmod(0o777)
    code, lines = end_of(engines.start())
    assert code == 2
    assert "can be written by other users" in lines[0]


def test_a_folder_without_a_model_is_one_line(engines, tmp_path):
    code, lines = end_of(engines.start(REAL, MODEL_DIR=str(tmp_path / "nothing")))
    assert code == 2
    assert len(lines) == 1


def test_under_node_the_engine_ends_with_its_parent(engines):
    script = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:]).pid, flush=True); input()"
    parent = subprocess.Popen(
        [sys.executable, "-c", script, *FAKE], env=engines.environ(OCTAVO_NODE="1"), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    engines.children.append(parent)
    engine = os.pidfd_open(int(parent.stdout.readline()))
    try:
        wait_for(lambda: run_dir.read_key(engines.run_dir) is not None)
        engines.attached()
        parent.kill()
        wait_for(lambda: bool(select.select([engine], [], [], 0)[0]))
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(engine, signal.SIGKILL)
        os.close(engine)
    assert not run_dir.is_locked(engines.run_dir)


def test_the_log_names_a_misspelled_setting(engines):
    child = engines.started(BATCH_SIZ="4")
    engines.attached().send(Shutdown())
    _, errors = child.communicate(timeout=SECONDS)
    assert "did you mean BATCH_SIZE" in errors
