"""Our int8 products against the library's (onednn.qlinear_pointwise on uint8 activations), interleaved, as ratios.

    python benchmarks/products.py [--runs 5] [--threads 2]

One shape of the standard model, weights of many layers one after the other so that none stays in a cache. Both sides
get quantised activations and write float32. Prints a line per number of rows.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch

from octavo.kernels.choose import choose
from octavo.kernels.interface import ActivationFormat, Kernels

OUTPUTS, INPUTS, LAYERS = 8192, 2048, 12
ROWS = (1, 4, 16, 64, 256)


def our_pass(kernels: Kernels, weights: list[torch.Tensor], rows: int) -> Callable[[], None]:
    """A pass of `rows` rows over all weights by our kernels."""
    format = ActivationFormat(1)
    scale = torch.full((OUTPUTS, 1), 0.01)
    packed = [kernels.pack_int8(weight, scale, format=format) for weight in weights]
    x = kernels.quantize(torch.randn(rows, INPUTS), format)

    def run() -> None:
        for weight in packed:
            kernels.linear(x, weight)

    return run


def library_pass(weights: list[torch.Tensor], rows: int) -> Callable[[], None]:
    """The same by the library, its weights packed for this number of rows."""
    x = torch.randint(0, 256, (rows, INPUTS), dtype=torch.uint8)
    packed = [torch.ops.onednn.qlinear_prepack(weight, [rows, INPUTS]) for weight in weights]
    scale, zero = torch.full((OUTPUTS,), 0.01), torch.zeros(OUTPUTS, dtype=torch.int64)

    def run() -> None:
        for weight in packed:
            torch.ops.onednn.qlinear_pointwise(
                x, 0.01, 128, weight, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
            )

    return run


def compare(threads: int, runs: int) -> dict[str, dict[str, float]]:
    """rows -> milliseconds of one product, ours and the library's, and how many times faster ours is; medians."""
    torch.set_num_threads(threads)
    kernels = choose("auto", device=torch.device("cpu"), num_threads=threads)
    weights = [torch.randint(-127, 128, (OUTPUTS, INPUTS), dtype=torch.int8) for _ in range(LAYERS)]
    results = {}
    for rows in ROWS:
        passes = {"ours": our_pass(kernels, weights, rows), "library": library_pass(weights, rows)}
        times: dict[str, list[float]] = {name: [] for name in passes}
        for _ in range(runs + 1):
            for name, run in passes.items():
                began = time.perf_counter()
                run()
                times[name].append((time.perf_counter() - began) / LAYERS * 1e3)
        ours, library = (statistics.median(times[name][1:]) for name in ("ours", "library"))
        results[str(rows)] = {"ours_ms": ours, "library_ms": library, "ratio": library / ours}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    for rows, result in compare(args.threads, args.runs).items():
        operations = 2 * int(rows) * OUTPUTS * INPUTS
        ours, library = (operations / result[name] / 1e6 for name in ("ours_ms", "library_ms"))
        print(f"{rows:>4} rows: {ours:7.0f} GOPS, the library's {library:7.0f}: {result['ratio']:.2f} times")


if __name__ == "__main__":
    main()
