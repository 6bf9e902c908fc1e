"""Whole decoder layers, or a whole step, in one native call: describes them to csrc/layers.cpp and owns the workspace.

Runs in the engine's thread, like all kernels. Serves layers whose products are all int8, before a head of int8 or
floats; others run one operation at a time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from octavo.kernels.cpu.cache import MOST_SHARING, CpuCache
from octavo.kernels.cpu.library import CpuBase, WeightMemory, checked, empty_floats, empty_result, pointer
from octavo.kernels.cpu.products import FLOAT_TYPES, CpuFloatLinear, CpuInt8Linear
from octavo.kernels.cpu.sampling import SAMPLING_NAMES, sampling_tensors
from octavo.kernels.interface import BatchLayout, DenseLayer, Head, LayerCache, LayerStack, PackedLinear, SamplingRows
from octavo.kernels.reference.cache import check_heads

SIGNATURES = {"octavo_run_layers": "pppp", "octavo_run_step": "pppppp"}
MLP_ROWS = 256  # rows that go through an MLP together: enough for its products, few enough for the memory

_POINTER, _INT, _FLOAT, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_double


class _Linear(ctypes.Structure):
    _fields_ = (("weights", _POINTER), ("limbs", _INT), ("zero_point", _INT), ("static_scale", _FLOAT))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")),
        *((name, _Linear) for name in ("qkv", "out", "gate_up", "down")),
        ("eps", _DOUBLE),
        *((name, _INT) for name in ("num_heads", "kv_heads", "head_dim", "window")),
        ("scale", _FLOAT),
        *((name, _POINTER) for name in ("k_inverse", "v_inverse", "k", "v", "k_scales", "v_scales")),
        ("cache_type", _INT),
    )


class _Stack(ctypes.Structure):
    _fields_ = (
        ("layers", _POINTER),
        ("num_layers", _INT),
        ("hidden", _INT),
        ("cos_sin", _POINTER),
        ("rotary_dim", _INT),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("x", _POINTER),
        ("rows", _INT),
        *((name, _POINTER) for name in ("query_start", "block_tables", "positions", "slots")),
        ("num_sequences", _INT),
        ("max_blocks", _INT),
        ("wanted", _POINTER),
        ("num_wanted", _INT),
        ("y", _POINTER),
    )


class _Workspace(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("bytes", "row_scale", "wide", "q", "heads", "logits")),
        ("mlp_rows", _INT),
    )


class _Head(ctypes.Structure):
    _fields_ = (
        ("norm", _POINTER),
        ("linear", _Linear),
        ("float_weights", _POINTER),
        ("float_type", _INT),
        ("float_bias", _POINTER),
        ("eps", _DOUBLE),
        ("vocabulary", _INT),
    )


_Sampling = _POINTER * 16  # ids, then what `sampling_tensors` gives
_POSITION = 1 + SAMPLING_NAMES.index("position")
_KEPT = [name for name in SAMPLING_NAMES if name != "position"]


class _Sampled:
    """Rows that were checked: the tensors are what `native` points into."""

    def __init__(self, rows: SamplingRows, count: int, tensors: list[Tensor]) -> None:
        self.rows = rows
        self.count = count
        self._tensors = tensors
        self.native = _Sampling(None, *[tensor.data_ptr() for tensor in tensors])


class CpuStack:
    """A `LayerStack`. One thread at a time may run it."""

    def __init__(self, kernels: CpuLayers, layers: Sequence[DenseLayer], cos_sin: Tensor, head: Head) -> None:
        self._kernels = kernels
        self._layers = list(layers)  # their tensors are what the native description points into
        self._cos_sin = cos_sin
        self._head = replace(head, norm=checked(head.norm, torch.float32, (head.product.in_features,), "norm"))
        self._native_head = _describe_head(self._head)
        self._caches: list[LayerCache] = []
        self._native = (_Layer * len(layers))(*map(_describe, layers))
        address, hidden = ctypes.addressof(self._native), self._layers[0].out.out_features
        self._stack = _Stack(address, len(layers), hidden, pointer(cos_sin), cos_sin.shape[1])
        self._rows = 0  # that the workspace holds
        self._workspace = _Workspace()
        self._buffers: dict[str, Tensor] = {}
        self._ends = [torch.empty(0)]
        self._sampled: _Sampled | None = None  # of the step before

    def run(self, x: Tensor, layout: BatchLayout, caches: Sequence[LayerCache], rows: Tensor) -> Tensor:
        """See the interface. Nobody checks positions, slots, block ids and `rows`."""
        y = empty_floats(len(rows), self._stack.hidden)
        step, _kept = self._prepare(x, layout, caches, rows, y)
        self._kernels.run_layers(self._stack, step, self._workspace)
        return y

    def sample(
        self, x: Tensor, layout: BatchLayout, caches: Sequence[LayerCache], rows: Tensor, sampling: SamplingRows
    ) -> Tensor:
        """See the interface, and `run`."""
        self._reserve_ends(len(rows))
        step, _kept = self._prepare(x, layout, caches, rows, self._ends[0])
        ids = torch.from_numpy(np.empty(len(rows), dtype=np.int64))
        native, _position = self._describe_sampling(sampling, len(rows))
        native[0] = ids.data_ptr()
        self._kernels.run_step(self._stack, step, self._workspace, self._native_head, native)
        return ids

    def _describe_sampling(self, rows: SamplingRows, count: int) -> tuple[ctypes.Array[ctypes.c_void_p], Tensor]:
        """As native code takes it but for the ids, and the positions that it points into.

        While the same sequences run and have no penalties or biases, only their positions are new.
        """
        known = self._sampled
        if known is None or known.count != count or any(getattr(known.rows, x) is not getattr(rows, x) for x in _KEPT):
            self._sampled = known = _Sampled(rows, count, sampling_tensors(rows, count))
        position = checked(rows.position, torch.int64, (count,), "position")
        known.native[_POSITION] = position.data_ptr()
        return known.native, position

    def _prepare(
        self, x: Tensor, layout: BatchLayout, caches: Sequence[LayerCache], rows: Tensor, y: Tensor
    ) -> tuple[_Step, dict[str, Tensor]]:
        """The step as native code takes it, and the tensors that it points into."""
        hidden, count = self._stack.hidden, len(x)
        x = checked(x, torch.float32, (count, hidden), "x")
        rows = checked(rows, torch.int64, (-1,), "rows")
        self._attach(caches)
        self._reserve(max(count, len(rows)))
        sequences = len(layout.query_start) - 1
        tensors = {
            "query_start": checked(layout.query_start, torch.int32, (-1,), "query_start"),
            "block_tables": checked(layout.block_tables, torch.int32, (sequences, -1), "block_tables"),
            "positions": checked(layout.positions, torch.int32, (count,), "positions"),
            "slots": checked(layout.slot_mapping, torch.int32, (count,), "slot_mapping"),
            "wanted": rows,
            "x": x,
            "y": y,
        }
        step = _Step(
            rows=count,
            num_sequences=sequences,
            max_blocks=layout.block_tables.shape[1],
            num_wanted=len(rows),
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        )
        return step, tensors

    def _attach(self, caches: Sequence[LayerCache]) -> None:
        """Point the layers at their caches, which seldom change."""
        if len(caches) == len(self._caches) and all(map(_same, caches, self._caches)):
            return
        if len(caches) != len(self._layers):
            raise ValueError(f"{len(caches)} caches for {len(self._layers)} layers")
        for native, layer, cache in zip(self._native, self._layers, caches):
            assert isinstance(cache, CpuCache)
            check_heads(layer.heads, cache.spec, most=MOST_SHARING)
            native.k_inverse, native.v_inverse = pointer(cache.k_inverse), pointer(cache.v_inverse)
            native.k, native.v, native.k_scales, native.v_scales, _, _, native.cache_type = cache.arguments
        self._caches = list(caches)

    def _reserve(self, rows: int) -> None:
        """Grow the workspace to hold a step of `rows`."""
        if rows <= self._rows:
            return
        self._rows = (rows + 63) // 64 * 64
        mlp_rows = min(self._rows, MLP_ROWS)
        memory = self._kernels.new_memory()
        sizes = _workspace_bytes(self._layers, self._head.product, rows=self._rows, mlp_rows=mlp_rows)
        self._buffers = {name: memory.empty((size,), torch.uint8) for name, size in sizes.items()}
        for name, buffer in self._buffers.items():
            setattr(self._workspace, name, buffer.data_ptr())
        self._workspace.mlp_rows = mlp_rows

    def _reserve_ends(self, rows: int) -> None:
        """Grow what holds the residual stream and the logits of the rows that sample."""
        if rows > len(self._ends[0]):
            widths = (self._stack.hidden, self._head.product.out_features)
            self._ends = [empty_result(self._kernels.library, rows, width) for width in widths]
            self._workspace.logits = self._ends[1].data_ptr()


class CpuLayers(CpuBase):
    """`interface.StacksLayers`."""

    def stack_layers(self, layers: Sequence[DenseLayer], cos_sin: Tensor, head: Head) -> LayerStack | None:
        """See the interface. All products but the head must be int8, all layers of one width."""
        products = [product for layer in layers for product in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        widths = {(layer.qkv.in_features, layer.out.out_features, layer.down.out_features) for layer in layers}
        if not layers or len(widths) > 1 or not all(isinstance(product, CpuInt8Linear) for product in products):
            return None
        return CpuStack(self, layers, checked(cos_sin, torch.float32, (-1, -1), "cos_sin"), head)

    def run_layers(self, stack: _Stack, step: _Step, workspace: _Workspace) -> None:
        self._lib.octavo_run_layers(self._pool, *map(ctypes.addressof, (stack, step, workspace)))

    def run_step(
        self, stack: _Stack, step: _Step, workspace: _Workspace, head: _Head, sampling: ctypes.Array[ctypes.c_void_p]
    ) -> None:
        self._lib.octavo_run_step(self._pool, *map(ctypes.addressof, (stack, step, workspace, head, sampling)))

    @property
    def library(self) -> ctypes.CDLL:
        return self._lib

    def new_memory(self) -> WeightMemory:
        """Memory on huge pages that goes when its tensors do."""
        return WeightMemory(self._lib)


def _workspace_bytes(layers: Sequence[DenseLayer], head: PackedLinear, *, rows: int, mlp_rows: int) -> dict[str, int]:
    """What the largest layer needs: quantised inputs and their scales, the widest result, queries, and heads."""

    def quantized(product: PackedLinear, count: int) -> int:
        return count * product.format.limbs * ((product.in_features + 63) // 64 * 64)

    inputs, wide, queries = quantized(head, rows), rows * head.in_features, 0
    for layer in layers:
        inputs = max(inputs, *(quantized(product, rows) for product in (layer.qkv, layer.out)))
        inputs = max(inputs, *(quantized(product, mlp_rows) for product in (layer.gate_up, layer.down)))
        wide = max(wide, rows * layer.qkv.out_features, mlp_rows * layer.gate_up.out_features)
        queries = max(queries, rows * layer.out.in_features)
    return {"bytes": inputs, "row_scale": rows * 4, "wide": wide * 4, "q": queries * 4, "heads": queries * 4}


def _same(a: LayerCache, b: LayerCache) -> bool:
    return a is b


def _describe(layer: DenseLayer) -> _Layer:
    heads = layer.heads
    norms = {name: pointer(getattr(layer, name)) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")}
    return _Layer(
        **norms,
        **{name: _linear(getattr(layer, name)) for name in ("qkv", "out", "gate_up", "down")},
        eps=layer.eps,
        num_heads=heads.num_heads,
        kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        window=heads.window or 0,
        scale=heads.scale,
    )


def _describe_head(head: Head) -> _Head:
    product = head.product
    shared = {"norm": pointer(head.norm), "eps": head.eps, "vocabulary": product.out_features}
    if isinstance(product, CpuInt8Linear):
        return _Head(**shared, linear=_linear(product))
    assert isinstance(product, CpuFloatLinear)
    weights = {"float_weights": pointer(product.weight), "float_type": FLOAT_TYPES[product.weight.dtype]}
    return _Head(**shared, **weights, float_bias=pointer(product.bias))


def _linear(product: PackedLinear) -> _Linear:
    assert isinstance(product, CpuInt8Linear)
    form = product.format
    return _Linear(ctypes.addressof(product.native), form.limbs, form.zero_point, form.static_scale or 0.0)
