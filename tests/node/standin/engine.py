"""A stand-in for the engine process: lives until SIGTERM. STANDIN_ENGINE_EXIT makes it fail at once with that code."""

from __future__ import annotations

import os
import signal
import sys

if code := os.environ.get("STANDIN_ENGINE_EXIT"):
    print("octavo: error: the stand-in has no model", file=sys.stderr)
    sys.exit(int(code))

signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
while True:
    signal.pause()
