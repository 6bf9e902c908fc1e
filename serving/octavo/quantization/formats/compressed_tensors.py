"""Compressed-tensors checkpoints of 8 bits: int-quantized (W8A8, W8A16), pack-quantized and float-quantized (fp8).

Says for each product which config group it belongs to and reads its tensors. Dynamic activations are written
symmetrically, whatever the checkpoint says: nothing stored depends on that.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from octavo.quantization.errors import CheckpointError
from octavo.quantization.formats.cache_scales import pass_over_cache_scales, read_cache_scales
from octavo.quantization.formats.compressed_args import Args, SchemeGroup, parse_groups
from octavo.quantization.formats.fp8_weights import CACHE_UNUSED, fp8_linear, fp8_scheme
from octavo.quantization.formats.packed_words import unpack
from octavo.quantization.formats.reader import (
    AttentionShape,
    ReaderInputs,
    bias_tensor,
    float_linear,
    int8_tensor,
    pattern_matches,
    scale_tensor,
    texts,
)
from octavo.quantization.scheme import A8, A16, ActivationScheme, CacheScheme, LinearWeights, QuantizedTensor

LOG = logging.getLogger(__name__)


class CompressedTensorsReader:
    """Reads by `config_groups`, `ignore` and `kv_cache_scheme`. Raises CheckpointError for what is not served."""

    def __init__(self, inputs: ReaderInputs) -> None:
        config = inputs.quantization or {}
        self._inputs = inputs
        self._groups = parse_groups(config)
        self._ignore = texts(config.get("ignore"), "ignore")
        self._static_cache = _static_cache(config.get("kv_cache_scheme"))

    @property
    def weight_scheme(self) -> str:
        return "/".join(sorted({self._scheme_name(group) for group in self._groups})) or "float"

    def linear(self, name: str, *, shape: tuple[int, int], bias: bool, keep_float: bool = False) -> LinearWeights:
        group = self._group_of(name)
        if group is None:
            return float_linear(self._inputs, name, shape=shape, bias=bias)
        if group.weights.kind == "float":
            args = group.activations
            static = args is not None and not args.dynamic
            eight = args is not None
            return fp8_linear(self._inputs, name, shape=shape, bias=bias, static=static, activations=eight)
        read = _read_packed if group.packed else _read_int8
        weight = read(self._inputs, name, shape=shape, args=group.weights)
        bias_values = bias_tensor(self._inputs, name, size=shape[0], present=bias)
        return LinearWeights(weight, self._activation(name, group.activations), bias_values)

    def cache(self, attention: str, *, heads: AttentionShape) -> CacheScheme:
        if self._static_cache:
            return read_cache_scales(self._inputs.source, attention, heads=heads, required=True)
        if self._static_cache is None:  # scales of another number type
            return pass_over_cache_scales(self._inputs.source, attention, note=CACHE_UNUSED)
        return CacheScheme()

    def _scheme_name(self, group: SchemeGroup) -> str:
        if group.weights.kind == "float":
            return fp8_scheme(self._inputs, activations=group.activations is not None)
        return f"w8a{8 if group.activations else 16}"

    def _group_of(self, name: str) -> SchemeGroup | None:
        if any(_matches(pattern, name) for pattern in self._ignore):
            return None
        for test in (_is_exact, _is_pattern, _is_class):  # the most specific target wins
            for group in self._groups:
                if any(test(target) and _matches(target, name) for target in group.targets):
                    return group
        return None

    def _activation(self, name: str, args: Args | None) -> ActivationScheme:
        if args is None:
            return A16
        if args.dynamic:
            return A8
        source = self._inputs.source
        scale = scale_tensor(source, f"{name}.input_scale")
        if scale.numel() != 1:
            shape = list(scale.shape)
            raise CheckpointError(f"{name}.input_scale: has shape {shape}; a static scale per tensor is supported")
        zero_point = 0
        if f"{name}.input_zero_point" in source:
            stored = _int8_values(source.take(f"{name}.input_zero_point"), f"{name}.input_zero_point", like=scale)
            zero_point = int(stored.item())
        return ActivationScheme(1, static_scale=float(scale.item()), zero_point=zero_point)


def _read_int8(inputs: ReaderInputs, name: str, *, shape: tuple[int, int], args: Args) -> QuantizedTensor:
    q = int8_tensor(inputs.source, f"{name}.weight", shape=shape)
    scale = _weight_scale(inputs, name, shape=shape, args=args)
    return QuantizedTensor(q, scale, None if args.symmetric else _zero_point(inputs, name, scale=scale))


def _read_packed(inputs: ReaderInputs, name: str, *, shape: tuple[int, int], args: Args) -> QuantizedTensor:
    rows, columns = shape
    stored = inputs.source.take(f"{name}.weight_shape", shape=(2,)).tolist()
    if stored != list(shape):
        raise CheckpointError(f"{name}.weight_shape: says {stored}, the configuration asks for {list(shape)}")
    packed = inputs.source.take(f"{name}.weight_packed", shape=(rows, -(-columns // 4)))
    scale = _weight_scale(inputs, name, shape=shape, args=args)
    q = unpack(packed, name)[:, :columns].contiguous()
    if args.symmetric:
        return QuantizedTensor(q, scale)
    if args.strategy == "tensor":
        return QuantizedTensor(q, scale, _zero_point(inputs, name, scale=scale))
    # zero points are packed along the outputs
    words = inputs.source.take(f"{name}.weight_zero_point", shape=(-(-rows // 4), scale.shape[1]))
    zero_point = unpack(words.t().contiguous(), name)[:, :rows].t().contiguous()
    return QuantizedTensor(q, scale, zero_point)


def _weight_scale(inputs: ReaderInputs, name: str, *, shape: tuple[int, int], args: Args) -> Tensor:
    scale = scale_tensor(inputs.source, f"{name}.weight_scale")
    rows, columns = shape
    if args.strategy == "tensor":
        wanted: tuple[int, ...] = (1,)
        scale = scale.reshape(1) if scale.numel() == 1 else scale
    else:
        wanted = (rows, columns // args.group_size if args.group_size else 1)
    if tuple(scale.shape) != wanted or (args.group_size and columns % args.group_size):
        raise CheckpointError(f"{name}.weight_scale: has shape {list(scale.shape)}, its scheme asks for {list(wanted)}")
    return scale


def _zero_point(inputs: ReaderInputs, name: str, *, scale: Tensor) -> Tensor:
    stored = inputs.source.take(f"{name}.weight_zero_point")
    return _int8_values(stored, f"{name}.weight_zero_point", like=scale)


def _int8_values(stored: Tensor, name: str, *, like: Tensor) -> Tensor:
    """Zero points in the scales' shape, int8. Raises CheckpointError for another shape, type or range."""
    if stored.numel() != like.numel() or stored.dtype.is_floating_point or stored.dtype == torch.bool:
        raise CheckpointError(f"{name}: must be integers in the scales' shape {list(like.shape)}")
    wide = stored.reshape(like.shape).to(torch.int64)
    if bool((wide < -128).any()) or bool((wide > 127).any()):
        raise CheckpointError(f"{name}: zero points must be in [-128, 127]")
    return wide.to(torch.int8)


def _static_cache(scheme: object) -> bool | None:
    """True: int8 scales are stored. False: none. None: there may be some, of a type this cache does not use."""
    if scheme is None:
        return False
    if not isinstance(scheme, Mapping):
        raise CheckpointError("quantization_config.kv_cache_scheme: must be an object")
    if scheme.get("dynamic") is True:
        return False
    if scheme.get("type", "int") != "int" or scheme.get("num_bits", 8) != 8:
        LOG.warning("kv_cache_scheme is not int8: its scales are not used, the cache takes its own from each token")
        return None
    if scheme.get("symmetric", True) is not True:
        raise CheckpointError("quantization_config.kv_cache_scheme: an asymmetric cache is not supported")
    strategy = scheme.get("strategy")
    if strategy not in (None, "tensor", "attn_head", "channel"):
        raise CheckpointError(f"quantization_config.kv_cache_scheme: strategy {strategy!r} is not supported")
    return True


def _is_pattern(target: str) -> bool:
    return target.startswith("re:")


def _is_class(target: str) -> bool:
    return target == "Linear"


def _is_exact(target: str) -> bool:
    return not _is_pattern(target) and not _is_class(target)


def _matches(target: str, name: str) -> bool:
    """Whether a target or ignore entry means the Linear `name`: by name, by pattern, or as a class."""
    return pattern_matches(target, name) if _is_pattern(target) else _is_class(target) or target == name
