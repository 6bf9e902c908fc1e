"""What the GPU path reaches on this very card: ceilings first, then attention, products, head, sampling, whole steps,
and prefill of the kernels alone, then the engine on a checkpoint of an 8B shape: decode, prompts, offline, idle time.

Run `python benchmarks/gpu/bench.py [--quick] [--parts kernels engine peers] [--json FILE]` on a machine with a card; it
needs no network and makes its weights on the device. A kernel's figure is a median of repeated runs with a cold L2, set
beside the ceiling measured here.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from gpu_model import LLAMA_8B as GPU_MODEL
from gpu_model import make_model

from gpu.steps import DEVICE, LLAMA_8B, Layer, angles, captured, layout_of, num_blocks, run
from octavo.kernels.choose import choose
from octavo.kernels.interface import ActivationFormat, CacheSpec, Kernels, Quantized, SamplingRows

LAYERS = 32
VOCAB = 128256
PARTS = ("kernels", "engine", "peers")
GOALS = {
    "decode step b48 1k": 0.75,
    "decode step b1 1k": 0.60,
    "attention b48 4096": 0.80,
    "int8 gemm m16": 0.85,
    "engine decode b48 1k": 0.75,
    "engine decode b1 1k": 0.60,
}


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
        self._keep(line)

    def note(self, name: str, value: float, unit: str) -> None:
        """Keep and print a figure that has no ceiling here."""
        self._keep(Line(name, 0.0, value, unit))

    def _keep(self, line: Line) -> None:
        self.lines.append(line)
        share_text = "" if line.share is None else f"{line.share:7.2f} of {line.of}"
        print(f"{line.name:34} {line.milliseconds:9.4f} ms {line.rate:12.2f} {line.unit:6}{share_text}", flush=True)


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
        layout = layout_of(lengths, [1] * batch)  # the graph reads this memory
        graph, _ = captured(layers, x, layout, cos_sin)
        cache = LAYERS * batch * context * 8 * 2 * (128 + 4)
        name = f"decode step b{batch} {context // 1024}k limbs{limbs}"
        bench.add(name, bench.time(graph.replay), tokens=batch, moved=weights + cache)
    x, layout = torch.randn(4096, 4096, device=DEVICE), layout_of([4096], [4096])
    bench.add(f"prefill 4k limbs{limbs}", bench.time(lambda: run(layers, x.clone(), layout, cos_sin)), tokens=4096)


def head_and_sampling(bench: Bench) -> None:
    """The head in int8 and bfloat16, and a step's draws: greedy, plain temperature, top-k with top-p."""
    kernels, rows = bench.kernels, 48
    weight = torch.randint(-127, 128, (VOCAB, 4096), dtype=torch.int8, device=DEVICE)
    packed = kernels.pack_int8(weight, torch.rand(VOCAB, 1, device=DEVICE), format=ActivationFormat(1))
    x = torch.randn(rows, 4096, device=DEVICE)
    quantized = kernels.quantize(x, ActivationFormat(1))
    milliseconds = bench.time(lambda: kernels.linear(quantized, packed))
    bench.add("head int8 b48", milliseconds, moved=weight.numel() + rows * VOCAB * 4)
    wide = kernels.pack_float(torch.randn(VOCAB, 4096, dtype=torch.bfloat16, device=DEVICE))
    milliseconds = bench.time(lambda: kernels.linear(x, wide))
    bench.add("head bf16 b48", milliseconds, moved=2 * weight.numel() + rows * VOCAB * 4)
    logits = torch.randn(rows, VOCAB, device=DEVICE) * 3
    for name, temperature, top_k, top_p in (("greedy", 0.0, 0, 1.0), ("plain", 1.0, 0, 1.0), ("top-p", 0.8, 50, 0.95)):
        draw = sampling_rows(rows, temperature=temperature, top_k=top_k, top_p=top_p)
        milliseconds = bench.time(lambda draw=draw: kernels.sample(logits, draw))
        bench.add(f"sample {name} b48", milliseconds, moved=rows * VOCAB * 4)


def sampling_rows(rows: int, *, temperature: float, top_k: int, top_p: float) -> SamplingRows:
    """The same request in every row; seeds differ."""

    def column(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full((rows,), value, dtype=dtype, device=DEVICE)

    none, starts = (
        torch.empty(0, dtype=torch.int32, device=DEVICE),
        torch.zeros(rows + 1, dtype=torch.int32, device=DEVICE),
    )
    return SamplingRows(
        temperature=column(temperature), top_p=column(top_p), top_k=column(top_k, torch.int32), min_p=column(0.0),
        seed=torch.arange(rows, device=DEVICE), position=column(5, torch.int64), repetition_penalty=column(1.0),
        frequency_penalty=column(0.0), presence_penalty=column(0.0), seen_start=starts, seen_ids=none, seen_counts=none,
        bias_start=starts, bias_ids=none, bias_values=none.float(),
    )  # fmt: skip


def engine(bench: Bench, folder: Path, *, quick: bool) -> None:
    """The engine as the server runs it: W8A8, int8 cache, sampling with top-p. It needs msgspec."""
    from gpu_engine import Engine

    made = Engine.load(folder, batch_size=48, longest=4352)
    print(f"engine loaded in {made.load_seconds:.1f} s", flush=True)
    weights = LAYERS * (4096 * (4096 * 2 + 1024 * 2) + 3 * 4096 * 14336) + VOCAB * 4096
    for batch, context in [(1, 1024), (48, 1024)] if quick else [(1, 1024), (16, 1024), (48, 1024), (48, 4096)]:
        count = 100 if quick else 200
        made.decode(batch, context, steps=count)  # records what the timed run replays
        seconds = made.decode(batch, context, steps=count)
        cache = LAYERS * batch * context * 8 * 2 * (128 + 4)
        name = f"engine decode b{batch} {context // 1024}k"
        bench.add(name, seconds * 1000, tokens=batch, moved=weights + cache)
    seconds = statistics.median(made.prompt(4096) for _ in range(3))
    bench.add("engine prompt 4k", seconds * 1000, tokens=4096)
    bench.note("engine offline 96 x (512 + 128)", made.offline(requests=96, prompt=512, output=128), "tok/s")
    bench.note("engine offline 48 x (512 + 64)", made.offline(requests=48, prompt=512, output=64), "tok/s")
    bench.note("card idle in decode b48 1k", made.idle_share(48, 1024), "of the time")
    made.close()


def peers(bench: Bench, folder: Path) -> None:
    """transformers on the same shape in bfloat16 with random weights, decoding the same batch."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    except ImportError as error:
        print(f"no transformers here ({error.name})")
        return
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = None
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    prompts = [torch.randint(3, VOCAB, (512,)).tolist() for _ in range(48)]
    settings = GenerationConfig(max_new_tokens=64, do_sample=False, eos_token_id=-1)
    for _ in range(2):  # the first run compiles
        began = time.perf_counter()
        outputs = model.generate_batch(inputs=prompts, generation_config=settings, persistent_manager=True)
        seconds = time.perf_counter() - began
    tokens = sum(len(output.generated_tokens) for output in outputs.values())
    bench.note("transformers generate_batch 48 x (512 + 64)", tokens / seconds, "tok/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "octavo-bench" / "llama-8b")
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
        if "kernels" in options.parts:
            kernels(bench, quick=options.quick)
    if {"engine", "peers"} & set(options.parts):
        make_model(options.folder, GPU_MODEL)
    if "engine" in options.parts:
        engine(bench, options.folder, quick=options.quick)
    if "peers" in options.parts:
        peers(bench, options.folder)
    summary(bench)
    if options.json:
        found = {
            "card": card,
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "lines": [asdict(line) for line in bench.lines],
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def kernels(bench: Bench, *, quick: bool) -> None:
    """The operations alone."""
    attention(bench)
    products(bench, quick=quick)
    head_and_sampling(bench)
    for limbs in (1,) if quick else (1, 2):
        steps(bench, limbs=limbs, quick=quick)
    torch.cuda.empty_cache()


def summary(bench: Bench) -> None:
    """The goals, and what was reached."""
    print("\ngoal                             of copy  reached")
    for name, goal in GOALS.items():
        shares = [line.share for line in bench.lines if line.name.startswith(name) and line.share is not None]
        if shares:
            print(f"{name:34}{goal:5.2f}    {min(shares):.2f} to {max(shares):.2f}")


if __name__ == "__main__":
    main()
