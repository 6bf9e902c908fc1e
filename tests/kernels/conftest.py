"""Backends under test: the reference, and every compiled variant that this processor can run."""

from __future__ import annotations

import pytest
import torch

from kernels.backends import COMPILED, MakeKernels
from octavo.kernels.choose import NEEDED_FLAGS, NoSuchKernels, choose, cpu_flags
from octavo.kernels.interface import Kernels


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random inputs in every run."""
    torch.manual_seed(20261121)


@pytest.fixture(scope="session")
def reference() -> Kernels:
    """The specification."""
    return choose("reference", device=torch.device("cpu"))


@pytest.fixture(scope="session")
def make_kernels() -> MakeKernels:
    """make_kernels(variant, num_threads): one object per pair; skips what the processor or the image lacks."""
    made: dict[tuple[str, int], Kernels] = {}

    def make(variant: str, num_threads: int) -> Kernels:
        if variant != "reference" and not NEEDED_FLAGS[variant] <= cpu_flags():
            pytest.skip(f"this processor has no {variant}")
        try:
            if (variant, num_threads) not in made:
                made[variant, num_threads] = choose(variant, device=torch.device("cpu"), num_threads=num_threads)
        except NoSuchKernels as error:
            if "no C++ compiler" in str(error) or "tile registers" in str(error):
                pytest.skip(str(error))
            raise
        return made[variant, num_threads]

    return make


@pytest.fixture(scope="session", params=COMPILED)
def fast(request: pytest.FixtureRequest, make_kernels: MakeKernels) -> Kernels:
    """A compiled backend with two threads."""
    return make_kernels(request.param, 2)


@pytest.fixture(scope="session", params=[*COMPILED, "reference"])
def every(request: pytest.FixtureRequest, make_kernels: MakeKernels) -> Kernels:
    """Any backend: compiled ones and the reference."""
    return make_kernels(request.param, 2)
