"""The engine on a CPU with the standard 1B model: decode, prompts, a full load, and what the machine allows.

    python benchmarks/cpu.py [--schemes w8a8 w8a16] [--parts decode prompt load] [--runs 5] [--folder DIR]

Makes the model once (random weights by a seed, about 1.2 GB, outside the repository), loads it as the server does, and
drives the engine's own loop in this process. Ceilings are measured before and after; figures are medians. Writes
benchmarks/results/cpu.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from octavo.engine.core import EngineCore, default_budget, make_scheduler
from octavo.engine.runner import load_runner
from octavo.protocol.messages import SamplingParams, Submit
from octavo.settings import with_overrides

HERE = Path(__file__).resolve().parent
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCAB = 2048, 16, 32, 8, 64, 8192, 32000
DECODE_BATCHES, DECODE_STEPS, CONTEXT = (1, 4, 16, 32), 24, 256
PROMPTS = (512, 2048)
PARTS = ("decode", "prompt", "load")
# int8 operations of one token in all products, and the bytes of weights that a step reads
WEIGHTS = LAYERS * HIDDEN * (HEADS * HEAD_DIM * 2 + KV_HEADS * HEAD_DIM * 2 + 3 * INTERMEDIATE)
HEAD_WEIGHTS = HIDDEN * VOCAB


# ---- the model


def linears() -> dict[str, tuple[int, int]]:
    """Shapes [N, K] of every product of the standard model, the head included."""
    shapes = {}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, size in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            shapes[f"{prefix}self_attn.{name}_proj"] = (size * HEAD_DIM, HIDDEN)
        shapes[f"{prefix}self_attn.o_proj"] = (HIDDEN, HEADS * HEAD_DIM)
        shapes[f"{prefix}mlp.gate_proj"] = shapes[f"{prefix}mlp.up_proj"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{prefix}mlp.down_proj"] = (HIDDEN, INTERMEDIATE)
    shapes["lm_head"] = (VOCAB, HIDDEN)
    return shapes


def make_model(folder: Path) -> None:
    """Write the int8 checkpoint (compressed-tensors, one scale per output) unless it is there."""
    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(20261121)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in linears().items():
        noise = torch.randint(-7, 8, (4, *shape), generator=generator, dtype=torch.int8)  # their sum is bell-shaped
        tensors[f"{name}.weight"] = noise.sum(dim=0, dtype=torch.int8) * 4
        tensors[f"{name}.weight_scale"] = torch.full((shape[0], 1), 0.02 / 35, dtype=torch.bfloat16)
    table = torch.randn(VOCAB, HIDDEN, generator=generator) * 0.02
    tensors["model.embed_tokens.weight"] = table.to(torch.bfloat16)
    for name in [f"layers.{i}.{part}_layernorm" for i in range(LAYERS) for part in ("input", "post_attention")]:
        tensors[f"model.{name}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    for scheme in ("w8a16", "w8a8"):
        (folder / f"{scheme}.json").write_text(json.dumps(model_config(scheme), indent=1))
    (folder / "config.json").write_text(json.dumps(model_config("w8a8"), indent=1))


def model_config(scheme: str) -> dict[str, object]:
    """config.json; the schemes differ in what they say of activations."""
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs if scheme == "w8a8" else None}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "config_groups": {"group_0": group},
            "ignore": [],
            "kv_cache_scheme": None,
        },
    }


# ---- ceilings


def ceilings(threads: int, *, seconds: float = 2.0) -> tuple[float, float]:
    """GB/s of reading and GOPS of the int8 instruction, measured now; zeros without a compiler or the instruction."""
    with tempfile.TemporaryDirectory() as scratch:
        program = f"{scratch}/ceilings"
        flags = ["-O3", "-std=c++17", "-mavx512f", "-mavx512bw", "-mavx512vnni", "-Wno-psabi", "-pthread"]
        try:
            subprocess.run(["g++", *flags, str(HERE / "ceilings.cpp"), "-o", program], check=True)
            command = [program, str(threads), str(seconds)]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return 0.0, 0.0
    read, products = map(float, printed.split())
    return read, products


def limit(tokens: int, limbs: int, *, read: float, products: float, logits: int) -> float:
    """Least seconds of a step of `tokens` rows of which `logits` go through the head."""
    reading = (WEIGHTS + (HEAD_WEIGHTS if logits else 0)) / (read * 1e9) if read else 0.0
    working = 2 * limbs * (tokens * WEIGHTS + logits * HEAD_WEIGHTS) / (products * 1e9) if products else 0.0
    return max(reading, working)


# ---- the engine


@dataclass
class Engine:
    """A loaded model and the loop over it."""

    core: EngineCore
    load_seconds: float
    next_id: int = 0

    @classmethod
    def load(cls, folder: Path, scheme: str, *, threads: int, kernels: str) -> Engine:
        """As the server does. The context is short so that the cache is small."""
        settings = with_overrides(
            {
                "model_dir": str(folder),
                "model_config_path": str(folder / f"{scheme}.json"),
                "max_seq_len": 4096,
                "max_dec_len": 1024,
                "batch_size": 32,
                "block_bs": 8.0,
                "num_threads": threads,
                "prefix_cache": False,
                "kernels": kernels,
            }
        )
        began = time.perf_counter()
        runner = load_runner(settings, lambda stage, fraction: None)
        seconds = time.perf_counter() - began
        budget = settings.max_num_batched_tokens or default_budget(runner.info)
        scheduler = make_scheduler(runner.info, max_num_batched_tokens=budget, prefix_cache=False)
        return cls(EngineCore(scheduler, runner, time.monotonic), seconds)

    def add(self, prompt: int, output: int) -> int:
        """Queue a random prompt; returns its id."""
        self.next_id += 1
        generator = np.random.default_rng(self.next_id)
        params = SamplingParams(max_tokens=output, temperature=0.8, top_p=0.95, seed=self.next_id)
        self.core.add(Submit(self.next_id, generator.integers(3, VOCAB, prompt).tolist(), params))
        return self.next_id

    def drain(self) -> None:
        """Run until nothing is left."""
        while self.core.has_work:
            self.core.turn()

    def decode(self, batch: int) -> float:
        """Tokens per second of a batch once all prompts are done, about `CONTEXT` tokens behind each."""
        running = {self.add(CONTEXT - DECODE_STEPS, 64 + DECODE_STEPS) for _ in range(batch)}
        started: set[int] = set()
        while started != running:
            started |= {output.seq_id for output in self.core.turn()}
        steps, tokens = 0, 0
        began = time.perf_counter()
        while steps < DECODE_STEPS:
            outputs = self.core.turn()
            steps += bool(outputs)
            tokens += sum(len(output.token_ids) for output in outputs)
        seconds = time.perf_counter() - began
        self.core.abort_all()
        self.drain()
        return tokens / seconds

    def prompt(self, tokens: int) -> float:
        """Tokens per second of one prompt to its first token."""
        self.add(tokens, 1)
        began = time.perf_counter()
        self.drain()
        return tokens / (time.perf_counter() - began)

    def serve(self, *, requests: int = 32, at_once: int = 16, prompt: int = 256, output: int = 64) -> dict[str, float]:
        """Output tokens per second and gaps between tokens with `at_once` requests in flight."""
        last: dict[int, float] = {}
        gaps: list[float] = []
        began = time.perf_counter()
        left, done, tokens = requests, 0, 0
        while done < requests:
            while left and requests - left - done < at_once:
                self.add(prompt, output)
                left -= 1
            for answer in self.core.turn():
                now = time.perf_counter()
                if answer.seq_id in last:
                    gaps.append(now - last[answer.seq_id])
                last[answer.seq_id] = now
                tokens += len(answer.token_ids)
                done += answer.finish_reason is not None
        seconds = time.perf_counter() - began
        p50, p99 = np.percentile(gaps, [50, 99]) * 1e3
        return {"output_tok_s": tokens / seconds, "itl_p50_ms": float(p50), "itl_p99_ms": float(p99)}


# ---- measuring


def median(name: str, measure: Callable[[], float], runs: int) -> dict[str, float]:
    values = [measure() for _ in range(runs)]
    print(name, *(f"{value:.1f}" for value in values), file=sys.stderr, flush=True)
    return {"median": statistics.median(values), "best": max(values), "worst": min(values)}


def resident_mib() -> float:
    """Resident memory of this process, files apart."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = {name: text for name, text in (line.split(":", 1) for line in lines)}
    return (int(fields["RssAnon"].split()[0]) + int(fields["RssShmem"].split()[0])) / 1024


def measure_scheme(folder: Path, scheme: str, args: argparse.Namespace) -> dict[str, object]:
    before = resident_mib()
    engine = Engine.load(folder, scheme, threads=args.threads, kernels=args.kernels)
    gc.collect()
    gc.freeze()  # as the engine's process does
    engine.add(64, 4)
    engine.drain()
    figures: dict[str, object] = {"load_seconds": engine.load_seconds}
    if "decode" in args.parts:
        for batch in DECODE_BATCHES:
            figures[f"decode_{batch}"] = median(f"decode {batch}:", lambda batch=batch: engine.decode(batch), args.runs)
    if "prompt" in args.parts:
        for tokens in PROMPTS:
            runs = args.runs if tokens <= 512 else max(1, args.runs // 2)
            figures[f"prompt_{tokens}"] = median(f"prompt {tokens}:", lambda tokens=tokens: engine.prompt(tokens), runs)
    if "load" in args.parts:
        figures["serve_16"] = engine.serve()
    figures["resident_mib"] = resident_mib() - before
    engine.core.runner.close()
    return figures


def report(scheme: str, figures: dict[str, object], *, read: float, products: float) -> None:
    limbs = 1 if scheme == "w8a8" else 2
    print(f"\n{scheme}: load {figures['load_seconds']:.2f} s, {figures['resident_mib']:.0f} MiB")
    for name, value in figures.items():
        if not isinstance(value, dict):
            continue
        if name.startswith("serve"):
            print(f"  {name:12} " + "  ".join(f"{key} {number:.1f}" for key, number in value.items()))
            continue
        kind, size = name.split("_")
        tokens = int(size)
        rows = tokens if kind == "decode" else 1
        least = limit(tokens, limbs, read=read, products=products, logits=rows)
        share = f"{value['median'] * least / tokens:6.0%}" if least else "     -"
        spread = f"(best {value['best']:.1f}, worst {value['worst']:.1f})"
        print(f"  {name:12} {value['median']:8.1f} tok/s  {spread:32} {share} of the limit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schemes", nargs="+", default=["w8a8", "w8a16"], choices=["w8a8", "w8a16"])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "octavo-bench" / "l1b")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "cpu.json")
    args = parser.parse_args()
    make_model(args.folder)
    load_before = os.getloadavg()[0]
    probes = [ceilings(args.threads)]
    results = {scheme: measure_scheme(args.folder, scheme, args) for scheme in args.schemes}
    probes.append(ceilings(args.threads))
    read, products = (max(values) for values in zip(*probes))
    print(f"limits: {read:.1f} GB/s, {products:.0f} GOPS with {args.threads} threads; load average {load_before:.1f}")
    for scheme, figures in results.items():
        report(scheme, figures, read=read, products=products)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": args.threads,
        "date": time.strftime("%Y-%m-%d"),
        "load_average": [load_before, os.getloadavg()[0]],
    }
    limits = {"read_gb_s": read, "int8_gops": products}
    args.output.write_text(json.dumps({"machine": machine, "limits": limits, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
