"""How the C library keeps what is freed. Set once in the process that makes a checkpoint.

glibc serves blocks of up to 32 MiB from a heap as soon as one of them was freed, and a heap only shrinks at its end:
half as much again as is in use stays resident between the steps of a layer. Blocks of their own go back when freed.
"""

from __future__ import annotations

import ctypes

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of malloc.h
BLOCK_BYTES = 1 << 20  # from this size on


def return_freed_blocks() -> None:
    """For the rest of the process; a C library without mallopt stays as it is."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter in (MMAP_THRESHOLD, TRIM_THRESHOLD):
            mallopt(ctypes.c_int(parameter), ctypes.c_int(BLOCK_BYTES))
