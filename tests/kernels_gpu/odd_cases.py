"""Variants of the kernels that no budget is kept of: what models and checkpoints besides the usual make of them.

The interpreter knows no constants among the arguments and no layouts, so that these compile is for the compiler to say.
Shapes are those that the backend launches on the smallest cards, which have 99 KiB of shared memory for a program.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from kernels_gpu.cases import CARDS, all_cases
from kernels_gpu.compiled import Case
from octavo.kernels.gpu.attention import DECODE_ROWS, PROMPT_ROWS, prompt_warps
from octavo.kernels.gpu.device import power_of_two, round_up
from octavo.kernels.gpu.tiles import float_tile, int8_tile

SMALL_CARDS = (89, 120)


def odd_cases() -> Iterator[Case]:
    """Every variant, for small cards."""
    known = {case.name: case for case in all_cases()}
    yield from _products(known)
    yield from _attention(known)
    yield from _rows(known)


def _with(case: Case, name: str, constants: dict[str, Any], **others: Any) -> Case:
    """A case with other constants; what becomes a constant is no argument any more."""
    return replace(
        case, name=name, constants={**case.constants, **constants}, mma=None, capabilities=SMALL_CARDS, **others
    )


def _products(known: dict[str, Case]) -> Iterator[Case]:
    zeros = {"HAS_INPUT_ZERO": True, "HAS_ZERO": True, "HAS_BIAS": True}
    for rows, limbs, group, constants in (
        (16, 1, 128, zeros), (64, 2, 128, zeros), (64, 2, 32, zeros), (300, 2, 0, zeros), (300, 1, 0, {}),
        (300, 2, 0, {"HAS_RESIDUAL": True}), (64, 2, 0, {"HAS_BIAS": True}), (32, 2, 0, {}),
    ):  # fmt: skip
        tile = int8_tile(rows, 4096, 4096, limbs=limbs, group=group, residual=True, limits=CARDS[89])
        shape = {"STEPS_PER_GROUP": group // tile.block_k, "LIMBS": limbs, "HAS_RESIDUAL": False}
        blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
        name = f"int8_gemm m{rows} limbs{limbs} group{group} {' '.join(constants)}"
        plain = known["int8_gemm m16 n28672 limbs1"]
        launch = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        yield _with(plain, name, {**shape, **blocks, **constants}, **launch)
    for kind in ("bf16", "fp32"):  # one output, as the gate of a shared expert has: a constant to the compiler
        gate = known[f"float_gemm {kind}"]
        yield _with(gate, f"float_gemm {kind}, one output", {"N": 1, "EVEN_K": False, "HAS_BIAS": True}, aligned=())
    half = float_tile(torch.float16)
    assert half == float_tile(torch.bfloat16)
    gate = known["float_gemm bf16"]
    yield _with(gate, "float_gemm fp16", {"HAS_RESIDUAL": True}, types={**gate.types, "w_ptr": "*fp16"})
    one = known["grouped_gemm m1 n1536 limbs2"]
    yield _with(one, "grouped_gemm, one expert, zero points", {"num_experts": 1, **zeros})


def _attention(known: dict[str, Case]) -> Iterator[Case]:
    decode, prompt = known["decode_segments d128 group4 window0"], known["prompt_rows d128 i8"]
    for head_dim, group, window in ((80, 7, 0), (96, 1, 0), (128, 16, 0), (64, 64, 0), (256, 8, 1024), (8, 1, 0)):
        padded = power_of_two(group)
        heads = {
            "WINDOW": window, "KV": 1 if group > 8 else 2, "GROUP": group, "GROUP_PAD": padded, "D": head_dim,
            "D_PAD": round_up(head_dim, 16), "BLOCK_D": max(32, power_of_two(head_dim)),
        }  # fmt: skip
        name = f"d{head_dim} group{group} window{window}"
        yield _with(decode, f"decode_segments {name}", {**heads, "ROWS": max(DECODE_ROWS, padded)})
        warps = prompt_warps(True, head_dim)
        yield _with(prompt, f"prompt_rows {name}", {**heads, "ROWS": max(PROMPT_ROWS, padded)}, num_warps=warps)
    yield _with(
        known["reduce_segments d128"], "reduce_segments d80 window", {"WINDOW": 300, "D": 80, "BLOCK_D": 128}
    )  # fmt: skip
    for kind in ("fp16", "fp32"):
        types = {**prompt.types, "k_ptr": f"*{kind}", "v_ptr": f"*{kind}"}
        constants = {"INT8": False, "EXACT_TF32": kind == "fp16", "D": 64, "D_PAD": 64, "BLOCK_D": 64}
        yield _with(prompt, f"prompt_rows d64 {kind}", constants, types=types, num_warps=8, num_stages=1)


def _rows(known: dict[str, Case]) -> Iterator[Case]:
    rope = known["rope_write i8 norm"]
    for name, constants in (
        ("static", {"STATIC_K": True, "STATIC_V": True}),
        ("part of a head turns", {"HALF": 16, "D": 80, "D_PAD": 80}),
        ("nothing turns", {"HALF": 0, "Q_NORM": False}),
    ):
        yield _with(rope, f"rope_write {name}", constants)
    for dtype in ("fp16", "fp32"):
        types = {**rope.types, "k_ptr": f"*{dtype}", "v_ptr": f"*{dtype}"}
        yield _with(rope, f"rope_write {dtype}", {"INT8": False}, types=types)
    floats = {"LIMBS": 0, "HAS_ADD": True}
    norm = known["rms_norm 4096"]
    yield _with(norm, "rms_norm floats", floats, types={**norm.types, "y_ptr": "*fp32"})
    silu = known["silu_mul 16384"]
    yield _with(silu, "silu_mul floats", {"LIMBS": 0, "BLOCK": 1024}, types={**silu.types, "y_ptr": "*fp32"})
    yield _with(silu, "silu_mul static", {"LIMBS": 1, "STATIC": True, "ZERO_POINT": 3, "BLOCK": 4096}, num_warps=4)
    yield _with(known["moe_route 128"], "moe_route 60 of 64", {"TOP_K": 6, "BLOCK": 64, "RENORMALIZE": False})
    yield _with(known["moe_route 128"], "moe_route of 2", {"TOP_K": 2, "BLOCK": 2, "RENORMALIZE": False})
    yield _with(
        known["embedding bf16"], "embedding fp16", {}, types={**known["embedding bf16"].types, "table_ptr": "*fp16"}
    )
    yield _with(known["sample"], "sample of few", {"BLOCK": 1024})
