"""`octavo quantize` on the standard 1B model in bfloat16: memory, time, and going on after kill -9.

    python benchmarks/quantizing.py [--folder DIR] [--layers 16] [--scheme a8w8c8] [--kill-every SECONDS] [--whole]

Makes the model (random weights by a seed, 2.3 GB, outside the repository) and some text, once, and runs the command
as a user would, on `--threads` threads. With `--kill-every` the process is killed that many seconds after its start
and the same command is given again, until the folder is there; `--once` ends this program at the first kill, so that a
machine can be shared: give the same line again to go on. `--whole` makes a second folder in one go and compares bits.
Writes benchmarks/results/quantizing_LAYERS.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from meter import processor
from standard_model import LAYERS, VOCAB, make_float_model

HERE = Path(__file__).resolve().parent
TOKENS, SAMPLES = 512, 10  # of a sequence; sequences, of which one in five is measured on
MIB = 1 << 20


def write_text(path: Path) -> Path:
    """Random words, the same ones every time."""
    rng = random.Random(0)
    lines = [" ".join(f"t{rng.randrange(3, VOCAB)}" for _ in range(TOKENS)) for _ in range(SAMPLES)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def command(model: Path, out: Path, scheme: str) -> list[str]:
    """What a user types."""
    words = [sys.executable, "-m", "octavo.cli.main", "quantize", str(model), "--scheme", scheme]
    words += ["--calibration", str(write_text(model / "text.jsonl")), "--out", str(out), "--no-ablation", "--quiet"]
    return [*words, "--samples", str(SAMPLES), "--max-tokens", str(TOKENS)]


def finished_layers(out: Path) -> int:
    """Of an unfinished run."""
    try:
        return int(json.loads((out.with_name(f"{out.name}.partial") / "notes.json").read_text())["next_layer"])
    except (OSError, ValueError):
        return 0


def memory_of(pid: int) -> dict[str, int]:
    """Bytes by their names in /proc; empty when the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines if line.endswith(" kB"))
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in pairs}


def run(words: list[str], out: Path, *, threads: int, seconds: float | None) -> dict[str, object]:
    """One process until it ends or is killed. Peaks: of all resident pages, and of those that are no file's."""
    first, started, peak, anonymous = finished_layers(out), time.monotonic(), 0, 0
    environ = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(words, env=environ, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            seen = memory_of(process.pid)
            peak, anonymous = max(peak, seen.get("VmHWM", 0)), max(anonymous, seen.get("RssAnon", 0))
            if seconds is not None and time.monotonic() - started > seconds:
                process.kill()
            time.sleep(0.05)
    return {
        "from_layer": first,
        "to_layer": finished_layers(out),
        "exit": process.returncode,
        "seconds": round(time.monotonic() - started, 1),
        "peak_mib": peak // MIB,
        "peak_anonymous_mib": anonymous // MIB,
    }


def digests(folder: Path) -> dict[str, str]:
    """Of the weights and of the report."""
    names = sorted([*folder.glob("*.safetensors"), folder / "report.json"])
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


def runs(words: list[str], out: Path, notes: Path, args: argparse.Namespace) -> list[dict[str, object]]:
    """Every run so far, those of earlier calls too; the last made the folder, unless `--once`."""
    found: list[dict[str, object]] = json.loads(notes.read_text()) if notes.is_file() else []
    while not out.is_dir():
        found.append(run(words, out, threads=args.threads, seconds=args.kill_every))
        print(found[-1], flush=True)
        notes.write_text(json.dumps(found))
        if found[-1]["exit"] not in (0, -9):
            raise SystemExit("octavo quantize failed")
        if args.once:
            break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "octavo-quantizing")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--scheme", default="a8w8c8")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--kill-every", type=float, metavar="SECONDS", default=None)
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--whole", action="store_true")
    args = parser.parse_args()
    model, out = args.folder / f"float-{args.layers}", args.folder / f"made-{args.layers}-{args.scheme}"
    make_float_model(model, num_layers=args.layers)
    found = runs(command(model, out, args.scheme), out, out.with_suffix(".json"), args)
    if not out.is_dir():
        return
    figures: dict[str, object] = {"processor": processor(), "layers": args.layers, "scheme": args.scheme}
    figures |= {"threads": args.threads, "tokens": TOKENS * SAMPLES, "runs": found}
    if args.whole:
        whole = out.with_name(f"{out.name}-whole")
        figures["whole"] = run(command(model, whole, args.scheme), whole, threads=args.threads, seconds=None)
        figures["same_bits"] = digests(out) == digests(whole)
    results = HERE / "results" / f"quantizing_{args.layers}.json"
    results.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
