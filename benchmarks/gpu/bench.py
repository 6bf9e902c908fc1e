"""What the GPU backend and the engine reach on this very card, beside the goals.

    python benchmarks/gpu/bench.py [--quick] [--minutes 8] [--parts ceilings kernels engine server peers] [--json FILE]
    python benchmarks/gpu/bench.py --dry-run

Ceilings first: a copy and a bf16 product of this card. Then the operations alone, the engine on a checkpoint of an 8B
shape that is made on the device, the server where all it needs is installed, and other engines on the same shape. A
part that might not end within --minutes is left out, and said so. One table of goals comes last.

A dry run walks through every part at toy sizes without a card (with TRITON_INTERPRET=1 on the kernels themselves): its
figures mean nothing, it shows that the first minute on a card is not lost to a slip.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
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

from octavo.kernels.choose import choose
from octavo.kernels.interface import Kernels
from octavo.kernels.reference import ReferenceKernels

DRY = Sizes(batch=2, context=150, rows=5, width=64)
# The most seconds that a part has been allowed for; the order is that of what matters most.
PARTS = {"ceilings": 5, "kernels": 60, "engine": 120, "server": 90, "peers": 60}


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
            kernel_parts.layers(bench, limbs=limbs, quick=quick)


def release(bench: Bench) -> None:
    """Give the card's memory back: the next part may be another process."""
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
            print(f"{name}: no figure: {found}", flush=True)
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


def main() -> None:
    options = arguments()
    torch.manual_seed(0)
    made = backend(dry_run=options.dry_run)
    clock = HostClock() if options.dry_run else CardClock(repeats=10 if options.quick else 30)
    bench = Bench(made, clock, DRY if options.dry_run else Sizes())
    card = "no card: a dry run" if options.dry_run else torch.cuda.get_device_name()
    print(f"{card}, torch {torch.__version__}, {platform.platform()}", flush=True)
    began, left_out = time.monotonic(), []
    for name, part in parts_of(bench, options, began + options.minutes * 60).items():
        if name not in ("ceilings", *options.parts):
            continue
        used = time.monotonic() - began
        if used + PARTS[name] > options.minutes * 60:
            left_out.append(name)
            print(f"{name}: left out, {used:.0f} s of {options.minutes:g} minutes are used", flush=True)
            continue
        part()
        release(bench)
        print(f"-- {name}: {time.monotonic() - began - used:.1f} s", flush=True)
    rows = goals.table(bench)
    if options.dry_run:
        print("a dry run: these figures mean nothing")
    if options.json:
        found = {
            "card": card, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "dry_run": options.dry_run,
            "left_out": left_out, "lines": [asdict(line) for line in bench.lines.values()], "goals": rows,
        }  # fmt: skip
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
