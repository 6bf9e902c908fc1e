"""The real start command, starting the stand-in node."""

from __future__ import annotations

import sys
from pathlib import Path

from octavo.node.launch import main

if __name__ == "__main__":
    sys.exit(main(node=(sys.executable, str(Path(__file__).with_name("node.py")))))
