"""Every operation on a real card: integers equal the reference, floats stay near float64, rows keep their bits."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from gpu.steps import DEVICE, angles, layout_of, num_blocks
from octavo.kernels.choose import self_test
from octavo.kernels.interface import (
    FLOAT,
    Activation,
    ActivationFormat,
    BatchLayout,
    CacheSpec,
    HeadLayout,
    Kernels,
    MultipliesFp8,
    Quantized,
    multiplies_fp8,
)

FORMATS = [ActivationFormat(1), ActivationFormat(2), ActivationFormat(1, static_scale=0.037, zero_point=-11)]
ROWS = [1, 3, 16, 17, 48, 64, 65, 130, 600]


def whole(x: Activation) -> Tensor:
    """[M, K] integers of all limbs, or floats, on the CPU."""
    if not isinstance(x, Quantized):
        return x.cpu()
    q = x.q[:, :, : x.shape[1]].long().cpu()
    return q[0] if len(q) == 1 else q[0] * 256 + q[1]


def test_the_self_test_passes(gpu: Kernels) -> None:
    assert self_test(gpu) == ""


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("inputs", "groups", "zero"), [(512, 1, False), (4096, 32, True), (300, 1, True), (96, 3, False)]
)
def test_integer_products_equal_the_reference_at_every_number_of_rows(
    gpu: Kernels, reference: Kernels, format: ActivationFormat, inputs: int, groups: int, zero: bool
) -> None:
    weight = torch.randint(-128, 128, (300, inputs), dtype=torch.int8)
    scale, bias = torch.rand(300, groups), torch.randn(300)
    zero_point = torch.randint(-128, 128, (300, groups)) if zero else None
    x, residual = torch.randn(max(ROWS), inputs), torch.randn(max(ROWS), 300)
    expected = reference.linear(
        reference.quantize(x, format),
        reference.pack_int8(weight, scale, format=format, zero_point=zero_point, bias=bias),
        residual=residual,
    )
    packed = gpu.pack_int8(
        weight.to(DEVICE), scale.to(DEVICE), format=format, bias=bias.to(DEVICE),
        zero_point=None if zero_point is None else zero_point.to(DEVICE),
    )  # fmt: skip
    for rows in ROWS:
        y = gpu.linear(gpu.quantize(x[:rows].to(DEVICE), format), packed, residual=residual[:rows].to(DEVICE))
        assert torch.equal(y.cpu(), expected[:rows]), rows


@pytest.mark.parametrize("limbs", [1, 2])
@pytest.mark.parametrize(("outputs", "inputs"), [(28672, 4096), (4096, 14336)])
def test_products_of_model_size_equal_float64(gpu: Kernels, limbs: int, outputs: int, inputs: int) -> None:
    format = ActivationFormat(limbs)
    weight = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8, device=DEVICE)
    packed = gpu.pack_int8(weight, torch.ones(1, device=DEVICE), format=format)
    wide = weight.double()
    for rows in (1, 48, 300):
        x = gpu.quantize(torch.randn(rows, inputs, device=DEVICE), format)
        assert isinstance(x, Quantized)
        sums = [(q[:, :inputs].double() @ wide.T).float() for q in x.q]  # exact: below 2^53
        t = sums[0] if limbs == 1 else sums[0] * 256.0 + sums[1]
        assert torch.equal(gpu.linear(x, packed), t * x.scale[:, None]), rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float_products_stay_near_float64_and_keep_their_bits(gpu: Kernels, dtype: torch.dtype) -> None:
    x, weight = torch.randn(130, 1100, device=DEVICE), torch.randn(300, 1100, device=DEVICE).to(dtype)
    packed = gpu.pack_float(weight)
    y = gpu.linear(x, packed)
    bound = x.double().abs() @ weight.double().abs().T
    assert ((y.double() - x.double() @ weight.double().T).abs() <= bound * (1100 / 16 + 8) * 2**-24).all()
    for rows in ROWS[:7]:
        assert torch.equal(gpu.linear(x[-rows:].contiguous(), packed), y[-rows:]), rows


@pytest.mark.parametrize("format", [FLOAT, *FORMATS])
@pytest.mark.parametrize("width", [37, 4096, 14336, 28672])
def test_rows_stay_near_the_reference_and_do_not_meet(
    gpu: Kernels, reference: Kernels, format: ActivationFormat, width: int
) -> None:
    x, add, weight = torch.randn(9, width) * 10, torch.randn(9, width), torch.rand(width)
    gate_up = torch.randn(9, 2 * width) * 3

    def results(kernels: Kernels, rows: slice, device: torch.device) -> list[Tensor]:
        here = [part[rows].clone().to(device) for part in (x, add, gate_up)]
        normed, r = kernels.rms_norm(here[0].clone(), weight.to(device), 1e-5, format, add=here[1])
        parts = [kernels.quantize(here[0], format), normed, kernels.silu_mul(here[2], format)]
        return [r.cpu(), *map(whole, parts)]

    ours = results(gpu, slice(0, 9), DEVICE)
    theirs = results(reference, slice(0, 9), torch.device("cpu"))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    for a, b in zip(ours[2:], theirs[2:]):
        if format == FLOAT:
            torch.testing.assert_close(a, b, rtol=10 * 2**-24, atol=1e-37)
        else:
            assert (a - b).abs().max() <= 1 + (b.abs().max() > 127) * 1
    for row in range(9):
        for alone, together in zip(results(gpu, slice(row, row + 1), DEVICE), ours):
            assert torch.equal(alone[0], together[row])


def fill(
    gpu: Kernels, heads: HeadLayout, lengths: list[int], rows: Tensor, cache, cos_sin: Tensor, *, seed: int
) -> BatchLayout:
    """Write whole sequences into a cache; returns their layout."""
    layout = layout_of(lengths, lengths, seed=seed)
    gpu.rope_write(rows, cos_sin, layout, heads, cache)
    return layout


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(32, 8, 128), (8, 8, 64), (7, 1, 80), (4, 1, 256)])
def test_decode_has_the_bits_of_the_prompt_and_stays_near_float64(
    gpu: Kernels, num_heads: int, num_kv_heads: int, head_dim: int, window: int | None
) -> None:
    heads = HeadLayout(num_heads, num_kv_heads, head_dim, head_dim**-0.5, window)
    lengths = [1000, 5, 256, 257, 640]
    width = (num_heads + 2 * num_kv_heads) * head_dim
    rows, cos_sin = torch.randn(sum(lengths), width, device=DEVICE), angles(1000, head_dim)
    cache = gpu.make_cache(CacheSpec(num_kv_heads, head_dim, torch.int8), num_blocks(lengths))
    prompt = fill(gpu, heads, lengths, rows, cache, cos_sin, seed=1)
    q = gpu.rope_write(rows, cos_sin, prompt, heads, cache)
    out = gpu.attention(q, prompt, heads, cache)
    ends = torch.tensor(lengths, device=DEVICE).cumsum(0) - 1
    decode = layout_of(lengths, [1] * len(lengths), seed=1)
    assert torch.equal(gpu.attention(q[ends].contiguous(), decode, heads, cache), out[ends])
    longer = layout_of(lengths, [1] * len(lengths), seed=1, max_seq_len=4096)  # as a graph would be captured
    assert torch.equal(gpu.attention(q[ends].contiguous(), longer, heads, cache), out[ends])
    mixed = layout_of(lengths, [7, 1, 2, 100, 1], seed=1)
    taken = torch.cat([torch.arange(int(end) + 1 - n, int(end) + 1) for end, n in zip(ends, [7, 1, 2, 100, 1])])
    assert torch.equal(gpu.attention(q[taken.to(DEVICE)].contiguous(), mixed, heads, cache), out[taken.to(DEVICE)])
    expected = dense(q, cache, prompt, heads, lengths)
    assert (out - expected).abs().max() / expected.abs().max() < 5e-4


def dense(q: Tensor, cache, layout: BatchLayout, heads: HeadLayout, lengths: list[int]) -> Tensor:
    """Attention in float64 over what the cache stands for."""
    k, v, ks, vs = cache.rows()
    k, v = k.double() * ks.double()[..., None], v.double() * vs.double()[..., None]
    results, first, group = [], 0, heads.num_heads // heads.num_kv_heads
    for i, length in enumerate(lengths):
        blocks = layout.block_tables[i, : -(-length // 64)].long()
        ki, vi = (x[blocks].flatten(0, 1)[:length].repeat_interleave(group, dim=1) for x in (k, v))
        qi = q[first : first + length].view(length, heads.num_heads, -1).double()
        scores = torch.einsum("qhd,thd->hqt", qi, ki) * heads.scale
        t = torch.arange(length, device=DEVICE)
        hidden = t > t[:, None]
        if heads.window is not None:
            hidden = hidden | (t <= t[:, None] - heads.window)
        p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        results.append(torch.einsum("hqt,thd->qhd", p, vi).flatten(1))
        first += length
    return torch.cat(results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float_caches_stay_near_float64_and_keep_their_bits(gpu: Kernels, dtype: torch.dtype) -> None:
    heads, lengths = HeadLayout(8, 2, 128, 128**-0.5), [700, 33]
    rows, cos_sin = torch.randn(sum(lengths), 12 * 128, device=DEVICE), angles(700, 128)
    cache = gpu.make_cache(CacheSpec(2, 128, dtype), num_blocks(lengths))
    layout = fill(gpu, heads, lengths, rows, cache, cos_sin, seed=3)
    q = gpu.rope_write(rows, cos_sin, layout, heads, cache)
    out = gpu.attention(q, layout, heads, cache)
    k, v, _, _ = cache.rows()  # type: ignore[attr-defined]
    ones = torch.ones(*k.shape[:3], device=DEVICE)
    stand_in = type("Rows", (), {"rows": lambda _: (k, v, ones, ones)})()
    expected = dense(q, stand_in, layout, heads, lengths)
    assert (out - expected).abs().max() / expected.abs().max() < 1e-5
    ends = torch.tensor(lengths, device=DEVICE).cumsum(0) - 1
    decode = layout_of(lengths, [1, 1], seed=3)
    assert torch.equal(gpu.attention(q[ends].contiguous(), decode, heads, cache), out[ends])


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_q_and_cache_equal_the_reference(gpu: Kernels, reference: Kernels, head_dim: int) -> None:
    heads, lengths = HeadLayout(6, 2, head_dim, 0.1), [130, 64, 70]
    rows, spec = torch.randn(sum(lengths), 10 * head_dim), CacheSpec(2, head_dim, torch.int8)
    rows[5] = 0.0
    rows[6] *= 1e-30
    on_device = layout_of(lengths, lengths, seed=2)
    on_host = BatchLayout(**{f.name: host(getattr(on_device, f.name)) for f in fields(BatchLayout)})
    ours, theirs = gpu.make_cache(spec, num_blocks(lengths)), reference.make_cache(spec, num_blocks(lengths))
    table = angles(130, head_dim)
    q = gpu.rope_write(rows.to(DEVICE), table, on_device, heads, ours)
    assert torch.equal(q.cpu(), reference.rope_write(rows, table.cpu(), on_host, heads, theirs))
    for a, b in zip(ours.rows(), theirs.rows()):  # type: ignore[attr-defined]
        assert torch.equal(a.cpu(), b)


def host(value: object) -> object:
    """A tensor on the CPU; anything else as it is."""
    return value.cpu() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("experts", [8, 60, 128])
def test_experts_equal_the_reference(gpu: Kernels, reference: Kernels, experts: int) -> None:
    logits = (torch.randn(50, experts) * 4).round() / 2
    ids, weights = gpu.moe_route(logits.to(DEVICE), 6, renormalize=True)
    expected_ids, expected = reference.moe_route(logits, 6, renormalize=True)
    assert torch.equal(ids.cpu(), expected_ids)
    assert ((weights.cpu() - expected).abs() <= expected * 1e-6).all()
    outputs = torch.randn(50, 6, 2048)
    mixed = gpu.moe_combine(outputs.to(DEVICE), weights)
    assert torch.equal(mixed.cpu(), reference.moe_combine(outputs, weights.cpu()))


def test_embedding_gives_the_rows_of_the_table(gpu: Kernels) -> None:
    table = torch.randn(500, 4096, device=DEVICE).bfloat16()
    ids = torch.randint(0, 500, (70,), device=DEVICE)
    assert torch.equal(gpu.embedding(ids, table), table[ids].float())


@pytest.mark.parametrize("static", [None, 0.013])
@pytest.mark.parametrize(("outputs", "inputs"), [(28672, 4096), (300, 1100)])
def test_fp8_products_stay_near_float64_and_keep_their_bits(
    gpu: Kernels, outputs: int, inputs: int, static: float | None
) -> None:
    if not multiplies_fp8(gpu):
        pytest.skip("this card has no fp8 products")
    assert isinstance(gpu, MultipliesFp8)
    format = ActivationFormat(1, static, fp8=True)
    weight = (torch.randn(outputs, inputs, device=DEVICE) * 40).to(torch.float8_e4m3fn)
    scale = torch.rand(outputs, 1, device=DEVICE) * 0.01
    packed = gpu.pack_fp8(weight, scale, format=format)
    x = torch.randn(max(ROWS), inputs, device=DEVICE)
    q = gpu.quantize(x, format)
    assert isinstance(q, Quantized)
    y = gpu.linear(q, packed)
    wide = q.q[0, :, :inputs].double()
    terms = (wide.abs() @ weight.double().abs().T) * scale.T * q.scale[:, None]
    exact = (wide @ weight.double().T) * scale.T * q.scale[:, None]
    # sm_90 adds up to 128 products with some 13 bits behind the largest's leading one
    assert ((y - exact).abs() <= terms * 2**-12).all()
    for rows in ROWS:
        assert torch.equal(gpu.linear(gpu.quantize(x[-rows:].contiguous(), format), packed), y[-rows:]), rows


def test_rows_of_fp8_are_rounded_as_torch_does(gpu: Kernels) -> None:
    if not multiplies_fp8(gpu):
        pytest.skip("this card has no fp8 products")
    x = torch.randn(5, 4096, device=DEVICE) * torch.exp2(torch.randint(-14, 9, (5, 4096), device=DEVICE).float())
    q = gpu.quantize(x, ActivationFormat(1, 1.0, fp8=True))
    assert isinstance(q, Quantized)
    assert torch.equal(q.q[0].view(torch.uint8), x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))
