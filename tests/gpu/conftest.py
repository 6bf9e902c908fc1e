"""Tests that need a card: `make test-gpu`. Skipped without one. They make their own inputs on the device."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from gpu.time_limit import TimeLimit
from gpu.without_msgspec import provide
from octavo.kernels.choose import choose
from octavo.kernels.interface import Kernels
from octavo.kernels.reference import ReferenceKernels

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"))
provide()  # before the engine's tests are imported
SECONDS, GRACE = 430, 30  # a lent card is there for eight minutes at a time


def pytest_sessionstart(session: pytest.Session) -> None:
    """Only where there is a card, and these tests were asked for by name: else this file is read after the start."""
    if torch.cuda.is_available():
        config = session.config
        config.pluginmanager.register(TimeLimit(config, seconds=SECONDS, grace=GRACE), "gpu-time-limit")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is below this folder where torch finds no card."""
    if not torch.cuda.is_available():
        for item in items:
            if item.path.parent.name == "gpu":
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def gpu() -> Kernels:
    """The GPU backend, proven by its self-test."""
    return choose("auto", device=torch.device("cuda"))


@pytest.fixture(scope="session")
def reference() -> Kernels:
    """The specification, on the CPU."""
    return ReferenceKernels()


@pytest.fixture(scope="session")
def large_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of an 8B shape, 9 GB, made once for all that load it."""
    from gpu_model import LLAMA_8B, make_model

    return make_model(tmp_path_factory.mktemp("large"), LLAMA_8B)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random inputs in every run."""
    torch.manual_seed(20261123)
