"""The GPU backend: one object made of a mixin per group of operations, on one CUDA device."""

from __future__ import annotations

import torch

from octavo.kernels.gpu.attention import GpuAttention
from octavo.kernels.gpu.device import read_limits
from octavo.kernels.gpu.experts import GpuGrouped
from octavo.kernels.gpu.moe import GpuMoe
from octavo.kernels.gpu.sampling import GpuSampling
from octavo.kernels.gpu.tuned_tiles import read_table

OLDEST = (8, 0)  # int8 tensor cores with asynchronous copies


class UnsupportedDevice(RuntimeError):
    """This device cannot run the kernels; the message says why."""


class GpuKernels(GpuGrouped, GpuAttention, GpuMoe, GpuSampling):
    """`interface.Kernels` on NVIDIA cards. One thread at a time may call it."""

    name = "gpu"

    def __init__(self, device: torch.device) -> None:
        """A CUDA device; a CPU only where triton-lang interprets its kernels. Raises UnsupportedDevice."""
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UnsupportedDevice("torch finds no CUDA device")
        self.device = device
        self._limits = read_limits(device)
        if device.type == "cuda":
            table = read_table(torch.cuda.get_device_name(device), self._limits)
            self.use_tiles(table.products)
            self.launch_dependents(table.dependent_launches)
        if self._limits.capability < OLDEST:
            major, minor = self._limits.capability
            raise UnsupportedDevice(f"the card has compute capability {major}.{minor}, the kernels need 8.0")
