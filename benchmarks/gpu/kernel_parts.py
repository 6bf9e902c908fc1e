"""The operations alone: ceilings of this very card first, then attention, products, head, sampling, layers, prefill."""

from __future__ import annotations

import torch
from measure import Bench
from torch import Tensor

from gpu.steps import LLAMA_8B, TOY, Layer, Shape, angles, layout_of, num_blocks, run
from octavo.kernels.interface import (
    ActivationFormat,
    BatchLayout,
    CacheSpec,
    HeadLayout,
    LayerCache,
    MultipliesFp8,
    PackedLinear,
    Quantized,
    SamplingRows,
    multiplies_fp8,
)

LAYERS = 32
VOCAB = 128256
FEW = (1, 16, 48, 64)  # rows of products that are set against the copy; more against bf16
MANY = (256, 2048, 8192)


def shape_of(bench: Bench) -> Shape:
    return LLAMA_8B if bench.sizes.of("width", LLAMA_8B.hidden) == LLAMA_8B.hidden else TOY


def ceilings(bench: Bench) -> None:
    """Copy bandwidth and bf16 rate: every later line is set against them."""
    count = bench.sizes.of("width", 2 << 30)
    source = torch.randint(-127, 128, (count,), dtype=torch.int8, device=bench.device)
    target = torch.empty_like(source)
    milliseconds = bench.clock.milliseconds(lambda: target.copy_(source))
    bench.bandwidth = 2 * count / (milliseconds / 1000)
    bench.moved("copy 2 GiB", milliseconds, 2 * count)
    size = bench.sizes.of("width", 8192)
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=bench.device) for _ in range(2))
    milliseconds = bench.clock.milliseconds(lambda: a @ b)
    bench.bf16 = 2 * size**3 / (milliseconds / 1000)
    bench.computed("bf16 product 8192", milliseconds, 2 * size**3)


def attention(bench: Bench) -> None:
    """Decode attention of one layer over an int8 cache, and how far it is from float64."""
    heads = shape_of(bench).heads
    for batch, context in ((48, 1024), (48, 4096), (1, 4096), (1, 32768)):
        if not bench.has_time(f"attention b{batch} {context}"):
            continue
        lengths = [bench.sizes.of("context", context)] * bench.sizes.of("batch", batch)
        cache = random_cache(bench, heads, num_blocks(lengths))
        layout = layout_of(lengths, [1] * len(lengths))
        q = torch.randn(len(lengths), heads.num_heads * heads.head_dim, device=bench.device)
        milliseconds = bench.clock.milliseconds(lambda: bench.kernels.attention(q, layout, heads, cache))  # noqa: B023
        bench.moved(f"attention b{batch} {context}", milliseconds, cache_bytes(heads, lengths))
        if (batch, context) == (48, 4096):
            bench.note("attention error b48 4096", attention_error(bench, q, layout, heads, cache), "of max")


def random_cache(bench: Bench, heads: HeadLayout, blocks: int) -> LayerCache:
    """Full of random numbers, its scales too."""
    cache = bench.kernels.make_cache(CacheSpec(heads.num_kv_heads, heads.head_dim, torch.int8), blocks)
    for plane in vars(cache).values():
        if isinstance(plane, Tensor):
            plane.random_(-127, 128) if plane.dtype == torch.int8 else plane.uniform_(0.001, 0.02)
    return cache


def cache_bytes(heads: HeadLayout, lengths: list[int]) -> int:
    return sum(lengths) * heads.num_kv_heads * 2 * (heads.head_dim + 4)


def attention_error(bench: Bench, q: Tensor, layout: BatchLayout, heads: HeadLayout, cache: LayerCache) -> float:
    """Largest difference from float64 on the dequantised cache, of the largest output, in the first two sequences."""
    out = bench.kernels.attention(q, layout, heads, cache)
    k, v, k_scale, v_scale = cache.rows()  # type: ignore[attr-defined]
    worst, group = 0.0, heads.num_heads // heads.num_kv_heads
    for i in range(min(2, len(out))):
        blocks, length = layout.block_tables[i].long(), int(layout.seq_lens[i])
        ki, vi = (
            (part[blocks].double() * scale[blocks].double()[..., None]).flatten(0, 1)[:length]
            for part, scale in ((k, k_scale), (v, v_scale))
        )
        ki, vi = (part.repeat_interleave(group, dim=1) for part in (ki, vi))
        scores = torch.einsum("hd,thd->ht", q[i].view(heads.num_heads, -1).double(), ki) * heads.scale
        exact = torch.einsum("ht,thd->hd", scores.softmax(-1), vi).flatten()
        worst = max(worst, float((out[i] - exact).abs().max() / exact.abs().max()))
    return worst


def products(bench: Bench, *, quick: bool) -> None:
    """Products of 8 bits: bytes against the copy up to 64 rows, operations against bf16 above."""
    shapes = [(28672, 4096)] if quick else [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
    for outputs, inputs in shapes:
        size = (bench.sizes.of("width", outputs), bench.sizes.of("width", inputs))
        for name, format in formats(bench).items():
            if not bench.has_time(f"{name} {outputs}x{inputs}"):
                continue
            packed = random_product(bench, size, format)
            for rows in (*FEW, *MANY):
                count = bench.sizes.of("rows", rows)
                x = bench.kernels.quantize(torch.randn(count, size[1], device=bench.device), format)
                milliseconds = bench.clock.milliseconds(lambda: bench.kernels.linear(x, packed))  # noqa: B023
                label = f"{name} m{rows} {outputs}x{inputs}"
                if rows in FEW:
                    assert isinstance(x, Quantized)
                    bench.moved(label, milliseconds, size[0] * size[1] + count * (len(x.q) * size[1] + 4 * size[0]))
                else:
                    bench.computed(label, milliseconds, 2 * count * size[0] * size[1])


def formats(bench: Bench) -> dict[str, ActivationFormat]:
    """What this card multiplies, by name."""
    found = {"w8a8": ActivationFormat(1), "w8a16": ActivationFormat(2)}
    return found | ({"fp8": ActivationFormat(1, fp8=True)} if multiplies_fp8(bench.kernels) else {})


def random_product(bench: Bench, size: tuple[int, int], format: ActivationFormat) -> PackedLinear:
    weight = torch.randint(-127, 128, size, dtype=torch.int8, device=bench.device)
    scale = torch.rand(size[0], 1, device=bench.device)
    if format.fp8:
        assert isinstance(bench.kernels, MultipliesFp8)
        return bench.kernels.pack_fp8(weight.float().to(torch.float8_e4m3fn), scale, format=format)
    return bench.kernels.pack_int8(weight, scale, format=format)


def head_and_sampling(bench: Bench) -> None:
    """The head in int8 and bfloat16, and a step's draws: greedy, plain temperature, top-k with top-p."""
    kernels, rows = bench.kernels, bench.sizes.of("batch", 48)
    vocab, hidden = bench.sizes.of("width", VOCAB), bench.sizes.of("width", 4096)
    packed = random_product(bench, (vocab, hidden), ActivationFormat(1))
    x = torch.randn(rows, hidden, device=bench.device)
    quantized = kernels.quantize(x, ActivationFormat(1))
    milliseconds = bench.clock.milliseconds(lambda: kernels.linear(quantized, packed))
    bench.moved("head int8 b48", milliseconds, vocab * hidden + rows * vocab * 4)
    wide = kernels.pack_float(torch.randn(vocab, hidden, dtype=torch.bfloat16, device=bench.device))
    milliseconds = bench.clock.milliseconds(lambda: kernels.linear(x, wide))
    bench.moved("head bf16 b48", milliseconds, 2 * vocab * hidden + rows * vocab * 4)
    logits = torch.randn(rows, vocab, device=bench.device) * 3
    for name, temperature, top_k, top_p in (("greedy", 0.0, 0, 1.0), ("plain", 1.0, 0, 1.0), ("top-p", 0.8, 50, 0.95)):
        draw = sampling_rows(bench, rows, temperature=temperature, top_k=top_k, top_p=top_p)
        milliseconds = bench.clock.milliseconds(lambda: kernels.sample(logits, draw))  # noqa: B023
        bench.moved(f"sample {name} b48", milliseconds, rows * vocab * 4)


def sampling_rows(bench: Bench, rows: int, *, temperature: float, top_k: int, top_p: float) -> SamplingRows:
    """The same request in every row; seeds differ."""
    device = bench.device

    def column(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((rows,), value, dtype=dtype, device=device)

    none, starts = (torch.zeros(size, dtype=torch.int32, device=device) for size in (0, rows + 1))
    return SamplingRows(
        temperature=column(temperature), top_p=column(top_p), top_k=column(top_k, torch.int32), min_p=column(0.0),
        seed=torch.arange(rows, device=device), position=column(5, torch.int64), repetition_penalty=column(1.0),
        frequency_penalty=column(0.0), presence_penalty=column(0.0), seen_start=starts, seen_ids=none, seen_counts=none,
        bias_start=starts, bias_ids=none, bias_values=none.float(),
    )  # fmt: skip


def layers(bench: Bench, *, limbs: int, quick: bool) -> None:
    """Decode steps of all layers in one recording (without head and sampling), and a prefill of 4096 tokens."""
    shape, sizes = shape_of(bench), bench.sizes
    count = LAYERS if shape is LLAMA_8B else 2
    blocks = sizes.of("batch", 128) * -(-sizes.of("context", 1024) // 64)
    made = [Layer(bench.kernels, shape, limbs=limbs, blocks=blocks, seed=i) for i in range(count)]
    weights = sum(p.nbytes for layer in made for p in (layer.qkv, layer.out, layer.gate_up, layer.down))
    longest = sizes.of("context", 4096)
    cos_sin = angles(longest, shape.heads.head_dim)
    for batch, context in [(1, 1024), (48, 1024)] if quick else [(1, 1024), (48, 1024), (32, 4096), (128, 1024)]:
        if not bench.has_time(f"layers b{batch} {context // 1024}k limbs{limbs}"):
            continue
        lengths = [sizes.of("context", context)] * sizes.of("batch", batch)
        x = torch.randn(len(lengths), shape.hidden, device=bench.device)
        layout = layout_of(lengths, [1] * len(lengths))  # the recording reads this memory
        step = bench.clock.recorded(lambda: run(made, x, layout, cos_sin))  # noqa: B023
        moved = weights + count * cache_bytes(shape.heads, lengths)
        name = f"layers b{batch} {context // 1024}k limbs{limbs}"
        bench.made(name, bench.clock.milliseconds(step), len(lengths), moved=moved)
    x, layout = torch.randn(longest, shape.hidden, device=bench.device), layout_of([longest], [longest])
    milliseconds = bench.clock.milliseconds(lambda: run(made, x.clone(), layout, cos_sin))
    bench.made(f"layers prompt 4k limbs{limbs}", milliseconds, longest)
