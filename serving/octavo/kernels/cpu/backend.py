"""The CPU backend: one object made of a mixin per group of operations over one compiled library and one thread pool."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

from octavo.kernels.cpu import attention, cache, layers, moe, products, rows, sampling
from octavo.kernels.cpu.attention import CpuAttention
from octavo.kernels.cpu.build import library_path
from octavo.kernels.cpu.layers import CpuLayers
from octavo.kernels.cpu.library import WeightMemory, create_pool, load_library
from octavo.kernels.cpu.moe import CpuMoe
from octavo.kernels.cpu.products import CpuProducts
from octavo.kernels.cpu.rows import CpuRows
from octavo.kernels.cpu.sampling import CpuSampling

SIGNATURES = {
    "octavo_advise_huge_pages": "pi",
    **products.SIGNATURES,
    **rows.SIGNATURES,
    **cache.SIGNATURES,
    **attention.SIGNATURES,
    **moe.SIGNATURES,
    **layers.SIGNATURES,
    **sampling.SIGNATURES,
}


class CpuKernels(CpuProducts, CpuRows, CpuAttention, CpuMoe, CpuLayers, CpuSampling):
    """`interface.Kernels` on x86 processors. One thread at a time may call it."""

    def __init__(self, variant: str, *, folder: Path, num_threads: int | None = None) -> None:
        """Load the library of `variant` from `folder` and start its threads (default: one per processor allowed).

        "amx" is "avx512" with tile registers. Raises OSError if it cannot be loaded. Running it on a
        processor without `variant` is fatal: ask `choose` instead.
        """
        self.name = variant
        self.device = torch.device("cpu")
        path = library_path(folder, variant)
        self._lib = load_library(path, SIGNATURES)
        self._quick = load_library(path, SIGNATURES, opener=ctypes.PyDLL)
        threads = num_threads or len(os.sched_getaffinity(0))
        self._pool = create_pool(self._lib, threads, tiles=variant == "amx", owner=self)
        self._memory = WeightMemory(self._lib)
