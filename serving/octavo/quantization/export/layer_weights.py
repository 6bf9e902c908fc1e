"""One layer of a float checkpoint under the same names for every family, and its way back to the checkpoint's names.

`q.weight`, `q.bias`, `experts.3.up.weight`, `input_norm`, …: a flat dict. A fused q/k/v product is taken apart here and
put together again. Knows nothing of what is done to the weights in between.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.models.config import ModelConfig
from octavo.models.loader import separated_rows
from octavo.quantization.errors import CheckpointError
from octavo.quantization.formats.reader import ReaderInputs, float_tensor
from octavo.quantization.formats.source import TensorSource
from octavo.quantization.scheme import QuantizedTensor

Weights = dict[str, Tensor]
ATTENTION = ("q", "k", "v")
FLOAT_ROLES = ("router", "shared_gate")  # never quantised
FUSED = "qkv"


@dataclass(frozen=True)
class Product:
    """A Linear of a layer. role: its name here; name: in the checkpoint, without `.weight`."""

    role: str
    name: str
    shape: tuple[int, int]
    bias: bool = False

    @property
    def unit(self) -> str:
        """Products that share an input, and so a scheme: qkv, o, mlp or down; float for those never quantised."""
        last = self.role.rpartition(".")[2]
        if self.role in FLOAT_ROLES:
            return "float"
        return {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "mlp", "up": "mlp"}.get(last, last)

    @property
    def site(self) -> str:
        """The input it multiplies: its unit, with the expert before it."""
        head, dot, _ = self.role.rpartition(".")
        return f"{head}{dot}{self.unit}"


def layer_products(config: ModelConfig, index: int) -> list[Product]:
    """Every product of a layer as the checkpoint holds it; a fused q/k/v has the role `qkv`."""
    names, prefix = config.family.names, config.family.layer.format(layer=index) + "."
    hidden, q_size, kv_size = (
        config.hidden_size,
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    )
    sizes = (q_size, kv_size, kv_size) if len(names.qkv) == 3 else (q_size + 2 * kv_size,)
    roles = ATTENTION if len(names.qkv) == 3 else (FUSED,)
    found = [
        Product(role, prefix + name, (size, hidden), config.qkv_bias)
        for role, name, size in zip(roles, names.qkv, sizes)
    ]
    found.append(Product("o", prefix + names.out, (hidden, q_size), config.out_bias))
    if config.moe is None or index not in config.moe.layers:
        parts = (prefix + names.gate, prefix + names.up, prefix + names.down)
        return found + _mlp("", parts, hidden=hidden, size=config.intermediate_size, bias=config.mlp_bias)
    found.append(Product("router", prefix + names.router, (config.moe.num_experts, hidden)))
    for expert in range(config.moe.num_experts):
        base = prefix + names.expert.format(expert=expert)
        gate, up, down = (f"{base}.{part}" for part in names.expert_parts)
        size = config.moe.intermediate_size
        found += _mlp(f"experts.{expert}.", (gate, up, down), hidden=hidden, size=size, bias=False)
    if config.moe.shared_intermediate_size is not None:
        base = prefix + names.shared_expert
        gate, up, down = (f"{base}.{part}" for part in names.expert_parts)
        size = config.moe.shared_intermediate_size
        found += _mlp("shared.", (gate, up, down), hidden=hidden, size=size, bias=False)
        found.append(Product("shared_gate", prefix + names.shared_gate, (1, hidden)))
    return found


def _mlp(prefix: str, names: tuple[str, str, str], *, hidden: int, size: int, bias: bool) -> list[Product]:
    gate, up, down = names
    return [
        Product(f"{prefix}gate", gate, (size, hidden), bias),
        Product(f"{prefix}up", up, (size, hidden), bias),
        Product(f"{prefix}down", down, (hidden, size), bias),
    ]


def layer_vectors(config: ModelConfig, index: int) -> dict[str, tuple[str, int]]:
    """Norms: role → (name in the checkpoint, size)."""
    names, prefix = config.family.names, config.family.layer.format(layer=index) + "."
    found = {
        "input_norm": (f"{prefix}{names.input_norm}.weight", config.hidden_size),
        "mlp_norm": (f"{prefix}{names.mlp_norm}.weight", config.hidden_size),
    }
    if config.family.qk_norm:
        found["q_norm"] = (f"{prefix}{names.q_norm}.weight", config.head_dim)
        found["k_norm"] = (f"{prefix}{names.k_norm}.weight", config.head_dim)
    return found


def expand(products: list[Product], config: ModelConfig) -> list[Product]:
    """The products with a fused q/k/v as three, all of its name."""
    found = []
    kv_size = config.num_kv_heads * config.head_dim
    for product in products:
        if product.role != FUSED:
            found.append(product)
            continue
        sizes = (config.num_heads * config.head_dim, kv_size, kv_size)
        found += [
            Product(role, product.name, (size, product.shape[1]), product.bias) for role, size in zip("qkv", sizes)
        ]
    return found


def read_layer(source: TensorSource, config: ModelConfig, index: int) -> Weights:
    """All tensors of a layer as float32. Raises CheckpointError."""
    weights: Weights = {}
    for product in layer_products(config, index):
        weights[f"{product.role}.weight"] = read_float(source, f"{product.name}.weight", product.shape)
        if product.bias:
            weights[f"{product.role}.bias"] = read_float(source, f"{product.name}.bias", product.shape[:1])
    for role, (name, size) in layer_vectors(config, index).items():
        weights[role] = read_float(source, name, (size,))
    source.release()
    return _separated(weights, config) if f"{FUSED}.weight" in weights else weights


def read_float(source: TensorSource, name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor as float32, every value finite. Raises CheckpointError."""
    tensor = float_tensor(ReaderInputs(source, None), name, shape).to(torch.float32, copy=True)
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{name}: has values that are not finite")
    return tensor


def write_layer(
    config: ModelConfig,
    index: int,
    weights: Mapping[str, Tensor],
    quantized: Mapping[str, QuantizedTensor],  # by role
    *,
    dtype_of: Mapping[str, torch.dtype],  # of the checkpoint's tensors, by name
    packed: bool = False,
    input_scales: Mapping[str, Tensor] | None = None,  # by site, [1]; None: dynamic
) -> dict[str, Tensor]:
    """The layer under the checkpoint's names: int8 weights with scales, and floats in the types that they had."""
    tensors: dict[str, Tensor] = {}
    for product in layer_products(config, index):
        rows = separated_rows(config).argsort() if product.role == FUSED else None
        roles = ATTENTION if product.role == FUSED else (product.role,)
        dtype = dtype_of[f"{product.name}.weight"]
        if roles[0] in quantized:
            parts = [quantized[role] for role in roles]
            tensors.update(_levels(product, _rows([part.q for part in parts], rows), packed=packed))
            tensors[f"{product.name}.weight_scale"] = _rows([part.scale for part in parts], rows)
            if input_scales:
                tensors[f"{product.name}.input_scale"] = input_scales[product.site].clone()
        else:
            tensors[f"{product.name}.weight"] = _rows([weights[f"{role}.weight"] for role in roles], rows)
            tensors[f"{product.name}.weight"] = _stored(tensors[f"{product.name}.weight"], dtype, product.name)
        if product.bias:
            dtype = dtype_of[f"{product.name}.bias"]
            bias = _rows([weights[f"{role}.bias"] for role in roles], rows)
            tensors[f"{product.name}.bias"] = _stored(bias, dtype, f"{product.name}.bias")
    for role, (name, _) in layer_vectors(config, index).items():
        tensors[name] = _stored(weights[role], dtype_of[name], name)
    return tensors


def check_names(source: TensorSource, config: ModelConfig) -> None:
    """Every tensor of the folder must belong to the model. Raises CheckpointError."""
    known = {config.family.embedding, config.family.norm, f"{config.family.head}.weight"}
    for index in range(config.num_layers):
        known |= {name for name, _ in layer_vectors(config, index).values()}
        known |= {f"{product.name}.{kind}" for product in layer_products(config, index) for kind in ("weight", "bias")}
    left = [name for name in sorted(set(source.names()) - known) if not _ignored(name, config)]
    if left:
        raise CheckpointError(f"the checkpoint has tensors that {config.architecture} does not use: {left[0]}")


def _ignored(name: str, config: ModelConfig) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in config.family.ignored)


def _separated(weights: Weights, config: ModelConfig) -> Weights:
    kv_size = config.num_kv_heads * config.head_dim
    sizes = [config.num_heads * config.head_dim, kv_size, kv_size]
    rows = separated_rows(config)
    for kind in ("weight", "bias"):
        fused = weights.pop(f"{FUSED}.{kind}", None)
        if fused is not None:
            parts = fused[rows].split(sizes)
            weights.update({f"{role}.{kind}": part.contiguous() for role, part in zip(ATTENTION, parts)})
    return weights


def _stored(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """In the type that the checkpoint has for it. Raises CheckpointError if smoothing left that type's range."""
    stored = tensor.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        raise CheckpointError(f"{name}: its smoothed values do not fit into {str(dtype)[6:]}; use --no-smoothing")
    return stored


def _levels(product: Product, q: Tensor, *, packed: bool) -> dict[str, Tensor]:
    """int8 as it is, or four in a word: q + 128, the first in the lowest byte."""
    if not packed:
        return {f"{product.name}.weight": q}
    padded = torch.nn.functional.pad(q.to(torch.int16) + 128, (0, -q.shape[1] % 4)).to(torch.uint8)
    words = padded.contiguous().view(torch.int32)  # [N, ceil(K / 4)]
    return {f"{product.name}.weight_packed": words, f"{product.name}.weight_shape": torch.tensor(product.shape)}


def _rows(parts: list[Tensor], order: Tensor | None) -> Tensor:
    joined = torch.cat(parts) if len(parts) > 1 else parts[0]
    return (joined if order is None else joined[order]).contiguous()
