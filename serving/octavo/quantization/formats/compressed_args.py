"""The `config_groups` of a compressed-tensors configuration as checked values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from octavo.quantization.errors import CheckpointError

UNPACKED_FORMATS = ("int-quantized", "naive-quantized", "float-quantized")
PACKED_FORMAT = "pack-quantized"
KINDS = ("int", "float")


@dataclass(frozen=True)
class Args:
    """One tensor's 8-bit numbers. kind: int or float (e4m3); strategy: tensor, channel, group or token."""

    kind: str
    strategy: str
    symmetric: bool
    dynamic: bool
    group_size: int | None = None


@dataclass(frozen=True)
class SchemeGroup:
    """Products that are stored alike."""

    targets: tuple[str, ...]
    weights: Args
    activations: Args | None  # None: 16 bit
    packed: bool


def parse_groups(config: Mapping[str, object]) -> list[SchemeGroup]:
    """All groups, in order. Raises CheckpointError."""
    _refuse_extras(config)
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping):
        raise CheckpointError("quantization_config.config_groups: must be an object")
    return [_group(name, value, default_format=config.get("format")) for name, value in groups.items()]


def _refuse_extras(config: Mapping[str, object]) -> None:
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise CheckpointError(f"quantization_config.sparsity_config: {sparsity.get('format')!r} is not supported")
    transforms = config.get("transform_config")
    if isinstance(transforms, Mapping) and transforms.get("config_groups"):
        raise CheckpointError("quantization_config.transform_config: transforms are not supported")


def _group(name: str, value: object, *, default_format: object) -> SchemeGroup:
    where = f"quantization_config.config_groups.{name}"
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{where}: must be an object")
    form = value.get("format") or default_format
    if form not in (*UNPACKED_FORMATS, PACKED_FORMAT):
        served = ", ".join((*UNPACKED_FORMATS, PACKED_FORMAT))
        raise CheckpointError(f"{where}: format {form!r} is not supported (supported: {served})")
    targets = value.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(f"{where}.targets: must be a list of texts")
    if value.get("output_activations") is not None:
        raise CheckpointError(f"{where}.output_activations: not supported")
    weights = _args(f"{where}.weights", value.get("weights"), strategies=("tensor", "channel", "group"))
    if weights is None or weights.dynamic:
        raise CheckpointError(f"{where}.weights: static 8-bit weights are needed")
    activations = _args(f"{where}.input_activations", value.get("input_activations"), strategies=("token", "tensor"))
    _check_kinds(where, weights, activations, packed=form == PACKED_FORMAT)
    return SchemeGroup(tuple(targets), weights, activations, packed=form == PACKED_FORMAT)


def _args(where: str, value: object, *, strategies: tuple[str, ...]) -> Args | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{where}: must be an object")
    kind = value.get("type", "int")
    if value.get("num_bits", 8) != 8 or kind not in KINDS:
        given = f"{kind} of {value.get('num_bits')} bits"
        raise CheckpointError(f"{where}: {given} is not supported, only int or float of 8")
    dynamic = value.get("dynamic", False)
    group_size = _group_size(where, value.get("group_size"))
    strategy = value.get("strategy") or _implied_strategy(value.get("group_size"), dynamic=dynamic is True)
    if strategy not in strategies or dynamic not in (True, False) or (strategy == "token" and not dynamic):
        raise CheckpointError(f"{where}: strategy {strategy!r} with dynamic={dynamic!r} is not supported")
    if strategy == "group" and group_size is None:
        raise CheckpointError(f"{where}: strategy 'group' needs a group_size")
    return Args(
        kind=str(kind),
        strategy=str(strategy),
        symmetric=value.get("symmetric", True) is not False,
        dynamic=dynamic is True,
        group_size=group_size if strategy == "group" else None,
    )


def _check_kinds(where: str, weights: Args, activations: Args | None, *, packed: bool) -> None:
    """Float weights go with float activations, or with none; their scales are per tensor or channel."""
    if weights.kind == "int" and (activations is None or activations.kind == "int"):
        return
    if weights.kind == "int" or packed or (activations is not None and activations.kind == "int"):
        raise CheckpointError(f"{where}: weights and activations of different kinds are not supported")
    if weights.strategy == "group" or not weights.symmetric:
        raise CheckpointError(f"{where}.weights: fp8 with strategy {weights.strategy!r} is not supported")


def _group_size(where: str, value: object) -> int | None:
    if value is None or value == -1:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{where}.group_size: must be a whole number above zero")
    return value


def _implied_strategy(group_size: object, *, dynamic: bool) -> str:
    """What a missing `strategy` means."""
    if group_size is not None:
        return "channel" if group_size == -1 else "group"
    return "token" if dynamic else "tensor"
