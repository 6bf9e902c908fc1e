"""Tests of the GPU kernels that need no GPU, only triton-lang; without it they are skipped."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from gpu.without_msgspec import provide

provide()  # before whole models run on the engine's classes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is below this folder if triton-lang is not installed."""
    if importlib.util.find_spec("triton") is None:
        for item in items:
            if "kernels_gpu" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason="triton-lang is not installed"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random inputs in every run."""
    torch.manual_seed(20261122)
