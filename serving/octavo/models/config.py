"""A model's config.json as one frozen value, read field by field: nothing in it is ever executed or imported.

Read by the engine and by the front end (context length, end tokens); imports no torch. Unknown fields are ignored,
meaningful ones that are not served are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.models.families import Family, find_family
from octavo.models.rope_config import RopeConfig, parse_rope
from octavo.quantization.errors import CheckpointError
from octavo.quantization.files import foreign_weights, inside, read_json

MAX_CONFIG_BYTES = 16 << 20
GENERATION = "generation_config.json"
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class MoeConfig:
    """Layers with experts instead of one MLP."""

    num_experts: int
    top_k: int
    intermediate_size: int
    renormalize: bool  # the chosen experts' weights are divided by their sum
    layers: frozenset[int]
    shared_intermediate_size: int | None = None  # of an expert that every row goes through, behind a gate of its own


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of one decoder."""

    architecture: str
    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    windows: tuple[int | None, ...]  # per layer; a token sees itself and the window - 1 before it
    context_length: int
    tie_word_embeddings: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    dtype: str  # of the float tensors, as the configuration says
    end_token_ids: tuple[int, ...]
    moe: MoeConfig | None = None
    quantization: Mapping[str, object] | None = None


def load_config(model_dir: Path, *, config_path: Path | None = None) -> ModelConfig:
    """Read config.json (or `config_path`), and generation_config.json for end tokens. Raises CheckpointError."""
    path = config_path or model_dir / "config.json"
    if not path.is_file():
        reason = foreign_weights(model_dir) or "MODEL_DIR must be a folder with a model in it"
        raise CheckpointError(f"{path}: no such file; {reason}")
    if path.parent == model_dir:
        inside(model_dir, path.name)
    raw = read_json(path, name=path.name, max_bytes=MAX_CONFIG_BYTES)
    if not (model_dir / GENERATION).is_file():
        return parse_config(raw)
    return parse_config(raw, generation=read_json(inside(model_dir, GENERATION), name=GENERATION))


def parse_config(raw: Mapping[str, Any], *, generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """The configuration of a parsed config.json. Raises CheckpointError: missing, malformed or not served."""
    architecture, family = find_family(raw)
    fields = Fields(raw)
    if fields.text("hidden_act", default="silu") not in ("silu", "swish"):
        raise CheckpointError(f"config.json: hidden_act {raw['hidden_act']!r} is not supported")
    num_heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    num_layers = fields.integer("num_hidden_layers", high=1024)
    head_dim = fields.integer("head_dim", default=hidden_size // num_heads, high=1024)
    num_kv_heads = fields.integer("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}"
        )
    rope = parse_rope(fields, head_dim=head_dim)
    vocab_size = fields.integer("vocab_size")
    return ModelConfig(
        architecture=architecture,
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
        rope=rope,
        windows=_windows(fields, family, num_layers=num_layers),
        context_length=rope.context_length,
        tie_word_embeddings=fields.switch("tie_word_embeddings"),
        qkv_bias=_bias(fields, family.qkv_bias),
        out_bias=_bias(fields, family.out_bias),
        mlp_bias=_bias(fields, family.mlp_bias),
        dtype=_dtype(fields),
        end_token_ids=_end_tokens(raw, generation or {}, vocab_size=vocab_size),
        moe=_moe(fields, num_layers=num_layers) if family.moe else None,
        quantization=fields.object("quantization_config") or fields.object("compression_config"),
    )


class Fields:
    """Typed access to a JSON object; a null counts as missing. Raises CheckpointError with the field's name."""

    def __init__(self, raw: Mapping[str, Any], *, where: str = "config.json") -> None:
        self._raw = raw
        self._where = where

    def get(self, name: str) -> Any:
        return self._raw.get(name)

    def fail(self, name: str, need: str) -> CheckpointError:
        value = self._raw.get(name)
        state = "is missing" if value is None else f"must be {need}, got {type(value).__name__} {str(value)[:40]}"
        return CheckpointError(f"{self._where}: {name} {state}")

    def integer(self, name: str, *, default: int | None = None, low: int = 1, high: int = 1 << 31) -> int:
        value = self._raw.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.fail(name, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, *, default: float | None = None) -> float:
        value = self._raw.get(name)
        value = default if value is None else value
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self.fail(name, "a number above zero")
        return float(value)

    def switch(self, name: str, *, default: bool = False) -> bool:
        value = self._raw.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.fail(name, "true or false")
        return value

    def text(self, name: str, *, default: str) -> str:
        value = self._raw.get(name)
        value = default if value is None else value
        if not isinstance(value, str):
            raise self.fail(name, "a text")
        return value

    def object(self, name: str) -> Mapping[str, Any] | None:
        value = self._raw.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise self.fail(name, "an object")
        return value or None


def _bias(fields: Fields, bias: bool | str) -> bool:
    return fields.switch(bias) if isinstance(bias, str) else bias


def _dtype(fields: Fields) -> str:
    name = fields.text("dtype", default=fields.text("torch_dtype", default="bfloat16")).removeprefix("torch.")
    if name not in DTYPES:
        raise CheckpointError(f"config.json: dtype {name!r} is not supported (supported: {', '.join(DTYPES)})")
    return name


def _windows(fields: Fields, family: Family, *, num_layers: int) -> tuple[int | None, ...]:
    """The attention window of each layer; None sees everything."""
    window = fields.get("sliding_window")
    if family.window == "none" or window is None:
        return (None,) * num_layers
    if family.window == "switch" and not fields.switch("use_sliding_window"):
        return (None,) * num_layers
    window = fields.integer("sliding_window")
    kinds = fields.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == num_layers:
        if not set(kinds) <= {"full_attention", "sliding_attention"}:
            raise CheckpointError("config.json: layer_types: only full_attention and sliding_attention are supported")
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    first = fields.integer("max_window_layers", default=28, low=0) if family.window == "switch" else 0
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _moe(fields: Fields, *, num_layers: int) -> MoeConfig:
    num_experts = fields.integer("num_local_experts", default=fields.get("num_experts"), high=4096)
    top_k = fields.integer("num_experts_per_tok", high=num_experts)
    is_mixtral = fields.get("moe_intermediate_size") is None
    step = fields.integer("decoder_sparse_step", default=1)
    dense = fields.get("mlp_only_layers") or []
    has_shared = fields.get("shared_expert_intermediate_size") is not None
    return MoeConfig(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=fields.integer("intermediate_size" if is_mixtral else "moe_intermediate_size"),
        renormalize=True if is_mixtral else fields.switch("norm_topk_prob"),
        layers=frozenset(layer for layer in range(num_layers) if layer not in dense and (layer + 1) % step == 0),
        shared_intermediate_size=fields.integer("shared_expert_intermediate_size") if has_shared else None,
    )


def _end_tokens(raw: Mapping[str, Any], generation: Mapping[str, Any], *, vocab_size: int) -> tuple[int, ...]:
    """End tokens of both files, the generation's first, each once."""
    found: list[int] = []
    for source in (generation, raw):
        value = source.get("eos_token_id")
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, int) and not isinstance(token, bool) and 0 <= token < vocab_size:
                found.append(token)
    return tuple(dict.fromkeys(found))
