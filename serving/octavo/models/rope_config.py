"""Rotary embedding parameters in both spellings: `rope_theta` with `rope_scaling`, and `rope_parameters`. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from octavo.quantization.errors import CheckpointError

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


class FieldAccess(Protocol):
    """The typed access of `config.Fields`."""

    def get(self, name: str) -> Any: ...
    def integer(self, name: str, *, default: int | None = None, low: int = 1, high: int = 1 << 31) -> int: ...
    def number(self, name: str, *, default: float | None = None) -> float: ...
    def object(self, name: str) -> Any: ...


@dataclass(frozen=True)
class RopeConfig:
    """How positions turn q and k. `dynamic` stretches beyond the context only, which is not served: as default."""

    kind: str
    theta: float
    rotary_dim: int
    context_length: int  # most positions it is meant for
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None


def parse_rope(fields: FieldAccess, *, head_dim: int) -> RopeConfig:
    """The configuration's rope. Raises CheckpointError."""
    values = fields.object("rope_parameters") or fields.object("rope_scaling") or {}
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind not in KINDS:
        raise CheckpointError(f"config.json: rope type {kind!r} is not supported (supported: {', '.join(KINDS)})")
    max_positions = fields.integer("max_position_embeddings", default=2048)
    theta = values.get("rope_theta")
    partial = _number(values, "partial_rotary_factor", fields.number("partial_rotary_factor", default=1.0))
    rotary_dim = int(head_dim * partial)
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > head_dim:
        raise CheckpointError(f"config.json: {rotary_dim} rotary dimensions of a head of {head_dim} are not possible")
    original = int(_number(values, "original_max_position_embeddings", float(max_positions)))
    factor = _number(values, "factor", 1.0)
    return RopeConfig(
        kind=kind,
        theta=_number({"rope_theta": theta}, "rope_theta", fields.number("rope_theta", default=10000.0)),
        rotary_dim=rotary_dim,
        context_length=_context(fields, values, kind=kind, stretched=int(original * factor), plain=max_positions),
        factor=factor,
        original_context=original,
        low_freq_factor=_number(values, "low_freq_factor", 1.0),
        high_freq_factor=_number(values, "high_freq_factor", 4.0),
        beta_fast=_number(values, "beta_fast", 32.0),
        beta_slow=_number(values, "beta_slow", 1.0),
        truncate=values.get("truncate", True) is not False,
        attention_factor=_optional(values, "attention_factor"),
        mscale=_optional(values, "mscale"),
        mscale_all_dim=_optional(values, "mscale_all_dim"),
    )


def _context(fields: FieldAccess, values: Any, *, kind: str, stretched: int, plain: int) -> int:
    """Positions that the scaled embedding is meant for; some configurations only give the length before scaling."""
    if kind == "yarn" or (kind == "linear" and "original_max_position_embeddings" in values):
        return max(plain, stretched)
    if kind == "linear":
        return max(plain, fields.integer("max_sequence_length", default=plain))
    return plain


def _number(values: Any, name: str, default: float) -> float:
    value = values.get(name)
    if value is None:
        return default
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e12:
        raise CheckpointError(f"config.json: rope's {name} must be a number above zero")
    return float(value)


def _optional(values: Any, name: str) -> float | None:
    return None if values.get(name) is None else _number(values, name, 1.0)
