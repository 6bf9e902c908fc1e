"""Compressed-tensors checkpoints with 8-bit integer weights: int-quantized (W8A8, W8A16) and pack-quantized.

Says for each product which config group it belongs to and reads its tensors. Dynamic activations are written
symmetrically, whatever the checkpoint says: nothing stored depends on that.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from octavo.quantization.errors import CheckpointError
from octavo.quantization.formats.cache_scales import pass_over_cache_scales, read_cache_scales
from octavo.quantization.formats.compressed_args import IntArgs, SchemeGroup, parse_groups
from octavo.quantization.formats.reader import ReaderInputs, bias_tensor, float_linear, scale_tensor, type_name
from octavo.quantization.scheme import A8, A16, ActivationScheme, CacheScheme, LinearWeights, QuantizedTensor

LOG = logging.getLogger(__name__)


class CompressedTensorsReader:
    """Reads by `config_groups`, `ignore` and `kv_cache_scheme`. Raises CheckpointError for what is not served."""

    def __init__(self, inputs: ReaderInputs) -> None:
        config = inputs.quantization or {}
        self._inputs = inputs
        self._groups = parse_groups(config)
        self._ignore = _texts(config.get("ignore"), "ignore")
        self._static_cache = _static_cache(config.get("kv_cache_scheme"))
        if inputs.weight_quant != "auto":
            LOG.warning("WEIGHT_QUANT=%s has no effect: the checkpoint is quantized already", inputs.weight_quant)

    @property
    def weight_scheme(self) -> str:
        return "/".join(sorted({f"w8a{8 if group.activations else 16}" for group in self._groups})) or "float"

    def linear(self, name: str, *, shape: tuple[int, int], bias: bool, keep_float: bool = False) -> LinearWeights:
        group = self._group_of(name)
        if group is None:
            return float_linear(self._inputs, name, shape=shape, bias=bias)
        read = _read_packed if group.packed else _read_int8
        weight = read(self._inputs, name, shape=shape, args=group.weights)
        bias_values = bias_tensor(self._inputs, name, size=shape[0], present=bias)
        return LinearWeights(weight, self._activation(name, group.activations), bias_values)

    def cache(self, attention: str, *, num_kv_heads: int) -> CacheScheme:
        if self._static_cache:
            return read_cache_scales(self._inputs.source, attention, num_kv_heads=num_kv_heads, required=True)
        if self._static_cache is None:  # scales of another number type
            pass_over_cache_scales(self._inputs.source, attention)
        return CacheScheme()

    def _group_of(self, name: str) -> SchemeGroup | None:
        if any(_matches(pattern, name) for pattern in self._ignore):
            return None
        for test in (_is_exact, _is_pattern, _is_class):  # the most specific target wins
            for group in self._groups:
                if any(test(target) and _matches(target, name) for target in group.targets):
                    return group
        return None

    def _activation(self, name: str, args: IntArgs | None) -> ActivationScheme:
        if args is None:
            return A16
        if args.dynamic:
            return A8
        source = self._inputs.source
        scale = scale_tensor(source, f"{name}.input_scale")
        if scale.numel() != 1:
            shape = list(scale.shape)
            raise CheckpointError(f"{name}.input_scale: has shape {shape}; a static scale per tensor is supported")
        zero_point_name = f"{name}.input_zero_point"
        zero_point = int(source.take(zero_point_name).item()) if zero_point_name in source else 0
        return ActivationScheme(1, static_scale=float(scale.item()), zero_point=zero_point)


def _read_int8(inputs: ReaderInputs, name: str, *, shape: tuple[int, int], args: IntArgs) -> QuantizedTensor:
    q = inputs.source.take(f"{name}.weight", shape=shape)
    if q.dtype != torch.int8:
        raise CheckpointError(f"{name}.weight: is {type_name(q)}, the quantization_config says int8")
    scale = _weight_scale(inputs, name, shape=shape, args=args)
    return QuantizedTensor(q, scale, None if args.symmetric else _zero_point(inputs, name, scale=scale))


def _read_packed(inputs: ReaderInputs, name: str, *, shape: tuple[int, int], args: IntArgs) -> QuantizedTensor:
    rows, columns = shape
    stored = tuple(inputs.source.take(f"{name}.weight_shape").tolist())
    if stored != shape:
        raise CheckpointError(f"{name}.weight_shape: says {list(stored)}, the configuration asks for {list(shape)}")
    packed = inputs.source.take(f"{name}.weight_packed", shape=(rows, -(-columns // 4)))
    scale = _weight_scale(inputs, name, shape=shape, args=args)
    q = _unpack(packed, name)[:, :columns].contiguous()
    if args.symmetric:
        return QuantizedTensor(q, scale)
    if args.strategy == "tensor":
        return QuantizedTensor(q, scale, _zero_point(inputs, name, scale=scale))
    # zero points are packed along the outputs
    words = inputs.source.take(f"{name}.weight_zero_point", shape=(-(-rows // 4), scale.shape[1]))
    zero_point = _unpack(words.t().contiguous(), name)[:, :rows].t().contiguous()
    return QuantizedTensor(q, scale, zero_point)


def _unpack(words: Tensor, name: str) -> Tensor:
    """[N, W] int32 words of four values + 128 each, the first in the lowest byte → [N, 4 · W] int8."""
    if words.dtype != torch.int32:
        raise CheckpointError(f"{name}: packed values are {type_name(words)}, int32 is needed")
    unsigned = words.contiguous().view(torch.uint8)  # little-endian, like every machine this runs on
    return unsigned.bitwise_xor(0x80).view(torch.int8)  # q + 128 and q differ in the top bit alone


def _weight_scale(inputs: ReaderInputs, name: str, *, shape: tuple[int, int], args: IntArgs) -> Tensor:
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
    zero_point = inputs.source.take(f"{name}.weight_zero_point")
    if zero_point.numel() != scale.numel() or zero_point.dtype.is_floating_point:
        raise CheckpointError(f"{name}.weight_zero_point: must be integers in the scales' shape {list(scale.shape)}")
    return zero_point.reshape(scale.shape).to(torch.int8)


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
    if strategy not in (None, "tensor", "attn_head"):
        raise CheckpointError(f"quantization_config.kv_cache_scheme: strategy {strategy!r} is not supported")
    return True


def _texts(value: object, name: str) -> Sequence[str]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"quantization_config.{name}: must be a list of texts")
    return value


def _is_pattern(target: str) -> bool:
    return target.startswith("re:")


def _is_class(target: str) -> bool:
    return target == "Linear"


def _is_exact(target: str) -> bool:
    return not _is_pattern(target) and not _is_class(target)


def _matches(target: str, name: str) -> bool:
    """Whether a target or ignore entry means the Linear `name`: by name, by pattern, or as a class."""
    if not _is_pattern(target):
        return _is_class(target) or target == name
    try:
        return re.match(target.removeprefix("re:"), name) is not None
    except re.error as error:
        raise CheckpointError(f"quantization_config: {target!r} is not a regular expression: {error}") from None
