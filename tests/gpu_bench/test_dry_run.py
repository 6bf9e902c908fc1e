"""The benchmark of a card and its tuner, walked through without one: every part, at toy sizes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "benchmarks" / "gpu" / "bench.py"
TUNE = ROOT / "benchmarks" / "gpu" / "tune.py"
interprets = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="needs triton-lang 3.6, which interprets with numpy below 2.4 only",
)


def run(script: Path, *words: str, interpret: bool = False) -> str:
    """What it prints; the test fails if it does."""
    environ = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, str(script), "--dry-run", *words],
        env=environ,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_every_goal_of_the_kernels_and_the_engine_is_read_from_a_line(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    run(BENCH, "--parts", "kernels", "engine", "--folder", str(tmp_path / "toy"), "--json", str(out))
    found = json.loads(out.read_text())
    measured = {row["name"] for row in found["goals"] if row["found"] is not None}
    left = {row["name"] for row in found["goals"]} - measured
    assert left == {"48 streams, server / engine", "transformers generate_batch", "vLLM 0.26, bf16", "vLLM 0.26, W8A8"}
    assert found["dry_run"] is True
    assert found["left_out"] == []
    assert found["failed"] == found["missing"] == {}
    assert found["ended"] == "done"
    error = next(row for row in found["goals"] if row["name"] == "its error against float64")
    assert error["found"] < 5e-4  # the one figure that means something without a card


@pytest.mark.slow
@interprets
def test_the_kernels_themselves_run_in_the_interpreter(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    run(BENCH, "--parts", "kernels", "--quick", "--json", str(out), interpret=True)
    names = [line["name"] for line in json.loads(out.read_text())["lines"]]
    assert "attention b48 4096" in names
    assert any(name.startswith("w8a16 m2048") for name in names)


@interprets
def test_the_tuner_writes_a_table_that_the_backend_reads(tmp_path: Path) -> None:
    printed = run(TUNE, "--out", str(tmp_path), "--limbs", "1", interpret=True)
    path = tmp_path / "dry-run.json"
    assert f"wrote {path}" in printed
    (entry,) = json.loads(path.read_text())["products"].values()
    assert set(entry) == {"block_m", "block_n", "block_k", "num_warps", "num_stages", "parts"}


@pytest.mark.slow
def test_the_server_and_other_engines_too(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    run(BENCH, "--parts", "server", "peers", "--folder", str(tmp_path / "toy"), "--json", str(out))
    names = [line["name"] for line in json.loads(out.read_text())["lines"]]
    assert "server 48 streams" in names
    assert "transformers offline 48 x (512 + 64)" in names


def test_without_a_card_it_says_so() -> None:
    for script in (BENCH, TUNE):
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
        if "needs a CUDA device" not in done.stderr and "torch finds none" not in done.stderr:
            pytest.skip("there is a card")
        assert done.returncode == 1
