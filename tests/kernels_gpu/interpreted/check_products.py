"""Run by test_interpreter.py under TRITON_INTERPRET=1: products against the reference, bit for bit where integer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from octavo.kernels.choose import self_test
from octavo.kernels.gpu import products
from octavo.kernels.gpu.backend import GpuKernels
from octavo.kernels.gpu.device import DeviceLimits
from octavo.kernels.gpu.experts import find_tiles
from octavo.kernels.gpu.tiles import Tile, parts_of
from octavo.kernels.gpu.tuned_tiles import BadTable, Choice, Table, entry_name, file_of, read_table
from octavo.kernels.interface import ActivationFormat, Kernels, PackedLinear
from octavo.kernels.reference import ReferenceKernels

DYNAMIC = ActivationFormat(1)
TWO_LIMBS = ActivationFormat(2)
STATIC = ActivationFormat(1, static_scale=0.037, zero_point=-11)
LIMBS = {1: DYNAMIC, 2: TWO_LIMBS}
GPU = GpuKernels(torch.device("cpu"))
REFERENCE = ReferenceKernels()


def product(
    kernels: Kernels, x: Tensor, weight: Tensor, *, groups: int, format: ActivationFormat, zero: bool
) -> Tensor:
    """One product with everything that its epilogue can have; weights and scales come from fixed seeds."""
    generator = torch.Generator().manual_seed(7)
    outputs = len(weight)
    scale = torch.rand(outputs, groups, generator=generator)
    zero_point = torch.randint(-128, 128, (outputs, groups), generator=generator) if zero else None
    bias, residual = torch.randn(outputs, generator=generator), torch.randn(len(x), outputs, generator=generator)
    packed = kernels.pack_int8(weight, scale, format=format, zero_point=zero_point, bias=bias)
    return kernels.linear(kernels.quantize(x, format), packed, residual=residual)


@pytest.mark.parametrize("format", [DYNAMIC, TWO_LIMBS, STATIC])
@pytest.mark.parametrize(
    ("inputs", "groups", "zero"),
    [(70, 1, True), (300, 1, False), (128, 2, True), (96, 3, False), (72, 2, True), (1024, 2, False)],
)
def test_integer_products_equal_the_reference(format: ActivationFormat, inputs: int, groups: int, zero: bool) -> None:
    x, weight = torch.randn(5, inputs), torch.randint(-128, 128, (37, inputs), dtype=torch.int8)
    x[1] = 0.0
    x[2, 0] = 3000.0
    weight[0] = -128
    ours = product(GPU, x, weight, groups=groups, format=format, zero=zero)
    assert torch.equal(ours, product(REFERENCE, x, weight, groups=groups, format=format, zero=zero))


@pytest.mark.parametrize("limbs", [1, 2])
def test_tiles_change_no_bit(limbs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(70, 256), torch.randint(-128, 128, (150, 256), dtype=torch.int8)
    expected = product(REFERENCE, x, weight, groups=1, format=ActivationFormat(limbs), zero=False)
    for tile in (Tile(16, 32, 256, 4, 4), Tile(64, 64, 128, 4, 4), Tile(128, 128, 64, 8, 3)):
        monkeypatch.setattr(products, "int8_tile", lambda *_, tile=tile, **__: tile)
        assert torch.equal(product(GPU, x, weight, groups=1, format=ActivationFormat(limbs), zero=False), expected)


@pytest.mark.parametrize("limbs", [1, 2])
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_parts_of_k_change_no_bit(parts: int, limbs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, format = torch.randn(20, 1400), torch.randint(-128, 128, (70, 1400), dtype=torch.int8), LIMBS[limbs]
    expected = product(REFERENCE, x, weight, groups=1, format=format, zero=False)
    monkeypatch.setattr(products, "int8_tile", lambda *_, **__: Tile(16, 32, 128, 4, 4))
    monkeypatch.setattr(products, "parts_of", lambda *_, **__: parts)
    for _ in range(2):  # the counters are as they were
        assert torch.equal(product(GPU, x, weight, groups=1, format=format, zero=False), expected)
    assert GPU._counters is not None
    assert not GPU._counters.any()


def test_a_table_goes_before_the_rules_and_changes_no_bit(tmp_path: Path) -> None:
    x, weight = torch.randn(5, 1400), torch.randint(-128, 128, (70, 1400), dtype=torch.int8)
    expected = product(REFERENCE, x, weight, groups=1, format=TWO_LIMBS, zero=False)
    tuned = {"block_m": 32, "block_n": 16, "block_k": 128, "num_warps": 4, "num_stages": 3, "parts": 2}
    limits = DeviceLimits((9, 0), 232448, 132)
    file_of("NVIDIA H200", tmp_path).write_text(json.dumps({"products": {entry_name(5, 70, 1408, 2): tuned}}))
    assert file_of("NVIDIA H200", tmp_path).name == "nvidia-h200.json"
    assert read_table("another", limits, tmp_path) == Table({})
    kernels = GpuKernels(torch.device("cpu"))
    kernels.use_tiles(read_table("NVIDIA H200", limits, tmp_path).products)
    packed = kernels.pack_int8(weight, torch.ones(1), format=TWO_LIMBS)
    choice = kernels.choice(packed, rows=16, inputs=1408, residual=True)
    assert choice == Choice(Tile(32, 16, 128, 4, 3), 2)
    assert torch.equal(product(kernels, x, weight, groups=1, format=TWO_LIMBS, zero=False), expected)
    for wrong in ({"block_k": 256}, {"block_n": 24}, {"parts": 9}, {"num_stages": 0}):
        file_of("wrong", tmp_path).write_text(json.dumps({"products": {entry_name(5, 70, 1408, 2): tuned | wrong}}))
        with pytest.raises(BadTable, match=r"wrong\.json: 16 rows, 70 x 1408, 2 limbs"):
            read_table("wrong", limits, tmp_path)


def test_a_table_cuts_no_product_into_more_tiles_than_are_counted(tmp_path: Path) -> None:
    """Of the most rows that an entry is for: a wide product, and one of any number of rows."""
    limits, tile = DeviceLimits((9, 0), 232448, 132), {"block_m": 16, "block_n": 16, "block_k": 128, "num_stages": 3}
    for name, parts, fits in (
        (entry_name(1, 128256, 4096, 1), 2, True), (entry_name(33, 128256, 4096, 1), 2, False),
        (entry_name(33, 128256, 4096, 1), 1, True), (entry_name(5000, 64, 4096, 1), 2, False),
        (entry_name(16, 65536, 4096, 1), 4, True), (entry_name(16, 65537, 4096, 1), 4, False),
    ):  # fmt: skip
        entry = {**tile, "num_warps": 4, "parts": parts}
        file_of("wide", tmp_path).write_text(json.dumps({"products": {name: entry}}))
        if fits:
            choice = read_table("wide", limits, tmp_path).products[name]
            assert products.num_tiles(choice.tile, 16, 65536) * choice.parts <= products.MOST_TILES
        else:
            with pytest.raises(BadTable, match=rf"{name}: {parts} parts of \d+ tiles; 16384 is the most"):
                read_table("wide", limits, tmp_path)


def test_parts_fill_the_card_and_no_more() -> None:
    h200 = DeviceLimits((9, 0), 232448, 132)
    for rows, outputs, inputs, expected in (
        (1, 4096, 4096, 2), (16, 4096, 14336, 2), (48, 4096, 4096, 4), (1, 28672, 4096, 1), (1, 1024, 4096, 4),
        (1, 1024, 16384, 8), (1, 64, 512, 1), (65, 4096, 4096, 1),
    ):  # fmt: skip
        tile = products.int8_tile(rows, outputs, inputs, limbs=1, group=0, residual=False, limits=h200)
        assert parts_of(tile, rows, outputs, inputs, limits=h200) == expected, (rows, outputs, inputs)


def test_tiles_fit_the_card_and_the_group() -> None:
    small = DeviceLimits((8, 6), 101376)
    for rows in (1, 17, 40, 500):
        for group in (0, 32, 96, 128, 4096):
            for limbs in (1, 2):
                tile = products.int8_tile(rows, 4096, 4096, limbs=limbs, group=group, residual=True, limits=small)
                assert tile.shared_bytes(limbs) <= small.shared_bytes
                assert (group or 4096) % tile.block_k == 0
                assert tile.block_k >= 32


def test_the_self_test_passes() -> None:
    assert self_test(GPU, widths=(4, 60, 1024)) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inputs"), [(1, 64), (19, 133)])
def test_float_products_stay_near_float64(dtype: torch.dtype, rows: int, inputs: int) -> None:
    x, weight = torch.randn(rows, inputs), torch.randn(70, inputs).to(dtype)
    bias, residual = torch.randn(70), torch.randn(rows, 70)
    y = GPU.linear(x, GPU.pack_float(weight, bias=bias), residual=residual)
    exact = x.double() @ weight.double().T + bias.double() + residual.double()
    bound = x.double().abs() @ weight.double().abs().T + bias.double().abs() + residual.double().abs()
    assert ((y.double() - exact).abs() <= bound * (inputs / 16 + 8) * 2**-24).all()


def test_wrong_formats_and_shapes_are_refused() -> None:
    packed = GPU.pack_int8(torch.ones(5, 8, dtype=torch.int8), torch.ones(1), format=DYNAMIC)
    with pytest.raises(ValueError, match="multiplies"):
        GPU.linear(GPU.quantize(torch.ones(1, 8), TWO_LIMBS), packed)
    with pytest.raises(ValueError, match="multiplies"):
        GPU.linear(torch.ones(1, 8), packed)
    assert GPU.linear(GPU.quantize(torch.empty(0, 8), DYNAMIC), packed).shape == (0, 5)


@pytest.mark.parametrize("format", [DYNAMIC, TWO_LIMBS])
@pytest.mark.parametrize("groups", [1, 2])
def test_experts_at_once_equal_experts_one_by_one(format: ActivationFormat, groups: int) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden, inner, experts, rows, top_k = 128, 64, 5, 9, 2
    x = torch.randn(rows, hidden, generator=generator)
    ids = torch.stack([torch.randperm(experts - 1, generator=generator)[:top_k] for _ in range(rows)])  # one unused
    gate_up = [packed(GPU, (2 * inner, hidden), format, groups=groups, seed=i) for i in range(experts)]
    down = [packed(GPU, (hidden, inner), format, groups=1, seed=50 + i) for i in range(experts)]
    stacked = GPU.stack_experts(gate_up), GPU.stack_experts(down)
    assert stacked[0] is not None
    assert stacked[1] is not None
    found = GPU.run_experts(GPU.quantize(x, format), ids, *stacked)  # type: ignore[arg-type]
    for row in range(rows):
        for place, expert in enumerate(ids[row].tolist()):
            inside = GPU.linear(GPU.quantize(x[row : row + 1], format), gate_up[expert])
            expected = GPU.linear(GPU.silu_mul(inside, format), down[expert])
            assert torch.equal(found[row, place], expected[0])


def test_experts_that_differ_are_not_stacked() -> None:
    one = packed(GPU, (64, 128), DYNAMIC, groups=1, seed=0)
    for other in (
        packed(GPU, (64, 128), TWO_LIMBS, groups=1, seed=1),
        packed(GPU, (32, 128), DYNAMIC, groups=1, seed=1),
    ):
        assert GPU.stack_experts([one, other]) is None
    assert GPU.stack_experts([one, GPU.pack_float(torch.randn(64, 128))]) is None


@pytest.mark.parametrize(("rows", "block"), [(1, 16), (7, 4), (40, 16)])
def test_tiles_take_every_pair_once(rows: int, block: int) -> None:
    ids = torch.randint(0, 6, (rows, 3), generator=torch.Generator().manual_seed(rows))
    tiles = find_tiles(ids, num_experts=8, block=block)
    flat, taken = ids.reshape(-1), []
    for expert, first in zip(tiles.expert.tolist(), tiles.first.tolist()):
        if expert < 8:
            pairs = tiles.order[first : min(first + block, int(tiles.end[expert]))].tolist()
            assert pairs
            assert {int(flat[pair]) for pair in pairs} == {expert}
            taken += pairs
    assert sorted(taken) == list(range(3 * rows))


def packed(
    kernels: GpuKernels, shape: tuple[int, int], format: ActivationFormat, *, groups: int, seed: int
) -> PackedLinear:
    """Random int8 weights with a bias."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
    scale = torch.rand(shape[0], groups, generator=generator) * 0.01
    return kernels.pack_int8(weight, scale, format=format, bias=torch.randn(shape[0], generator=generator))
