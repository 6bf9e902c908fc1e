"""The tests on a card end in time: what has not begun is named, and what hangs is shown."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFTEST = """
from gpu.time_limit import TimeLimit

def pytest_configure(config):
    config.pluginmanager.register(TimeLimit(config, seconds={seconds}, grace={grace}))
"""
TESTS = """
import time

def test_first():
    time.sleep({first})

def test_second():
    time.sleep({hangs})

def test_third():
    pass
"""


def run(folder: Path, *, seconds: float, grace: float, first: float, hangs: float) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text(CONFTEST.format(seconds=seconds, grace=grace))
    (folder / "test_it.py").write_text(TESTS.format(first=first, hangs=hangs))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-rs", "-p", "no:cacheprovider", "test_it.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_what_would_begin_too_late_is_left_out_by_name(tmp_path: Path) -> None:
    done = run(tmp_path, seconds=2.5, grace=60, first=2.6, hangs=0)  # a busy machine begins late
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 2 skipped" in done.stdout
    assert "left out: the 2 s that all may take are over" in done.stdout


def test_a_test_that_hangs_ends_the_run_and_is_shown(tmp_path: Path) -> None:
    done = run(tmp_path, seconds=2.5, grace=0.5, first=0.1, hangs=50)
    assert done.returncode == 3
    assert "test_first PASSED" in done.stdout
    assert "test_it.py::test_second has not ended" in done.stderr
    assert "in test_second" in done.stderr  # its stack
