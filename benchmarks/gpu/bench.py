"""What the GPU kernels reach on this very card: ceilings first, then attention, products, whole steps and prefill.

Run `python benchmarks/gpu/bench.py [--quick] [--json FILE]` on a machine with a card; it needs no network and makes its
weights on the device. Every figure is a median of repeated runs with a cold L2, set beside the ceiling measured here.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from gpu.steps import DEVICE, LLAMA_8B, Layer, angles, captured, layout_of, num_blocks, run
from octavo.kernels.choose import choose
from octavo.kernels.interface import ActivationFormat, CacheSpec, Kernels, Quantized

LAYERS = 32
GOALS = {"decode step b48 1k": 0.75, "decode step b1 1k": 0.60, "attention b48 4096": 0.80, "int8 gemm m16": 0.85}


@dataclass(frozen=True)
class Line:
    """One measurement. `share`: of the copy bandwidth, or of the bf16 product's rate, as `of` says."""

    name: str
    milliseconds: float
    rate: float  # TB/s, TOPS or tokens/s
    unit: str
    share: float | None = None
    of: str = ""


class Bench:
    """Times work on the device and keeps the lines."""

    def __init__(self, kernels: Kernels, *, repeats: int) -> None:
        self.kernels = kernels
        self.lines: list[Line] = []
        self.bandwidth = 0.0  # bytes per second, read and written, of a copy
        self.bf16 = 0.0  # operations per second of a bf16 product
        self._repeats = repeats
        self._flush = torch.empty(256 << 20, dtype=torch.int8, device=DEVICE)

    def time(self, work: Callable[[], object]) -> float:
        """Median milliseconds with a cold L2."""
        for _ in range(3):
            work()
        times = []
        for _ in range(self._repeats):
            self._flush.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return statistics.median(times)

    def add(
        self, name: str, milliseconds: float, *, moved: float = 0, operations: float = 0, tokens: float = 0
    ) -> None:
        """Keep and print a line: bytes against the copy, operations against bf16, or tokens with bytes."""
        seconds = milliseconds / 1000
        if tokens:
            share = moved / seconds / self.bandwidth if moved else None
            line = Line(name, milliseconds, tokens / seconds, "tok/s", share, "copy" if moved else "")
        elif operations:
            line = Line(
                name, milliseconds, operations / seconds / 1e12, "TOPS", operations / seconds / self.bf16, "bf16"
            )
        else:
            line = Line(name, milliseconds, moved / seconds / 1e12, "TB/s", moved / seconds / self.bandwidth, "copy")
        self.lines.append(line)
        share_text = "" if line.share is None else f"{line.share:7.2f} of {line.of}"
        print(f"{name:34} {milliseconds:9.4f} ms {line.rate:12.2f} {line.unit:6}{share_text}", flush=True)


def ceilings(bench: Bench) -> None:
    """Copy bandwidth and bf16 rate of this card: every later line is set against them."""
    source = torch.randint(-127, 128, (2 << 30,), dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    milliseconds = bench.time(lambda: target.copy_(source))
    bench.bandwidth = 2 * source.numel() / (milliseconds / 1000)
    bench.add("copy 2 GiB", milliseconds, moved=2 * source.numel())
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    milliseconds = bench.time(lambda: a @ b)
    bench.bf16 = 2 * 8192**3 / (milliseconds / 1000)
    bench.add("bf16 product 8192", milliseconds, operations=2 * 8192**3)


def attention(bench: Bench) -> None:
    """Decode attention of one layer over an int8 cache."""
    heads = LLAMA_8B.heads
    for batch, context in ((48, 1024), (48, 4096), (1, 4096), (1, 32768)):
        lengths = [context] * batch
        cache = bench.kernels.make_cache(CacheSpec(8, 128, torch.int8), num_blocks(lengths))
        for plane in (cache.k, cache.v):  # type: ignore[attr-defined]
            plane.random_(-127, 128)
        for plane in (cache.k_scale, cache.v_scale):  # type: ignore[attr-defined]
            plane.uniform_(0.001, 0.02)
        layout, q = layout_of(lengths, [1] * batch), torch.randn(batch, 4096, device=DEVICE)
        milliseconds = bench.time(
            lambda q=q, layout=layout, cache=cache: bench.kernels.attention(q, layout, heads, cache)
        )
        bench.add(f"attention b{batch} {context}", milliseconds, moved=batch * context * 8 * 2 * (128 + 4))


def products(bench: Bench, *, quick: bool) -> None:
    """Int8 products of one and two limbs: bytes up to 64 rows, operations above."""
    shapes = [(28672, 4096)] if quick else [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
    for outputs, inputs in shapes:
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=DEVICE)
        scale = torch.rand(outputs, 1, device=DEVICE)
        for limbs in (1, 2):
            format = ActivationFormat(limbs)
            packed = bench.kernels.pack_int8(weight, scale, format=format)
            for rows in (1, 16, 48, 64, 256, 2048, 8192):
                x = bench.kernels.quantize(torch.randn(rows, inputs, device=DEVICE), format)
                assert isinstance(x, Quantized)
                milliseconds = bench.time(lambda x=x, packed=packed: bench.kernels.linear(x, packed))
                name = f"int8 gemm m{rows} {outputs}x{inputs} limbs{limbs}"
                if rows <= 64:
                    bench.add(name, milliseconds, moved=weight.numel() + rows * (limbs * inputs + 4 * outputs))
                else:
                    bench.add(name, milliseconds, operations=2 * rows * outputs * inputs)


def steps(bench: Bench, *, limbs: int, quick: bool) -> None:
    """Whole decode steps of 32 layers in one graph (without head and sampling), and a prefill of 4096 tokens."""
    layers = [Layer(bench.kernels, LLAMA_8B, limbs=limbs, blocks=128 * 1024 // 64, seed=i) for i in range(LAYERS)]
    weights = sum(p.nbytes for layer in layers for p in (layer.qkv, layer.out, layer.gate_up, layer.down))
    cos_sin = angles(4096, 128)
    for batch, context in [(1, 1024), (48, 1024)] if quick else [(1, 1024), (48, 1024), (32, 4096), (128, 1024)]:
        lengths = [context] * batch
        x = torch.randn(batch, 4096, device=DEVICE)
        graph, _ = captured(layers, x, layout_of(lengths, [1] * batch), cos_sin)
        cache = LAYERS * batch * context * 8 * 2 * (128 + 4)
        name = f"decode step b{batch} {context // 1024}k limbs{limbs}"
        bench.add(name, bench.time(graph.replay), tokens=batch, moved=weights + cache)
    x, layout = torch.randn(4096, 4096, device=DEVICE), layout_of([4096], [4096])
    bench.add(f"prefill 4k limbs{limbs}", bench.time(lambda: run(layers, x.clone(), layout, cos_sin)), tokens=4096)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--json", type=Path, help="where the lines go as JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device, and torch finds none")
    torch.manual_seed(0)
    bench = Bench(choose("auto", device=DEVICE), repeats=10 if options.quick else 30)
    card = torch.cuda.get_device_name(DEVICE)
    print(f"{card}, torch {torch.__version__}, {platform.platform()}")
    with torch.inference_mode():
        ceilings(bench)
        attention(bench)
        products(bench, quick=options.quick)
        for limbs in (1,) if options.quick else (1, 2):
            steps(bench, limbs=limbs, quick=options.quick)
    summary(bench)
    if options.json:
        found = {"card": card, "torch": torch.__version__, "lines": [asdict(line) for line in bench.lines]}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def summary(bench: Bench) -> None:
    """The goals, and what was reached."""
    print("\ngoal                             of copy  reached")
    for name, goal in GOALS.items():
        shares = [line.share for line in bench.lines if line.name.startswith(name) and line.share is not None]
        if shares:
            print(f"{name:34}{goal:5.2f}    {min(shares):.2f} to {max(shares):.2f}")


if __name__ == "__main__":
    main()
