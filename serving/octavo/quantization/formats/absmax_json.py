"""A8W8C8 as the push-mode server's own tool describes it: act_scales.json, weight_scales.json, cachekv_scales.json.

The numbers are absolute maxima, a scale is a maximum / 127. The weights beside them are safetensors in the Hugging Face
layout: int8 as they are, floats rounded with the given maxima. Activations and cache are static.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.quantization.errors import CheckpointError
from octavo.quantization.files import inside, read_json
from octavo.quantization.formats.cache_scales import MAXIMA, cache_scheme
from octavo.quantization.formats.reader import (
    FLOAT_DTYPES,
    AttentionShape,
    ReaderInputs,
    bias_tensor,
    float_linear,
    float_tensor,
    int8_tensor,
    quantized_tensor,
    scale_tensor,
    without_trunk,
)
from octavo.quantization.formats.source import TensorSource
from octavo.quantization.scheme import A16, ActivationScheme, CacheScheme, LinearWeights, QuantizedTensor

ACTIVATIONS, WEIGHTS, CACHE = "act_scales", "weight_scales", "cachekv_scales"
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"} | dict.fromkeys(
    ("gate_proj", "up_proj"), "gate_up_fused_proj"
)
FIRST = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # whose input is the same
NO_INPUT = f"no maximum of its inputs in {ACTIVATIONS}.json: inputs are two limbs"


def has_absmax_files(folder: Path) -> bool:
    return _find(folder, WEIGHTS) is not None


class AbsmaxReader:
    """Reads the maxima as tensors `act_scales.json:layers.0.…`. Raises CheckpointError for what is not served."""

    weight_scheme = "w8a8"

    def __init__(self, inputs: ReaderInputs) -> None:
        self._inputs = inputs
        for stem in (ACTIVATIONS, WEIGHTS, CACHE):
            _add_file(inputs.source, stem)

    def linear(self, name: str, *, shape: tuple[int, int], bias: bool, keep_float: bool = False) -> LinearWeights:
        key = without_trunk(name)
        scale = self._weight_scale(key, rows=shape[0])
        if scale is None:
            return float_linear(self._inputs, name, shape=shape, bias=bias)
        weight, loss = self._weight(f"{name}.weight", shape=shape, scale=scale)
        activation = self._activation(key)
        bias_values = bias_tensor(self._inputs, name, size=shape[0], present=bias)
        return LinearWeights(weight, activation, bias_values, loss=loss, note=NO_INPUT if activation == A16 else "")

    def cache(self, attention: str, *, heads: AttentionShape) -> CacheScheme:
        key = without_trunk(attention)
        scales = [self._cache_scale(MAXIMA[0].format(t=key, x=x), heads) for x in "kv"]
        if scales[0] is None and scales[1] is None:
            return CacheScheme()
        if scales[0] is None or scales[1] is None:
            raise CheckpointError(f"{CACHE}.json: has only one of K and V for {key}")
        return cache_scheme(attention, scales[0], scales[1], heads=heads)

    def _weight(self, name: str, *, shape: tuple[int, int], scale: Tensor) -> tuple[QuantizedTensor, float | None]:
        if self._inputs.source.dtype(name) not in FLOAT_DTYPES:
            return QuantizedTensor(int8_tensor(self._inputs.source, name, shape=shape), scale), None
        values = float_tensor(self._inputs, name, shape)
        scale = scale.reshape(-1, 1)
        return quantized_tensor(
            self._inputs, name, shape=shape, read=lambda rows: values[rows], scale=scale, measure=True
        )

    def _weight_scale(self, key: str, *, rows: int) -> Tensor | None:
        """[1] or [N, 1]; None: this product is not quantised."""
        parent, _, last = key.rpartition(".")
        own, fused = (f"{WEIGHTS}.json:{parent}.{part}.weight_quanter" for part in (last, FUSED.get(last, last)))
        source = self._inputs.source
        if own in source:
            scale = scale_tensor(source, own)
        elif fused in source:
            scale = _own_rows(scale_tensor(source, fused), last, rows=rows)
        else:
            return None
        if scale.numel() not in (1, rows):
            raise CheckpointError(f"{own}: has {scale.numel()} values, the weight has {rows} rows")
        return (scale / 127).reshape(-1, 1) if scale.numel() > 1 else (scale / 127).reshape(1)

    def _activation(self, key: str) -> ActivationScheme:
        parent, _, last = key.rpartition(".")
        for part in (last, FUSED.get(last, last), FIRST.get(last, last)):
            name = f"{ACTIVATIONS}.json:{parent}.{part}.activation_quanter"
            if name in self._inputs.source:
                absmax = scale_tensor(self._inputs.source, name)
                if absmax.numel() != 1:
                    raise CheckpointError(f"{name}: has {absmax.numel()} values, one per tensor is supported")
                return ActivationScheme(1, static_scale=float(absmax) / 127)
        return A16

    def _cache_scale(self, name: str, heads: AttentionShape) -> Tensor | None:
        """One per tensor, K/V head or channel. Maxima are taken after the K/V heads are repeated for the queries."""
        source = self._inputs.source
        if name not in source:
            return None
        if f"{name}.zero_point" in source and bool(source.take(f"{name}.zero_point").any()):
            raise CheckpointError(f"{name}.zero_point: an asymmetric cache is not supported")
        scale = scale_tensor(source, name) / 127
        if scale.numel() == heads.num_heads:
            return scale.view(heads.num_kv_heads, -1).amax(dim=1)
        return scale


def _find(folder: Path, stem: str) -> str | None:
    """The file's name; the tool appends a rank when it was run on several devices, of which one can be read."""
    for name in (f"{stem}.json", f"{stem}_0.json"):
        if (folder / name).is_file():
            if (folder / f"{stem}_1.json").is_file():
                raise CheckpointError(f"{stem}_1.json: scales of several ranks are not supported; save them from one")
            return name
    return None


def _add_file(source: TensorSource, stem: str) -> None:
    """The numbers of one file as float32 tensors of the source."""
    file_name = _find(source.folder, stem)
    if file_name is None:
        return
    raw = read_json(inside(source.folder, file_name), name=file_name)
    source.add(file_name, _tensors(raw, file_name, prefix=f"{stem}.json:"))


def _tensors(raw: Mapping[str, object], file_name: str, *, prefix: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, value in raw.items():
        name = prefix + without_trunk(key)
        if name in found:
            raise CheckpointError(f"{file_name}: {key} is there twice")
        found[name] = torch.tensor(_numbers(value, f"{file_name}: {key}"), dtype=torch.float32)
    return found


def _numbers(value: object, where: str) -> list[float]:
    """A number or a list of them, of any nesting that holds one list. Raises CheckpointError."""
    while isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]
    values: list[Any] = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in values):
        raise CheckpointError(f"{where}: must be a number or a list of numbers")
    try:
        return [float(item) for item in values]
    except OverflowError:
        raise CheckpointError(f"{where}: a number is too large") from None


def _own_rows(scale: Tensor, last: str, *, rows: int) -> Tensor:
    """The rows of one of the products that a fused list of maxima covers: q, k, v or gate, up."""
    if scale.numel() == 1:
        return scale
    order: Sequence[str] = ("q_proj", "k_proj", "v_proj") if FUSED[last] == "qkv_proj" else ("gate_proj", "up_proj")
    from_end = len(order) - order.index(last)  # k and v have as many rows, so k starts 2 · rows before the end
    start = 0 if last == order[0] else scale.numel() - from_end * rows
    return scale.reshape(-1)[start : start + rows]
