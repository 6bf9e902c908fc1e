"""Becomes another program that dies with node: `python -I -S guard.py SIGNAL PARENT_PID PROGRAM ARGUMENT...`.

Sets PR_SET_PDEATHSIG and executes PROGRAM in place, so the pid stays. The kernel watches the thread that forked: node
forks from its main thread only. Run as a file: it must start fast and import nothing of octavo.
"""

from __future__ import annotations

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    death_signal, parent, *program = arguments
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
    if os.getppid() != int(parent):  # it died before the call above
        sys.exit(1)
    try:
        os.execv(program[0], program)
    except OSError as error:
        sys.exit(f"octavo: error: cannot run {program[0]}: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])
