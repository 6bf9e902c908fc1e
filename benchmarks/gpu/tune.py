"""Writes the table of tiles of this card: for every product of a model, the tile that ran fastest here.

    python benchmarks/gpu/tune.py [--model FOLDER] [--limbs 1 2] [--minutes 8]

The backend reads that table when it is made, and nothing is tried while it serves. --model: a folder with config.json;
else a Llama-3-8B shape. A shape that comes after the time is left to the rules. A dry run (--dry-run) shows on a CPU
that the command works.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_model import LLAMA_8B, TOY, Shape, linears
from kernel_parts import random_product
from measure import Bench, CardClock, HostClock

from gpu.steps import LLAMA_8B as LAYER_8B
from gpu.steps import Layer, angles, captured, layout_of, run
from octavo.kernels.gpu.backend import GpuKernels
from octavo.kernels.gpu.tiles import Tile
from octavo.kernels.gpu.tuned_tiles import FOLDER, ROW_CLASSES, Choice, entry_name, file_of, row_class
from octavo.kernels.interface import ActivationFormat

ROWS = dict(zip(ROW_CLASSES, (16, 32, 48, 256, 4096)))  # what stands for each class


def fused(shape: Shape) -> list[tuple[int, int]]:
    """Outputs and inputs of a layer's products as the engine packs them, and of the head."""
    sizes = linears(shape)
    qkv = sum(sizes[f"self_attn.{name}_proj"][0] for name in "qkv")
    gate_up = sum(sizes[f"mlp.{name}_proj"][0] for name in ("gate", "up"))
    plain = [sizes["self_attn.o_proj"], sizes["mlp.down_proj"], (shape.vocab, shape.hidden)]
    return list(dict.fromkeys([(qkv, shape.hidden), (gate_up, shape.hidden), *plain]))


def candidates(rows: int, inputs: int, *, limbs: int, shared: int) -> Iterator[Choice]:
    """Tiles worth a try for so many rows."""
    if rows <= 64:
        tiles = [
            Tile(max(16, rows if rows != 48 else 64), n, k, 4, stages)
            for n in (32, 64, 128) for k in (128, 256) for stages in (3, 4, 6)
        ]  # fmt: skip
    else:
        tiles = [Tile(128, n, k, 8, stages) for n in (128, 256) for k in (64, 128) for stages in (3, 4)]
    for tile in tiles:
        if inputs % tile.block_k == 0 and tile.shared_bytes(limbs) <= shared:
            for parts in (1, 2, 4) if rows <= 64 and inputs >= 16 * tile.block_k else (1,):
                yield Choice(tile, parts)


def fastest(bench: Bench, size: tuple[int, int], rows: int, limbs: int) -> tuple[Choice, float] | None:
    """The best of the candidates and its milliseconds; None if none runs."""
    kernels, format = bench.kernels, ActivationFormat(limbs)
    assert isinstance(kernels, GpuKernels)
    packed = random_product(bench, size, format)
    x = kernels.quantize(torch.randn(rows, size[1], device=bench.device), format)
    residual = torch.randn(rows, size[0], device=bench.device)
    expected, found = kernels.linear(x, packed, residual=residual), []
    inputs = packed.weight.shape[1]  # type: ignore[attr-defined]
    name = entry_name(rows, size[0], inputs, limbs)
    tried = candidates(rows, inputs, limbs=limbs, shared=kernels.shared_bytes)
    choices = [choice for choice in tried if choice.has_counters(row_class(rows), size[0])]
    for choice in choices if bench.device.type == "cuda" else choices[:4]:  # a dry run tries a few
        kernels.use_tiles({name: choice})
        try:
            same = torch.equal(kernels.linear(x, packed, residual=residual), expected)
            milliseconds = bench.clock.milliseconds(lambda: kernels.linear(x, packed, residual=residual))
        except RuntimeError as error:  # more registers or shared memory than the card has
            print(f"{name}: {choice}: {str(error).splitlines()[0][:100]}", flush=True)
            continue
        if not same:
            raise SystemExit(f"{name}: {choice} gives other bits: this must not be used")
        found.append((milliseconds, choice))
    kernels.use_tiles({})
    best = min(found, key=lambda entry: entry[0], default=None)
    return None if best is None else (best[1], best[0])


def dependents_help(bench: Bench) -> bool:
    """Whether a recorded decode step is faster when its kernels are launched ahead. Its bits must stay."""
    kernels, times, results = bench.kernels, {}, {}
    assert isinstance(kernels, GpuKernels)
    layers = [Layer(kernels, LAYER_8B, limbs=1, blocks=256, seed=i) for i in range(4)]
    x, layout = torch.randn(16, LAYER_8B.hidden, device=bench.device), layout_of([1000] * 16, [1] * 16)
    table = angles(1024, LAYER_8B.heads.head_dim)
    for ahead in (False, True):
        kernels.launch_dependents(ahead)
        graph, results[ahead] = captured(lambda: run(layers, x.clone(), layout, table))
        times[ahead] = bench.clock.milliseconds(graph.replay)
    kernels.launch_dependents(False)
    if not torch.equal(results[False], results[True]):
        raise SystemExit("launching kernels ahead changes bits: this must not be used")
    print(f"a step of 4 layers: {times[False]:.4f} ms, kernels launched ahead {times[True]:.4f} ms", flush=True)
    return times[True] < times[False]


def shape_of(folder: Path) -> Shape:
    """A dense model's sizes from its config.json."""
    config = json.loads((folder / "config.json").read_text())
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    return Shape(
        hidden, config["num_hidden_layers"], heads, config.get("num_key_value_heads", heads),
        config.get("head_dim") or hidden // heads, config["intermediate_size"], config["vocab_size"],
    )  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with config.json")
    parser.add_argument("--limbs", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=FOLDER, help="the folder for the table")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("tiles are timed on a CUDA device, and torch finds none (--dry-run needs none)")
    if options.dry_run and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("a dry run needs TRITON_INTERPRET=1: it runs the kernels in the interpreter")
    return options


def main() -> None:
    options = arguments()
    torch.manual_seed(0)
    device = torch.device("cpu" if options.dry_run else "cuda")
    kernels, clock = GpuKernels(device), HostClock() if options.dry_run else CardClock(repeats=10)
    kernels.use_tiles({})  # not what was written before
    bench, began = Bench(kernels, clock), time.monotonic()
    default = TOY if options.dry_run else LLAMA_8B
    sizes = fused(shape_of(options.model) if options.model else default)
    products: dict[str, dict[str, int]] = {}
    work = [(rows, size, limbs) for rows in ROWS.values() for size in sizes for limbs in options.limbs]
    for rows, size, limbs in work[:1] if options.dry_run else work:
        if time.monotonic() - began > options.minutes * 60:
            print(f"{options.minutes:g} minutes are over: {rows} rows, {size} and what follows stay with the rules")
            break
        best = fastest(bench, size, rows, limbs)
        if best is None:
            continue
        choice, milliseconds = best
        inputs = -(-size[1] // 128) * 128
        products[entry_name(rows, size[0], inputs, limbs)] = {**asdict(choice.tile), "parts": choice.parts}
        print(f"{rows:5} rows {size} limbs {limbs}: {choice} {milliseconds:.4f} ms", flush=True)
    card = "dry run" if options.dry_run else torch.cuda.get_device_name()
    import triton

    found = {
        "card": card, "date": time.strftime("%Y-%m-%d"), "triton": triton.__version__, "products": products,
        "dependent_launches": not options.dry_run and torch.cuda.get_device_capability() >= (9, 0)
        and dependents_help(bench),
    }  # fmt: skip
    path = file_of(card, options.out)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
