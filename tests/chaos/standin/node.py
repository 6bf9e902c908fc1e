"""The real node, gateway and Triton around the flawed engine."""

from __future__ import annotations

import sys
from pathlib import Path

from octavo.node.__main__ import main
from octavo.node.programs import Programs

if __name__ == "__main__":
    sys.exit(main(Programs(engine=(sys.executable, str(Path(__file__).with_name("engine.py"))))))
