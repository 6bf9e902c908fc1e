"""Kernels in triton-lang's interpreter against the reference, each file in a process of its own.

The interpreter is chosen when a kernel is defined, so it cannot share a process with the compiler's tests. Its bfloat16
arithmetic is wrong: float caches run in float32 and float16, bfloat16 is left to compilation and to a real card.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
CHECKS = [f"check_{name}.py" for name in ("attention", "sampling", "model", "products", "fp8", "rows")]

pytestmark = pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) >= "2.4.0", reason="triton-lang 3.6 interprets with numpy below 2.4 only"
)


def run(check: str, selection: str) -> None:
    """Run one file of checks under the interpreter; its report is the failure's message."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", selection]
    done = subprocess.run(
        [*command, str(HERE / "interpreted" / check)],
        cwd=HERE.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[None]]]:
    """The files that are asked for, two at a time: an interpreter is one thread."""
    asked = [item.callspec.params.get("check") for item in request.session.items if hasattr(item, "callspec")]
    with ThreadPoolExecutor(2) as pool:
        yield {check: pool.submit(run, check, "not slow") for check in CHECKS if check in asked}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("check", CHECKS)
def test_kernels_equal_the_reference(check: str, runs: dict[str, Future[None]]) -> None:
    runs[check].result()


@pytest.mark.slow
def test_long_attention_equals_the_reference() -> None:
    run("check_attention.py", "slow")


def test_every_file_of_checks_is_run() -> None:
    assert sorted(path.name for path in (HERE / "interpreted").glob("check_*.py")) == sorted(CHECKS)
