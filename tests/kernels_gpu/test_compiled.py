"""Every GPU kernel compiles for sm_80, sm_90 and sm_100, and its machine code stays within what budgets.json recorded.

Needs triton-lang and its assembler, no GPU. Budgets hold for the version of triton-lang that they were recorded with.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernels_gpu.compiled import BUDGETS, Case, Report, build, compile_case, tensor_code

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton-lang is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

import torch
import triton

from kernels_gpu.cases import CARDS, all_cases
from kernels_gpu.odd_cases import SMALL_CARDS, odd_cases
from octavo.kernels.gpu.cache import float_cache_shared
from octavo.kernels.interface import CacheSpec

CASES, ODD = list(all_cases()), list(odd_cases())
RECORDED = "3.6."
SLACK = 1.05  # a patch release of the assembler may move a few registers
# What a plain test run compiles; the rest, and the other architectures, take a minute and are marked slow.
QUICK = {
    80: ("int8_gemm m16 n28672 limbs2", "decode_segments d128 group4"),
    90: (
        "int8_gemm m16 n28672 limbs2", "int8_gemm m48 n28672 limbs2", "fp8_gemm m48", "decode_segments d128 group4",
        "rope_write i8", "largest",
    ),
    100: ("int8_gemm m1 n4096 limbs2", "rope_write bf16", "moe_combine"),  # whose assembler likes to fuse
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled code goes to a folder of this run."""
    before = triton.knobs.cache.dir
    triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
    yield
    triton.knobs.cache.dir = before


def parameters() -> list[object]:
    found: list[object] = []
    for case in CASES:
        for capability in case.capabilities:
            quick = case.name.startswith(QUICK.get(capability, ("none",)))
            marks = () if quick else (pytest.mark.slow,)
            found.append(pytest.param(case, capability, id=f"{case.name} sm_{capability}", marks=marks))
    return found


@pytest.mark.parametrize(("case", "capability"), parameters())
def test_machine_code(case: Case, capability: int) -> None:
    report = build(case, capability)
    assert report.spills == 0
    assert report.byte_loads == 0
    if "k_ptr" in case.types and case.types["k_ptr"] == "*bf16" and "INT8" in case.constants:
        spec = CacheSpec(1, case.constants["D"], torch.bfloat16)
        assert report.shared_bytes <= float_cache_shared(spec)
    if case.mma is not None:
        assert report.mma
        assert all(name.startswith(case.mma[capability]) for name in report.mma)
    if case.name.startswith(("int8_gemm", "fp8_gemm", "moe_combine", "rope_write bf16")):
        assert report.fused == 0  # their operations round one by one; others divide, and a division is made of them
    if triton.__version__.startswith(RECORDED):
        within_budget(report, json.loads(BUDGETS.read_text())[case.name][str(capability)])


def within_budget(report: Report, recorded: dict[str, float]) -> None:
    assert report.registers <= min(255, recorded["registers"] * SLACK)
    assert report.shared_bytes <= recorded["shared_bytes"]
    assert report.instructions_per_byte <= recorded["instructions_per_byte"] * SLACK


STEP = (
    "int8_gemm m16 n28672 limbs1", "int8_gemm_parts m48 n4096 limbs1", "decode_segments d128 group4 window0",
    "reduce_segments d128", "rms_norm 4096", "quantize_rows 4096", "silu_mul 16384", "rope_write i8",
)  # fmt: skip


@pytest.mark.parametrize("name", [STEP[0], *(pytest.param(name, marks=pytest.mark.slow) for name in STEP[1:])])
def test_a_dependent_launch_waits_before_it_touches_memory(name: str) -> None:
    """The wait comes before all loads and stores, the next launch behind it; nothing else changes."""
    case = next(case for case in CASES if case.name == name)
    dependent = Case(**{**vars(case), "constants": {**case.constants, "PDL": True}})
    compiled = compile_case(dependent, 90)
    code = compiled.asm["ptx"]
    places = [code.index(word) for word in ("griddepcontrol.wait", "griddepcontrol.launch_dependents")]
    touched = [code.find(word) for word in ("ld.global", "st.global", "cp.async", "atom.", "red.global")]
    assert places == sorted(places)
    assert all(place > places[1] for place in touched if place >= 0)
    report = build(dependent, 90)
    assert report.spills == 0
    if triton.__version__.startswith(RECORDED):
        within_budget(report, json.loads(BUDGETS.read_text())[name]["90"])


@pytest.mark.slow
@pytest.mark.parametrize("capability", SMALL_CARDS)
@pytest.mark.parametrize("case", ODD, ids=lambda case: case.name)
def test_what_other_models_need_compiles_and_fits_the_smallest_cards(case: Case, capability: int) -> None:
    report = build(case, capability)
    assert report.shared_bytes <= CARDS[capability].shared_bytes
    assert report.byte_loads == 0


# What has more than 2^31 elements in a large cache, a long step or a wide vocabulary; all else is small.
LARGE = {
    "k_ptr", "v_ptr", "k_scale_ptr", "v_scale_ptr", "q_ptr", "out_ptr", "partial_ptr", "stats_ptr", "x_ptr", "y_ptr",
    "w_ptr", "table_ptr", "residual_ptr", "add_ptr", "z_ptr", "sums_ptr",
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_places_in_large_memory_are_64_bits_wide(case: Case) -> None:
    """Whatever is added first to its address: the row, the block or the tile."""
    widths = first_offsets(tensor_code(case, case.capabilities[-1]), LARGE)
    assert set(widths.values()) <= {"i64"}, widths
    assert any(name in widths for name in LARGE)


def first_offsets(code: str, names: set[str]) -> dict[str, str]:
    """By argument of a kernel in tensor code: the type of the numbers that are added to it first."""
    widths: dict[str, str] = {}
    owner = {f"%{name}": name for name in names}
    for line in code.splitlines():
        spread = re.search(r"(%[\w#]+) = tt\.(?:splat|broadcast|expand_dims) (%\w+)", line)
        if spread and spread[2] in owner:
            owner[spread[1]] = owner[spread[2]]
        added = re.search(r"= tt\.addptr (%\w+), .*[ x](i\d+)>? loc", line)
        if added and added[1] in owner:
            widths[owner[added[1]]] = "i32" if added[2] == "i32" else widths.get(owner[added[1]], added[2])
    return widths


def test_a_narrow_place_is_found() -> None:
    code = """
    %a = tt.splat %k_ptr : !tt.ptr<i8> -> tensor<64x!tt.ptr<i8>> loc(#loc1)
    %b = tt.addptr %a, %c : tensor<64x!tt.ptr<i8>>, tensor<64xi32> loc(#loc2)
    %d = tt.addptr %v_ptr, %e : !tt.ptr<i8>, i64 loc(#loc3)
    %f = tt.addptr %d, %g : !tt.ptr<i8>, i32 loc(#loc4)
    """
    assert first_offsets(code, LARGE) == {"k_ptr": "i32", "v_ptr": "i64"}


def test_budgets_name_every_case_and_nothing_else() -> None:
    recorded = json.loads(BUDGETS.read_text())
    found = {(name, int(capability)) for name, entry in recorded.items() for capability in entry}
    assert found == {(case.name, capability) for case in CASES for capability in case.capabilities}


def test_a_spilling_kernel_is_found() -> None:
    """The report sees local memory: decode_segments with the registers of one thread cut by too many rows."""
    case = next(case for case in CASES if case.name.startswith("decode_segments d256"))
    crowded = Case(case.name, case.kernel, case.types, {**case.constants, "ROWS": 64}, loop_bytes=case.loop_bytes)
    assert build(crowded, 80).spills > 0


def test_every_kernel_file_has_a_case() -> None:
    folder = Path(importlib.util.find_spec("octavo.kernels.gpu").submodule_search_locations[0])  # type: ignore
    defined = set()
    for path in folder.glob("*.py"):
        for block in path.read_text().split("@triton.jit")[1:]:
            name = block.split("def ", 1)[1].split("(", 1)[0]
            if not name.startswith("_") and path.name != "arithmetic.py":
                defined.add(name)
    assert defined == {case.kernel.__name__ for case in CASES}
