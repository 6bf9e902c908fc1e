"""What the GPU backend and the engine reach on this very card, beside the goals.

    python benchmarks/gpu/bench.py [--quick] [--minutes 8] [--parts ceilings kernels engine server peers] [--json FILE]
    python benchmarks/gpu/bench.py --dry-run

Ceilings first: a copy and a bf16 product of this card. Then the operations alone, the engine on a checkpoint of an 8B
shape that is made on the device, the server where all it needs is installed, and other engines on the same shape. A
part that might not end within --minutes is left out, and said so. One table of goals comes last, with --json beside it:
that file is written after every line, so a run that is killed has left what it found.

A dry run walks through every part at toy sizes without a card (with TRITON_INTERPRET=1 on the kernels themselves): its
figures mean nothing, it shows that the first minute on a card is not lost to a slip.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import goals
import gpu_peers
import kernel_parts
from gpu_engine import engine_part
from gpu_model import LLAMA_8B, TOY, make_model
from gpu_server import server_part
from measure import Bench, CardClock, HostClock, Sizes
from report import EXIT_FAILED, Report

from octavo.kernels.choose import choose
from octavo.kernels.interface import Kernels
from octavo.kernels.reference import ReferenceKernels

DRY = Sizes(batch=2, context=150, rows=5, width=64)
LAST_SECONDS = 10.0  # for the table, and for what has to be ended
# The seconds that a part may take, its kernels not yet compiled; the order is that of what matters most. A part that
# would begin too late is left out, one that runs over its time leaves out what it has not begun.
PARTS = {"ceilings": 10, "kernels": 110, "engine": 150, "server": 90, "peers": 60}


def parts_of(bench: Bench, options: argparse.Namespace, deadline: float) -> dict[str, Callable[[], None]]:
    """What each part does."""
    shape = TOY if options.dry_run else LLAMA_8B
    device = bench.device.type

    def model() -> Path:
        return make_model(options.folder, shape, device=device)

    return {
        "ceilings": lambda: kernel_parts.ceilings(bench),
        "kernels": lambda: kernels(bench, quick=options.quick),
        "engine": lambda: engine_part(bench, model(), shape, quick=options.quick),
        "server": lambda: server_part(bench, model()),
        "peers": lambda: peers(bench, model(), deadline),
    }


def kernels(bench: Bench, *, quick: bool) -> None:
    """The operations alone."""
    with torch.inference_mode():
        kernel_parts.attention(bench)
        kernel_parts.products(bench, quick=quick)
        kernel_parts.head_and_sampling(bench)
        for limbs in (1,) if quick else (1, 2):
            if bench.has_time(f"layers limbs{limbs}"):
                kernel_parts.layers(bench, limbs=limbs, quick=quick)


def then_release(part: Callable[[], None], bench: Bench) -> None:
    """A part, then the card's memory is given back: the next part may be another process."""
    try:
        part()
    finally:
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def peers(bench: Bench, folder: Path, deadline: float) -> None:
    """Other engines, each in a process of its own that ends by the deadline."""
    sizes = (bench.sizes.of("batch", 48), bench.sizes.of("rows", 512), bench.sizes.of("rows", 64))
    for peer, name in (("transformers", "transformers"), ("vllm-bf16", "vllm bf16"), ("vllm-w8a8", "vllm w8a8")):
        left = min(gpu_peers.SECONDS, deadline - time.monotonic())
        found = gpu_peers.measure(peer, folder, sizes, bench.device.type, seconds=max(1.0, left))
        if isinstance(found, str):
            bench.lacks(name, found)
        else:
            bench.note(f"{name} {goals.OFFLINE}", found, "tok/s")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--dry-run", action="store_true", help="every part at toy sizes, without a card")
    parser.add_argument("--minutes", type=float, default=8.0, help="what all parts together may take")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--folder", type=Path, help="where the checkpoint is made, or was")
    parser.add_argument("--json", type=Path, help="where lines and goals go as JSON")
    options = parser.parse_args()
    if options.folder is None:
        options.folder = Path(tempfile.gettempdir()) / "octavo-bench" / ("toy" if options.dry_run else "llama-8b")
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device, and torch finds none (--dry-run needs none)")
    return options


def backend(*, dry_run: bool) -> Kernels:
    """The card's kernels; in a dry run the same in the interpreter, or else the reference."""
    if not dry_run:
        return choose("auto", device=torch.device("cuda"))
    if os.environ.get("TRITON_INTERPRET") == "1":
        from octavo.kernels.gpu.backend import GpuKernels

        return GpuKernels(torch.device("cpu"))
    return ReferenceKernels()


def main() -> int:
    options = arguments()
    torch.manual_seed(0)
    clock = HostClock() if options.dry_run else CardClock(repeats=10 if options.quick else 30)
    bench = Bench(backend(dry_run=options.dry_run), clock, DRY if options.dry_run else Sizes())
    card = "no card: a dry run" if options.dry_run else torch.cuda.get_device_name()
    print(f"{card}, torch {torch.__version__}, {platform.platform()}", flush=True)
    about = {"card": card, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "dry_run": options.dry_run}
    report = Report(bench, options.json, about)
    bench.kept = report.save
    seconds = options.minutes * 60 - LAST_SECONDS
    with report.watched(seconds):
        run_parts(report, options, began=time.monotonic(), seconds=seconds)
        if options.dry_run:
            print("a dry run: these figures mean nothing")
    return EXIT_FAILED if report.failed else 0


def run_parts(report: Report, options: argparse.Namespace, *, began: float, seconds: float) -> None:
    """One after the other; what would not end in time is left out."""
    for name, part in parts_of(report.bench, options, began + seconds).items():
        if name not in ("ceilings", *options.parts):
            continue
        used = time.monotonic() - began
        if used + PARTS[name] > seconds:
            report.left_out.append(name)
            print(f"{name}: left out, {used:.0f} s of {seconds:.0f} are used", flush=True)
            continue
        report.bench.until = time.monotonic() + PARTS[name]
        report.part(name, partial(then_release, part, report.bench))


if __name__ == "__main__":
    sys.exit(main())
