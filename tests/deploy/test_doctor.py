"""`octavo doctor` and `start_server.sh --check`: what they look at, what they say, and that they change nothing."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from deploy.conftest import REPOSITORY
from octavo.cli import machine, server_checks
from octavo.node import run_dir
from octavo.node.run_dir import ProcessId, Record
from octavo.node.shared_memory import MIN_SHM_BYTES, shared_memory_trouble
from octavo.settings import Settings, SettingsError
from server.conftest import PORT_NAMES, free_ports

DEMO = REPOSITORY / "demo" / "model"


def environ_for(tmp_path: Path, **variables: str) -> dict[str, str]:
    """Free ports and folders that are not there yet."""
    ports = dict(zip(PORT_NAMES, map(str, free_ports(len(PORT_NAMES)))))
    keep = {name: value for name, value in os.environ.items() if name not in (*PORT_NAMES, "MODEL_DIR", "LOG_DIR")}
    environ = {**keep, "VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "HOST": "127.0.0.1"}
    return {**environ, **ports, "MODEL_DIR": str(DEMO), "RUN_DIR": str(tmp_path / "run"), **variables}


def check(environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(REPOSITORY / "start_server.sh"), "--check"]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=60)


def doctor(environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "octavo.cli.main", "doctor"]
    paths = {"PYTHONPATH": f"{REPOSITORY}/serving:{REPOSITORY}/client"}
    environ = {**environ, **paths}
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=60)


def test_check_says_that_all_is_well_and_leaves_nothing(tmp_path: Path) -> None:
    done = check(environ_for(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "octavo: settings, model folder, Triton and ports are in order"
    assert not (tmp_path / "run").exists()


def damaged(tmp_path: Path, name: str, text: str) -> Path:
    """The demo model with one file changed."""
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    (folder / name).write_text(text)
    return folder


def test_check_refuses_as_a_start_would(tmp_path: Path) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    port = str(taken.getsockname()[1])
    config = json.loads((DEMO / "config.json").read_text())
    foreign = damaged(tmp_path / "a", "config.json", json.dumps({**config, "architectures": ["MadeUpForCausalLM"]}))
    broken = damaged(tmp_path / "b", "tokenizer.json", "{")
    cut = damaged(tmp_path / "c", "model.safetensors", "short")
    cases = {
        "BATCH_SIZE=1000": (2, {"BATCH_SIZE": "1000"}),
        f"GRPC_PORT={port}: the port is in use": (3, {"GRPC_PORT": port}),
        "no such folder": (2, {"MODEL_DIR": str(tmp_path / "none")}),
        "MadeUpForCausalLM": (2, {"MODEL_DIR": str(foreign)}),
        "tokenizer.json": (2, {"MODEL_DIR": str(broken)}),
        "model.safetensors": (2, {"MODEL_DIR": str(cut)}),
        "no bin/tritonserver in it": (2, {"TRITONSERVER_HOME": str(tmp_path)}),
        "cannot be written": (2, {"LOG_DIR": f"{foreign}/config.json/log"}),
    }
    with taken:
        for words, (code, variables) in cases.items():
            done = check(environ_for(tmp_path, **variables))
            assert done.returncode == code, (words, done.stdout, done.stderr)
            assert words in done.stdout
            assert done.stdout.startswith("octavo: error: ")
            assert "Traceback" not in done.stderr


def test_the_doctor_tells_what_is_there(tmp_path: Path) -> None:
    done = doctor(environ_for(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("Python 3.", ": torch ", "CPU: ", "memory: ", "GPU: ", "/dev/shm: ", "Triton", "model: Llama"):
        assert words in done.stdout
    assert all(line.startswith(("ok ", "note ", "WRONG ")) for line in done.stdout.splitlines())
    assert not (tmp_path / "run").exists()


def test_the_doctor_tells_a_bad_setting_and_a_mistyped_name(tmp_path: Path) -> None:
    done = doctor(environ_for(tmp_path, DTYPE="float8"))
    assert done.returncode == 1
    assert "WRONG  DTYPE=float8" in done.stdout
    done = doctor(environ_for(tmp_path, BATCHSIZE="4"))
    assert done.returncode == 1
    assert "did you mean BATCH_SIZE?" in done.stdout


def test_what_a_killed_server_left_is_found(tmp_path: Path) -> None:
    environ = environ_for(tmp_path)
    settings = Settings.from_environ(environ)
    folder = tmp_path / "run"
    run_dir.make_run_dir(folder)
    dead = subprocess.Popen(["true"])
    dead.wait()
    own = ProcessId.of(os.getpid())
    assert own is not None
    record = Record(ProcessId(dead.pid, 1), 60, "octavo_00000000deadbeef_", children=(own,))
    run_dir.write_record(folder, record)
    region = Path("/dev/shm/octavo_00000000deadbeef_test")
    region.write_bytes(b"x")
    try:
        said = [finding.line for finding in server_checks.leftovers(settings)]
    finally:
        region.unlink()
    assert any(f"left over: {folder} of a killed server; still running: pid {own.pid}" in line for line in said)
    assert any("in /dev/shm that no running Triton uses" in line for line in said)


def test_ports_of_the_running_server_are_no_trouble(tmp_path: Path) -> None:
    settings = Settings.from_environ(environ_for(tmp_path))
    own = ProcessId.of(os.getpid())
    assert own is not None
    run_dir.make_run_dir(settings.run_dir)
    ports = {name: getattr(settings, name.lower()) for name in server_checks.PUBLIC_PORTS}
    run_dir.write_record(settings.run_dir, Record(own, 60, "octavo_0123456789abcdef_", ports=ports))
    with socket.create_server(("127.0.0.1", settings.grpc_port)):
        findings = list(server_checks._ports(settings))
    assert not any(finding.stops for finding in findings)
    assert any("this server is running" in finding.text for finding in findings)


def test_small_shared_memory_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shared_memory_trouble(tmp_path / "none") is not None
    usage = shutil.disk_usage(tmp_path)
    assert (shared_memory_trouble(tmp_path) is None) == (usage.free >= MIN_SHM_BYTES)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=64 << 20, free=60 << 20))
    trouble = shared_memory_trouble(tmp_path)
    assert trouble is not None
    assert "60 MiB free of 64" in trouble
    assert "--shm-size" in trouble
    assert "\n" not in trouble


def test_a_root_without_any_folder_to_write_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    with pytest.raises(SettingsError, match="--tmpfs /tmp"):
        Settings.from_environ({})


def test_limits_of_a_control_group_are_read(tmp_path: Path) -> None:
    file = tmp_path / "limit"
    file.write_text("150000 100000\n")
    assert machine.cpu_quota(file) == 1.5
    file.write_text("max 100000\n")
    assert machine.cpu_quota(file) is None
    file.write_text("1073741824\n")
    assert machine.memory_limit(file) == 1 << 30
    assert machine.memory_limit(tmp_path / "none") is None
    file.write_text("processor\t: 0\nflags\t\t: fpu avx2 fma f16c\n\nprocessor\t: 1\n")
    assert machine.cpu_flags(file) == {"fpu", "avx2", "fma", "f16c"}
