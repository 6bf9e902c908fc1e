"""A LoRA adapter in peft's form: what it adds to which tensor of a checkpoint.

Reads adapter_config.json and adapter_model.safetensors. What cannot be folded into weights exactly is refused by name.
Runs offline; knows nothing of layers or quantisation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from octavo.quantization.errors import CheckpointError
from octavo.quantization.files import inside, read_json
from octavo.quantization.formats.reader import FLOAT_DTYPES
from octavo.quantization.scheme import row_slices

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
INITS = (None, True, False, "gaussian", "eva", "orthogonal")  # those that leave the base weights as they are
REFUSED = {  # settings that change more than weights, or base weights that the adapter does not hold
    "lora_bias": "biases within an adapter (lora_bias)",
    "target_parameters": "adapters of parameters that are no module of their own (target_parameters)",
    "layer_replication": "repeated layers (layer_replication)",
    "trainable_token_indices": "trained tokens (trainable_token_indices)",
    "alora_invocation_tokens": "adapters that start at a token (alora_invocation_tokens)",
    "use_qalora": "QALoRA",
    "megatron_config": "Megatron layers",
    "use_bdlora": "block-diagonal adapters",
}


@dataclass(frozen=True)
class Change:
    """Of one tensor. a: [r, K], b: [N, r], added as scale · b @ a; or what replaces the tensor.

    magnitude: [N], the length that each row has in the end (DoRA). transposed: the product's transpose is added.
    """

    scale: float = 0.0
    a: Tensor | None = None
    b: Tensor | None = None
    magnitude: Tensor | None = None
    transposed: bool = False
    replacement: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        if self.replacement is not None:
            return tuple(self.replacement.shape)
        assert self.a is not None
        assert self.b is not None
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.transposed else shape

    def apply(self, weight: Tensor) -> Tensor:
        """The changed tensor in the weight's type; sums are made in float32, some rows at a time."""
        if self.replacement is not None:
            return self.replacement.to(weight.dtype)
        assert self.a is not None
        assert self.b is not None
        a, b = (self.b.T, self.a.T) if self.transposed else (self.a, self.b)
        changed = torch.empty_like(weight, memory_format=torch.contiguous_format)
        for rows in row_slices(tuple(weight.shape)):
            values = weight[rows].float() + (b[rows].float() @ a.float()) * self.scale
            if self.magnitude is not None:
                lengths = torch.linalg.vector_norm(values, dim=1, keepdim=True)
                values *= self.magnitude[rows].float()[:, None] / lengths
            changed[rows] = values.to(weight.dtype)
        return changed


class Adapter:
    """The changes of an adapter by the names of the base model's tensors. Raises CheckpointError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._config = _read_config(folder)
        self._tensors = dict(_read_tensors(folder))
        self.notes: list[str] = []
        if self._config.get("fan_in_fan_out"):
            self.notes.append("fan_in_fan_out: not used, every product here is a Linear")
        self.changes = self._changes()

    def _changes(self) -> dict[str, Change]:
        changes: dict[str, Change] = {}
        modules: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self._tensors.items():
            module, part = _split(name)
            if part:
                modules.setdefault(module, {})[part] = tensor
            elif name.endswith((".weight", ".bias")) and "lora_" not in name:
                changes[name] = Change(replacement=tensor)  # modules_to_save, or trained biases
            else:
                raise CheckpointError(f"{WEIGHTS}: tensor {name} is of a kind that is not supported")
        changes.update({f"{module}.weight": self._low_rank(module, parts) for module, parts in modules.items()})
        if not changes:
            raise CheckpointError(f"{WEIGHTS}: holds no change")
        return changes

    def _low_rank(self, module: str, parts: Mapping[str, Tensor]) -> Change:
        kind = "lora_embedding_{}" if "lora_embedding_A" in parts else "lora_{}.weight"
        a, b = parts.get(kind.format("A")), parts.get(kind.format("B"))
        if a is None or b is None:
            raise CheckpointError(f"{WEIGHTS}: {module} has only one of {kind.format('A')} and {kind.format('B')}")
        rank = self._by_module("r", "rank_pattern", module)
        if a.dim() != 2 or b.dim() != 2 or not a.shape[0] == b.shape[1] == rank:
            found = f"{list(a.shape)} and {list(b.shape)}"
            raise CheckpointError(f"{WEIGHTS}: {module} has factors of {found}, {CONFIG} says rank {rank:g}")
        alpha = self._by_module("lora_alpha", "alpha_pattern", module)
        scale = alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
        magnitude = parts.get("lora_magnitude_vector")
        if (magnitude is not None) != bool(self._config.get("use_dora")):
            raise CheckpointError(f"{WEIGHTS}: {module}: use_dora and lora_magnitude_vector do not agree")
        if magnitude is not None and (kind.startswith("lora_e") or tuple(magnitude.shape) != (b.shape[0],)):
            raise CheckpointError(f"{WEIGHTS}: {module}.lora_magnitude_vector: has shape {list(magnitude.shape)}")
        return Change(scale, a, b, magnitude, transposed=kind.startswith("lora_e"))

    def _by_module(self, key: str, patterns: str, module: str) -> float:
        """A number of the configuration, or what a pattern says for this module."""
        table = self._config.get(patterns) or {}
        if not isinstance(table, Mapping):
            raise CheckpointError(f"{CONFIG}: {patterns} must be an object")
        value = self._config.get(key)
        for pattern, special in table.items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    value = special
                    break
            except re.error as error:
                raise CheckpointError(f"{CONFIG}: {patterns}: {pattern!r} is no regular expression: {error}") from None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
            raise CheckpointError(f"{CONFIG}: {key} must be a number above zero: {value!r}")
        return float(value)


def _read_config(folder: Path) -> Mapping[str, Any]:
    config = read_json(inside(folder, CONFIG), name=CONFIG)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{CONFIG}: peft_type {kind!r} is not supported, only LORA")
    for key, what in REFUSED.items():
        if config.get(key):
            raise CheckpointError(f"{CONFIG}: {what}: not supported")
    if config.get("init_lora_weights") not in INITS:
        init = config["init_lora_weights"]
        raise CheckpointError(f"{CONFIG}: init_lora_weights {init!r} changes the base weights: not supported")
    return config


def _read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """By name without peft's prefix; every value finite."""
    path = inside(folder, WEIGHTS)
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        raise CheckpointError(f"{folder}: adapter_model.bin is a pickle; save the adapter as safetensors")
    try:
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (no mapping: only `keys` lists)
                tensor = opened.get_tensor(name)
                if tensor.dtype not in FLOAT_DTYPES or not bool(torch.isfinite(tensor.float()).all()):
                    raise CheckpointError(f"{WEIGHTS}: {name}: needs finite values of a float type")
                yield name.removeprefix(PREFIX).replace(".base_layer.", "."), tensor
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from None


def _split(name: str) -> tuple[str, str]:
    """Module and part of a factor's name; part "" for other tensors."""
    for part in PARTS:
        for ending in (part, f"{part}.weight"):
            if name.endswith(f".{ending}"):
                return name.removesuffix(f".{ending}"), part
    return name, ""
