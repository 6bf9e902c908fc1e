"""What all mixins of the GPU backend share: the device, checks of arguments, and the numbers of a launch.

Runs in the runner's worker thread. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor


@dataclass(frozen=True)
class DeviceLimits:
    """What a kernel may count on."""

    capability: tuple[int, int]
    shared_bytes: int  # of one program
    processors: int = 108  # that run programs at the same time


class GpuBase:
    """A device and its limits."""

    device: torch.device
    _limits: DeviceLimits
    _launch: Mapping[str, bool] = MappingProxyType({})  # options of the kernels of a decode step

    @property
    def launches_dependents(self) -> bool:
        """Whether a kernel of a step may be launched before the one ahead of it has ended (sm_90 and later)."""
        return bool(self._launch)

    def launch_dependents(self, on: bool) -> None:
        """Switch that on or off, for what is recorded or run from now on. Raises ValueError on older cards."""
        if on and self._limits.capability < (9, 0):
            raise ValueError("dependent launches begin with compute capability 9.0")
        self._launch = {"PDL": True, "launch_pdl": True} if on else {}


def checked(x: Tensor, dtype: torch.dtype, shape: tuple[int, ...], name: str) -> Tensor:
    """x, contiguous. Raises ValueError unless it has this dtype and shape (-1: any)."""
    fits = x.dim() == len(shape) and all(want in (-1, have) for want, have in zip(shape, x.shape))
    if x.dtype != dtype or not fits:
        raise ValueError(f"{name} must be {dtype} {list(shape)}, not {x.dtype} {list(x.shape)}")
    return x.contiguous()


def power_of_two(count: int) -> int:
    """The smallest power of two that is not below `count`."""
    return 1 << max(0, count - 1).bit_length()


def round_up(count: int, multiple: int) -> int:
    """The smallest multiple that is not below `count`."""
    return -(-count // multiple) * multiple


def row_warps(block: int) -> int:
    """Warps of a program that holds a row of `block` numbers: at most 32 numbers a thread, at least 4 warps."""
    return min(32, max(4, block // 1024))


def read_limits(device: torch.device) -> DeviceLimits:
    """The limits of a CUDA device; those of an A100 for a CPU, where kernels are interpreted."""
    if device.type != "cuda":
        return DeviceLimits((8, 0), 163840)
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 101376)
    return DeviceLimits((properties.major, properties.minor), int(shared), properties.multi_processor_count)
