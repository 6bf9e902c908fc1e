"""Types that the kernel tests share."""

from __future__ import annotations

from collections.abc import Callable

from octavo.kernels.interface import Kernels

COMPILED = ("amx", "avx512", "avx2")
MakeKernels = Callable[[str, int], Kernels]  # (variant, number of threads)
