"""Every benchmark of the CPU path, one after the other; each is also a command of its own.

    python benchmarks/run_all.py [--parts engine served growth chat road peers] [--folder L1B]

    engine   ceilings; decode, prompts and a full load of the standard model        cpu.py
    served   the same model through HTTP and Triton, against the engine alone       served.py
    growth   cost against context, batch, queue and prefix cache                    growth.py
    chat     what the prefix cache saves                                            prefix_chat.py
    road     the road's cost with the demo model and with a stand-in engine         road.py
    peers    other engines on the same work, those given by --peer NAME=PYTHON      peers.py

Results are JSON and PNG files in benchmarks/results. Takes about a quarter of an hour; keep the machine quiet.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTS = ("engine", "served", "growth", "chat", "road", "peers")


def commands(folder: Path, peers: list[str], minutes: float) -> dict[str, list[str]]:
    """part -> script and its flags."""
    given = [word for peer in peers for word in ("--peer", peer)]
    return {
        "engine": ["cpu.py", "--folder", str(folder)],
        "served": ["served.py", "--folder", str(folder)],
        "growth": ["growth.py"],
        "chat": ["prefix_chat.py", "--folder", str(folder)],
        "road": ["road.py"],
        "peers": ["peers.py", "--folder", str(folder), "--minutes", str(minutes), *given],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=[part for part in PARTS if part != "peers"], choices=PARTS)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "octavo-bench" / "l1b")
    parser.add_argument("--peer", dest="peers", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--minutes", type=float, default=33.0, help="of the peers' session")
    arguments = parser.parse_args()
    parts = list(arguments.parts)
    if arguments.peers and "peers" not in parts:
        parts.append("peers")
    failed = []
    for part in [part for part in PARTS if part in parts]:
        began = time.monotonic()
        print(f"\n== {part}", flush=True)
        command = commands(arguments.folder, arguments.peers, arguments.minutes)[part]
        code = subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], check=False).returncode
        print(f"== {part}: {time.monotonic() - began:.0f} s, exit code {code}", flush=True)
        if code:
            failed.append(part)
    if failed:
        print(f"not all went well: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
