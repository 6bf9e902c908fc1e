"""How much room /dev/shm has: Triton talks to its Python backend through files there.

Start command, node's main thread and the doctor. An engine of containers gives 64 MiB where nobody asks for more.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from octavo.node.run_dir import SHARED_MEMORY

MIN_SHM_BYTES = 256 << 20  # 4 MiB bodies in both directions for a full queue, with room to spare
REMEDY = "give the container more (docker run --shm-size=5g; Kubernetes: an emptyDir of medium Memory)"


def shared_memory_trouble(folder: Path = SHARED_MEMORY) -> str | None:
    """One line if /dev/shm is missing or too small; None if it is in order."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return f"{folder} is missing; Triton's Python backend needs it: {REMEDY}"
    if usage.free >= MIN_SHM_BYTES:
        return None
    sizes = f"{usage.free >> 20} MiB free of {usage.total >> 20}"
    return f"{folder} is small ({sizes}; {MIN_SHM_BYTES >> 20} wanted): many or long requests may fail; {REMEDY}"


def warn_small_shared_memory() -> None:
    """Say so on standard error, in one line."""
    if (trouble := shared_memory_trouble()) is not None:
        print(f"octavo: warning: {trouble}", file=sys.stderr, flush=True)
