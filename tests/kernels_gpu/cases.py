"""The kernels of a Llama-3-8B shape (and what else a model may need), as the backend launches them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kernels_gpu.compiled import Case
from octavo.kernels.gpu import attention_kernels, cache_kernels, expert_kernels, gemm, row_kernels, sampling_kernels
from octavo.kernels.gpu.attention import prompt_warps
from octavo.kernels.gpu.device import DeviceLimits, row_warps
from octavo.kernels.gpu.tiles import GROUP_M, float_tile, fp8_tile, int8_tile

INTEGER = {80: "IMMA", 90: "IMMA", 100: "IMMA"}
WIDE_INTEGER = {80: "IMMA", 90: "IGMMA", 100: "IMMA"}
FLOAT = {80: "HMMA", 90: "HMMA", 100: "HMMA"}
FP8 = {89: "QMMA", 90: "QGMMA", 100: "UTCQMMA", 120: "QMMA"}
A100 = DeviceLimits((8, 0), 163840)
CARDS = {  # of each capability, as the driver describes them
    80: A100,
    89: DeviceLimits((8, 9), 101376),
    90: DeviceLimits((9, 0), 232448),
    100: DeviceLimits((10, 0), 232448),
    120: DeviceLimits((12, 0), 101376),
}


def all_cases() -> Iterator[Case]:
    """Every case, the products first."""
    yield from _int8_products()
    yield from _products_in_parts()
    yield from _fp8_products()
    yield from _expert_products()
    yield from _float_products()
    yield from _attention()
    yield from _rows()
    yield from _cache()
    yield from _sampling()


def _types(names: list[str], **others: str) -> dict[str, str]:
    """Pointers to float32 where the name ends so, int32 else; `others` says what differs."""
    kinds = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in names}
    return {**kinds, **others}


def _int8_products() -> Iterator[Case]:
    for rows, outputs, inputs, limbs, group, residual in (
        (1, 4096, 4096, 2, 0, True),
        (16, 28672, 4096, 1, 0, False),
        (16, 28672, 4096, 2, 0, False),
        (16, 4096, 4096, 2, 128, True),
        (32, 6144, 4096, 2, 0, False),
        (48, 28672, 4096, 1, 0, False),
        (48, 28672, 4096, 2, 0, False),
        (48, 4096, 4096, 2, 128, True),
        (4096, 28672, 4096, 1, 0, False),
        (4096, 4096, 14336, 2, 0, True),
    ):
        tile = int8_tile(rows, outputs, inputs, limbs=limbs, group=group, residual=residual, limits=A100)
        yield Case(
            f"int8_gemm m{rows} n{outputs} limbs{limbs}" + (f" group{group}" if group else ""),
            gemm.int8_gemm,
            _types(gemm.int8_gemm.arg_names, x_ptr="*i8", w_ptr="*i8", correction_ptr="*i32", zero_ptr="*i32"),
            {
                "STEPS_PER_GROUP": group // tile.block_k, "LIMBS": limbs, "HAS_INPUT_ZERO": False, "HAS_ZERO": False,
                "HAS_BIAS": False, "HAS_RESIDUAL": residual, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
                "BLOCK_K": tile.block_k, "GROUP_M": GROUP_M,
            },
            aligned=("N", "K", "stride"),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            mma=WIDE_INTEGER if tile.block_m >= 64 else INTEGER,
            loop_bytes=tile.block_n * tile.block_k,
        )  # fmt: skip


def _products_in_parts() -> Iterator[Case]:
    names = gemm.int8_gemm_parts.arg_names
    for rows, limbs in ((1, 2), (48, 1), (48, 2)):
        tile = int8_tile(rows, 4096, 4096, limbs=limbs, group=0, residual=True, limits=A100)
        yield Case(
            f"int8_gemm_parts m{rows} n4096 limbs{limbs}",
            gemm.int8_gemm_parts,
            _types(names, x_ptr="*i8", w_ptr="*i8", sums_ptr="*i32", arrived_ptr="*i32"),
            {
                "PARTS": 2 if rows == 1 else 4, "LIMBS": limbs, "HAS_BIAS": False, "HAS_RESIDUAL": True,
                "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
            },
            aligned=("N", "K", "stride"),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            mma=WIDE_INTEGER if tile.block_m >= 64 else INTEGER,
            loop_bytes=tile.block_n * tile.block_k,
        )  # fmt: skip


def _fp8_products() -> Iterator[Case]:
    """Tiles follow the card, and sm_80 has none."""
    names = gemm.int8_gemm.arg_names
    for rows, outputs, residual in ((16, 28672, False), (48, 4096, True), (4096, 28672, False)):
        for capability in FP8:
            tile = fp8_tile(rows, outputs, limits=CARDS[capability])
            yield Case(
                f"fp8_gemm m{rows} n{outputs}",
                gemm.int8_gemm,
                _types(names, x_ptr="*fp8e4nv", w_ptr="*fp8e4nv", correction_ptr="*i32", zero_ptr="*i32"),
                {
                    "STEPS_PER_GROUP": 0, "LIMBS": 0, "HAS_INPUT_ZERO": False, "HAS_ZERO": False, "HAS_BIAS": False,
                    "HAS_RESIDUAL": residual, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
                    "BLOCK_K": tile.block_k, "GROUP_M": GROUP_M,
                },
                aligned=("N", "K", "stride"),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                mma=FP8,
                loop_bytes=tile.block_n * tile.block_k,
                capabilities=(capability,),
            )  # fmt: skip


def _expert_products() -> Iterator[Case]:
    """128 experts of 768: what an expert gets in a decode step, and in a prompt."""
    pointers = {f"{name}_ptr": "*i64" for name in ("order", "tile_expert", "tile_first", "expert_end")}
    for rows, outputs, inputs, limbs, shared in ((1, 1536, 2048, 2, 8), (64, 1536, 2048, 1, 8), (64, 2048, 768, 2, 1)):
        tile = int8_tile(rows, outputs, inputs, limbs=limbs, group=0, residual=False, limits=A100)
        yield Case(
            f"grouped_gemm m{rows} n{outputs} limbs{limbs}",
            expert_kernels.grouped_gemm,
            _types(
                expert_kernels.grouped_gemm.arg_names, x_ptr="*i8", w_ptr="*i8", correction_ptr="*i32", zero_ptr="*i32",
                **pointers,
            ),
            {
                "SHARED": shared, "STEPS_PER_GROUP": 0, "LIMBS": limbs, "HAS_INPUT_ZERO": False, "HAS_ZERO": False,
                "HAS_BIAS": False, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
            },
            aligned=("N", "K", "stride", "scales_stride"),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            mma=WIDE_INTEGER if tile.block_m >= 64 else INTEGER,
            loop_bytes=tile.block_n * tile.block_k,
        )  # fmt: skip

    tile = fp8_tile(1, 1536, limits=CARDS[90])
    yield Case(
        "grouped_gemm fp8 m1 n1536",
        expert_kernels.grouped_gemm,
        _types(
            expert_kernels.grouped_gemm.arg_names, x_ptr="*fp8e4nv", w_ptr="*fp8e4nv", correction_ptr="*i32",
            zero_ptr="*i32", **pointers,
        ),
        {
            "SHARED": 8, "STEPS_PER_GROUP": 0, "LIMBS": 0, "HAS_INPUT_ZERO": False, "HAS_ZERO": False,
            "HAS_BIAS": False, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        },
        aligned=("N", "K", "stride", "scales_stride"),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        mma=FP8,
        loop_bytes=tile.block_n * tile.block_k,
        capabilities=(90, 100),
    )  # fmt: skip


def _float_products() -> Iterator[Case]:
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        tile = float_tile(dtype)
        yield Case(
            f"float_gemm {name}",
            gemm.float_gemm,
            _types(gemm.float_gemm.arg_names, w_ptr=f"*{name}"),
            {
                "HAS_BIAS": False, "HAS_RESIDUAL": False, "EXACT_TF32": name == "bf16", "EVEN_K": True,
                "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": GROUP_M,
            },
            aligned=("N", "K"),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            mma=FLOAT if name == "bf16" else None,
            loop_bytes=tile.block_n * tile.block_k * dtype.itemsize,
        )  # fmt: skip


def _attention() -> Iterator[Case]:
    integers = {"query_start_ptr": "*i32", "seq_lens_ptr": "*i32", "tables_ptr": "*i32", "scale": "fp32"}
    for head_dim, group, window in ((128, 4, 0), (128, 8, 0), (64, 8, 4096), (256, 2, 0)):
        constants = _heads(head_dim, group, window) | {"ROWS": 8, "INT8": True, "EXACT_TF32": False}
        names = attention_kernels.decode_segments.arg_names
        yield Case(
            f"decode_segments d{head_dim} group{group} window{window}", attention_kernels.decode_segments,
            _types(names, k_ptr="*i8", v_ptr="*i8", **integers), constants, mma=INTEGER, loop_bytes=2 * 128 * head_dim,
        )  # fmt: skip
    names = attention_kernels.prompt_rows.arg_names
    for head_dim, kind in ((128, "i8"), (64, "i8"), (256, "i8"), (128, "bf16")):
        int8 = kind == "i8"
        constants = _heads(head_dim, 4, 0) | {"ROWS": 16, "INT8": int8, "EXACT_TF32": not int8}
        yield Case(
            f"prompt_rows d{head_dim} {kind}", attention_kernels.prompt_rows,
            _types(names, k_ptr=f"*{kind}", v_ptr=f"*{kind}", **integers), constants,
            num_warps=prompt_warps(int8, head_dim), num_stages=2 if int8 else 1, mma=INTEGER if int8 else FLOAT,
            loop_bytes=2 * 128 * head_dim * (1 if int8 else 2),
        )  # fmt: skip
    names = attention_kernels.reduce_segments.arg_names
    yield Case(
        "reduce_segments d128", attention_kernels.reduce_segments, _types(names, **integers),
        {"WINDOW": 0, "H": 32, "D": 128, "BLOCK_D": 128, "AHEAD": 4}, num_warps=1,
    )  # fmt: skip


def _heads(head_dim: int, group: int, window: int) -> dict[str, Any]:
    return {
        "WINDOW": window, "KV": 8, "GROUP": group, "GROUP_PAD": group, "D": head_dim, "D_PAD": head_dim,
        "BLOCK_D": head_dim,
    }  # fmt: skip


def _rows() -> Iterator[Case]:
    dynamic = {"LIMBS": 2, "STATIC": False, "ZERO_POINT": 0}
    static = {"LIMBS": 1, "STATIC": True, "ZERO_POINT": -11}
    scales = {"static_inverse": "fp32", "static_scale": "fp32"}
    for name, kernel, block, constants in (
        ("quantize_rows 4096", row_kernels.quantize_rows, 4096, {**dynamic, "HAS_ABSMAX": True}),
        ("quantize_rows 32768", row_kernels.quantize_rows, 32768, {**dynamic, "HAS_ABSMAX": False}),
        ("rms_norm 4096", row_kernels.rms_norm, 4096, {**dynamic, "EPS": 1e-5, "HAS_ADD": False}),
        ("rms_norm 8192 static", row_kernels.rms_norm, 8192, {**static, "EPS": 1e-5, "HAS_ADD": True}),
        ("rms_norm 16384", row_kernels.rms_norm, 16384, {**dynamic, "EPS": 1e-5, "HAS_ADD": True}),
        ("silu_mul 16384", row_kernels.silu_mul, 16384, dynamic),
    ):
        outputs = {name: "*i8" for name in ("q_ptr", "y_ptr") if name in kernel.arg_names}
        yield Case(
            name, kernel, _types(kernel.arg_names, **outputs, **scales), {**constants, "BLOCK": block},
            aligned=("K", "stride"), num_warps=row_warps(block),
        )  # fmt: skip
    for name, constants in (("dynamic", dynamic), ("static", static | {"ZERO_POINT": 0})):
        yield Case(
            f"rms_norm 4096 fp8 {name}", row_kernels.rms_norm,
            _types(row_kernels.rms_norm.arg_names, y_ptr="*fp8e4nv", **scales),
            {**constants, "LIMBS": 1, "EPS": 1e-5, "HAS_ADD": False, "BLOCK": 4096}, aligned=("K", "stride"),
            num_warps=row_warps(4096), capabilities=(89, 90, 100),
        )  # fmt: skip
    yield Case(
        "embedding bf16", row_kernels.embedding,
        _types(row_kernels.embedding.arg_names, ids_ptr="*i64", table_ptr="*bf16"), {"BLOCK": 1024}, aligned=("H",),
    )  # fmt: skip
    yield Case(
        "moe_route 128", row_kernels.moe_route, _types(row_kernels.moe_route.arg_names, ids_ptr="*i64"),
        {"TOP_K": 8, "RENORMALIZE": True, "BLOCK": 128}, num_warps=1,
    )  # fmt: skip
    yield Case(
        "moe_combine", row_kernels.moe_combine, _types(row_kernels.moe_combine.arg_names),
        {"TOP_K": 8, "BLOCK": 1024}, aligned=("H",),
    )  # fmt: skip


def _cache() -> Iterator[Case]:
    names = cache_kernels.rope_write.arg_names
    integers = {"positions_ptr": "*i32", "slots_ptr": "*i32"}
    for kind, norm in (("i8", False), ("i8", True), ("bf16", False)):
        yield Case(
            f"rope_write {kind}" + (" norm" if norm else ""), cache_kernels.rope_write,
            _types(names, k_ptr=f"*{kind}", v_ptr=f"*{kind}", **integers),
            {
                "HALF": 64, "H": 32, "KV": 8, "D": 128, "D_PAD": 128, "EPS": 1e-6, "Q_NORM": norm, "K_NORM": norm,
                "INT8": kind == "i8", "STATIC_K": False, "STATIC_V": False, "HEADS": 8, "BLOCK_D": 128,
            },
        )  # fmt: skip


def _sampling() -> Iterator[Case]:
    yield Case(
        "penalize", sampling_kernels.penalize,
        _types(
            sampling_kernels.penalize.arg_names, seen_start_ptr="*i32", seen_ids_ptr="*i32", seen_counts_ptr="*i32",
            bias_start_ptr="*i32", bias_ids_ptr="*i32",
        ),
        {"BLOCK": 256},
    )  # fmt: skip
    yield Case(
        "sample", sampling_kernels.sample,
        _types(
            sampling_kernels.sample.arg_names, ids_ptr="*i64", top_k_ptr="*i32", seed_ptr="*i64", position_ptr="*i64"
        ),
        {"BLOCK": 4096}, num_warps=16,
    )  # fmt: skip
    yield Case(
        "summarize", sampling_kernels.summarize,
        _types(
            sampling_kernels.summarize.arg_names, tokens_ptr="*i64", maximum_ptr="*fp64", sum_ptr="*fp64",
            rank_ptr="*i64",
        ),
        {"BLOCK": 4096}, num_warps=16,
    )  # fmt: skip
    yield Case(
        "largest", sampling_kernels.largest, _types(sampling_kernels.largest.arg_names, ids_ptr="*i64"),
        {"BLOCK": 4096}, num_warps=16,
    )  # fmt: skip
