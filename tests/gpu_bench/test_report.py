"""A run on a card that fails, hangs, or is killed has left on disk what it measured until then."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"))

import gpu_peers
import gpu_server
from gpu_model import TOY, make_model
from measure import Bench, HostClock

from octavo.kernels.reference import ReferenceKernels

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import subprocess, sys, time
from pathlib import Path
from measure import Bench, HostClock
from report import Report
from octavo.kernels.reference import ReferenceKernels

bench = Bench(ReferenceKernels(), HostClock())
report = Report(bench, Path(sys.argv[2]), {"card": "none"})
bench.kept = report.save

def first():
    bench.note("engine 48 streams", 100.0, "tok/s")

def bad():
    bench.note("half", 1.0, "s")
    raise {"error": RuntimeError, "exit": SystemExit}[sys.argv[1]]("CUDA error: no luck\\nmore")

def hangs():
    child = subprocess.Popen(["sleep", "100"])
    print("child", child.pid, flush=True)
    time.sleep(100)

def last():
    bench.note("server 48 streams", 96.0, "tok/s")

middle = bad if sys.argv[1] in ("error", "exit") else hangs
with report.watched(float(sys.argv[3])):
    for part in (first, middle, last):
        report.part(part.__name__, part)
"""


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def start(kind: str, out: Path, seconds: float) -> subprocess.Popen[str]:
    paths = os.pathsep.join(str(ROOT / name) for name in ("benchmarks/gpu", "serving", "tests"))
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, kind, str(out), str(seconds)],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def child_of(process: subprocess.Popen[str]) -> int:
    """Waits until the part that hangs has said so."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("child"):
            return int(line.split()[1])
    raise AssertionError("no child")


def gone(pid: int) -> bool:
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("kind", ["error", "exit"])
def test_a_part_that_fails_costs_no_other_part_its_figures(
    kind: str, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    out = tmp_path / "out.json"
    started.append(start(kind, out, 100))
    printed, _ = started[0].communicate(timeout=60)
    found = json.loads(out.read_text())
    assert [line["name"] for line in found["lines"]] == ["engine 48 streams", "half", "server 48 streams"]
    assert list(found["failed"]) == ["bad"]
    assert "CUDA error: no luck" in found["failed"]["bad"]
    assert found["ended"] == "done"
    row = next(row for row in found["goals"] if row["name"] == "48 streams, server / engine")
    assert row["found"] == pytest.approx(0.96)
    assert "failed: bad: " in printed
    assert list(found["seconds"]) == ["first", "bad", "last"]


def test_a_run_that_hangs_ends_in_time_with_a_table(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    out = tmp_path / "out.json"
    started.append(start("hangs", out, 1.0))
    child = child_of(started[0])
    printed, _ = started[0].communicate(timeout=30)
    assert started[0].returncode == 3
    assert gone(child)
    assert "stopped after 1 s" in printed
    assert "transformers generate_batch" in printed  # the table
    found = json.loads(out.read_text())
    assert found["ended"].startswith("stopped after 1 s")
    assert [line["name"] for line in found["lines"]] == ["engine 48 streams"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_killed_has_left_its_lines(
    number: signal.Signals, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    out = tmp_path / "out.json"
    started.append(start("hangs", out, 100))
    child = child_of(started[0])
    started[0].send_signal(number)
    printed, _ = started[0].communicate(timeout=30) if number == signal.SIGTERM else ("", None)
    started[0].wait(30)
    found = json.loads(out.read_text())
    assert [line["name"] for line in found["lines"]] == ["engine 48 streams"]
    if number == signal.SIGTERM:
        assert found["ended"] == "stopped by a signal"
        assert "transformers generate_batch" in printed
        assert gone(child)
    else:
        assert found["ended"] == "under way"
        os.kill(child, signal.SIGKILL)


def test_an_engine_that_fails_says_why_and_one_that_hangs_leaves_no_process(tmp_path: Path) -> None:
    def python(code: str) -> list[str]:
        return [sys.executable, "-c", code]

    assert gpu_peers.run(python("print('x'); print('{\"tokens_per_second\": 12.5}')"), 20) == 12.5
    failing = "import sys; print('Traceback'); sys.exit('ValueError: no such module\\nLoading: 67%')"
    assert gpu_peers.run(python(failing), 20) == "ValueError: no such module"
    assert gpu_peers.run(python("import os; os.kill(os.getpid(), 9)"), 20) == "ended with -9 and said nothing"
    noted = tmp_path / "pid"
    hangs = f"""
import subprocess, time
child = subprocess.Popen(["sleep", "100"])
open({str(noted)!r}, "w").write(str(child.pid))
time.sleep(100)
"""
    assert gpu_peers.run(python(hangs), 2.0) == "not done after 2 s"
    assert gone(int(noted.read_text()))


def test_vllm_gets_the_same_weights_with_a_float_head(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "toy", TOY, device="cpu")
    other = gpu_peers.with_float_head(folder)
    assert json.loads((other / "config.json").read_text())["quantization_config"]["ignore"] == ["lm_head"]
    places = json.loads((other / "model.safetensors.index.json").read_text())["weight_map"]
    assert "lm_head.weight_scale" not in places
    assert all((other / name).exists() for name in set(places.values()))
    with safe_open(folder / "rest.safetensors", "pt") as before, safe_open(other / "rest.safetensors", "pt") as after:
        head = after.get_tensor("lm_head.weight")
        exact = before.get_tensor("lm_head.weight").float() * before.get_tensor("lm_head.weight_scale").float()
    assert head.dtype == torch.bfloat16
    assert torch.allclose(head.float(), exact, rtol=2**-7)


def test_a_server_that_cannot_run_is_left_out_and_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    if Path("/opt/tritonserver").is_dir():
        pytest.skip("there is a Triton of another build")
    monkeypatch.setattr(gpu_server, "version", lambda name: "2.5.2")
    assert "numpy below 2" in gpu_server.missing()
    bench = Bench(ReferenceKernels(), HostClock())
    gpu_server.server_part(bench, Path("nowhere"))
    assert "numpy below 2" in bench.missing["server"]


def test_the_same_shape_without_quantization(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "toy", TOY, device="cpu")
    assert "quantization_config" not in json.loads((gpu_peers.without_quantization(folder) / "config.json").read_text())
