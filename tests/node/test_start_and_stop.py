"""Parts of the start and stop commands that need no server: run directory, records, model folder, logs, Triton."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from node.server_process import free_ports
from octavo.node import logs, run_dir, stop, triton
from octavo.node.errors import NodeError
from octavo.node.launch import progress_step
from octavo.node.model_folder import resolve_model
from octavo.node.ports import check_free
from octavo.node.run_dir import ProcessId, Record
from octavo.node.supervisor import Deaths
from octavo.settings import Settings


def settings(**variables: object) -> Settings:
    return Settings.from_environ({name: str(value) for name, value in variables.items()})


def record(**changes: object) -> Record:
    own = ProcessId.of(os.getpid())
    assert own is not None
    return Record(**{"node": own, "drain_seconds": 5, "shm_prefix": "octavo_0123456789abcdef_", **changes})


def test_run_dir_is_private(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    run_dir.make_run_dir(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    run_dir.make_run_dir(folder)


def test_run_dir_that_others_can_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(NodeError, match="can be written by other users"):
        run_dir.make_run_dir(tmp_path / "open")


def test_run_dir_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(NodeError, match="is not a folder"):
        run_dir.make_run_dir(tmp_path / "link")


def test_lock_is_exclusive_and_ends_with_its_descriptor(tmp_path: Path) -> None:
    handle = run_dir.lock(tmp_path)
    with pytest.raises(NodeError, match="already running"):
        run_dir.lock(tmp_path)
    os.close(handle)
    os.close(run_dir.lock(tmp_path))


def test_record_survives_writing_and_reading(tmp_path: Path) -> None:
    written = record(ports={"HTTP_PORT": 8110}, children=(ProcessId(1, 2),))
    run_dir.write_record(tmp_path, written)
    assert run_dir.read_record(tmp_path) == written
    assert (tmp_path / "node.pid").read_text() == f"{os.getpid()}\n"
    run_dir.remove_record(tmp_path)
    assert run_dir.read_record(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"node": 3}'])
def test_broken_record_counts_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "node.json").write_text(text)
    assert run_dir.read_record(tmp_path) is None


def test_reused_pid_is_another_process() -> None:
    own = ProcessId.of(os.getpid())
    assert own is not None
    assert own.alive
    assert not ProcessId(own.pid, own.start_time + 1).alive


def test_stop_does_not_touch_a_process_that_got_the_pid_later(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        found = ProcessId.of(other.pid)
        assert found is not None
        later = ProcessId(other.pid, found.start_time - 1)
        run_dir.write_record(tmp_path, record(node=later, children=(later,)))
        assert stop.stop(tmp_path, record(node=later, children=(later,))) == 0
        assert other.poll() is None
        other.communicate(b"\n")
    assert run_dir.read_record(tmp_path) is None


def test_stop_finds_the_only_server_of_this_user_if_nothing_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    other = tmp_path / f"octavo-{os.getuid()}" / "9000"
    run_dir.make_run_dir(other)
    run_dir.write_record(other, record())
    assert [path for path, _ in stop.find(settings())] == [other]
    assert stop.find(settings(HTTP_PORT=9001)) == []


def test_only_regions_of_the_prefix_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_dir, "SHARED_MEMORY", tmp_path)
    for name in ("octavo_0123456789abcdef_x", "octavo_other_x", "psm_1"):
        (tmp_path / name).touch()
    assert run_dir.remove_shared_memory("octavo_0123456789abcdef_") == ["octavo_0123456789abcdef_x"]
    for dangerous in ("", "octavo_", "psm_"):
        assert run_dir.remove_shared_memory(dangerous) == []
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["octavo_other_x", "psm_1"]


def test_port_check_names_the_variable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(NodeError, match=f"GRPC_PORT={port}: the port is in use on 0.0.0.0") as caught:
            check_free("GRPC_PORT", "0.0.0.0", port)
    assert caught.value.exit_code == 3
    check_free("GRPC_PORT", "127.0.0.1", free_ports(1)[0])


@pytest.mark.parametrize(("host", "reason"), [("192.0.2.1", "not an address of this machine"), ("no host", "HOST=")])
def test_host_that_cannot_be_bound_is_named(host: str, reason: str) -> None:
    with pytest.raises(NodeError, match=reason):
        check_free("HTTP_PORT", host, free_ports(1)[0])


def test_model_folder_needs_config_and_safetensors(tmp_path: Path) -> None:
    chosen = settings(MODEL_DIR=tmp_path)
    with pytest.raises(NodeError, match=r"no model in it: .*config.json does not exist"):
        resolve_model(chosen)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(NodeError, match=r"no \*.safetensors in it"):
        resolve_model(chosen)
    (tmp_path / "model.safetensors").touch()
    assert resolve_model(chosen) == {}


def test_missing_folder_is_not_taken_for_a_hub_id() -> None:
    with pytest.raises(NodeError, match="MODEL_DIR=/no/such/folder: no such folder"):
        resolve_model(settings(MODEL_DIR="/no/such/folder"))


def test_deaths_back_off_and_end_at_the_limit() -> None:
    deaths = Deaths()
    delays = [deaths.record(float(second), limit=5) for second in range(5)]
    assert delays == [*map(pytest.approx, (0.1, 0.2, 0.4, 0.8)), None]


def test_deaths_that_lie_apart_are_forgiven() -> None:
    deaths = Deaths()
    assert [deaths.record(100.0 * n, limit=2) for n in range(5)] == [pytest.approx(0.1)] * 5


def test_log_repeats_errors_only_and_without_control_characters(tmp_path: Path) -> None:
    path, said = tmp_path / "engine.log", []
    path.write_text("octavo: error: of an earlier run\n")
    log = logs.LogFile("engine", path, echo=said.append)
    with path.open("a") as file:
        file.write("INFO all is well\noctavo: error: \x1b[31mno memory\n")
    log.look()
    log.look()
    assert said == ["[engine] octavo: error:  [31mno memory"]


def test_log_that_grows_too_long_is_moved_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MAX_LOG_BYTES", 10)
    path = tmp_path / "engine.log"
    with path.open("ab", buffering=0) as file:
        log = logs.LogFile("engine", path, echo=None)
        file.write(b"twenty bytes of text")
        log.look()
        file.write(b"more")
    assert path.read_bytes() == b"more"
    assert (tmp_path / "engine.log.1").read_bytes() == b"twenty bytes of text"


def test_last_error_prefers_the_line_for_users(tmp_path: Path) -> None:
    path = tmp_path / "engine.log"
    path.write_text("old\n")
    offset = path.stat().st_size
    path.write_text("old\nTraceback (most recent call last):\noctavo: error: no weights\nbye\n")
    assert logs.last_error(path, offset) == "no weights"
    path.write_text("old\nfirst\nsecond\n")
    assert logs.last_error(path, offset) == "first | second"


def test_progress_speaks_up_for_stages_and_tens_of_percent() -> None:
    steps = [progress_step(f"loading weights {percent} %") for percent in (31, 39, 40)]
    assert steps[0] == steps[1] != steps[2]
    waiting = [progress_step(f"the front end has not answered for {age} s (x)") for age in ("1.6", "2.0")]
    assert waiting[0] == waiting[1]


def test_triton_home_that_holds_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NodeError, match=r"no bin/tritonserver in it"):
        triton.find_triton(settings(TRITONSERVER_HOME=tmp_path))


def test_stub_names_its_python(tmp_path: Path) -> None:
    stub = tmp_path / "stub"
    stub.write_bytes(b"\0libpython3.11.so.1.0\0")
    assert triton.stub_python(stub) == "3.11"
    stub.write_bytes(b"\0libpython3-419a3a08.13.so.1.0\0")
    assert triton.stub_python(stub) == "3.13"


def test_triton_is_closed_to_what_nobody_uses(tmp_path: Path) -> None:
    install = triton.TritonInstall(tmp_path, tmp_path, tmp_path, ())
    argv = triton.command(
        install,
        prepared=tmp_path,
        repository=tmp_path,
        ports=triton.TritonPorts("::", 1, 2),
        shm_prefix="octavo_x_",
        secret="s3cret",
    )
    assert "--allow-http=false" in argv
    assert "--grpc-address=[::]" in argv
    assert "--metrics-address=127.0.0.1" in argv
    [restricted] = [value for value in argv if value.startswith("--grpc-restricted-protocol=")]
    assert restricted.endswith("=s3cret")
    for protocol in ("shared-memory", "model-repository", "model-config", "logging", "trace", "statistics"):
        assert protocol in restricted
