"""Runs the real node with stand-ins for engine, gateway and front end; Triton is the real one."""

from __future__ import annotations

import sys
from pathlib import Path

from octavo.node.__main__ import main
from octavo.node.programs import Programs

HERE = Path(__file__).parent

if __name__ == "__main__":
    sys.exit(
        main(
            Programs(
                engine=(sys.executable, str(HERE / "engine.py")),
                gateway=(sys.executable, str(HERE / "gateway.py")),
                model_repository=HERE / "model_repository",
            )
        )
    )
