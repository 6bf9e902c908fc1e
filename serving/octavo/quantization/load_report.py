"""What a model was made of: per product and cache the scheme, the tensors it came from, bytes and losses.

Filled by the loader on its own thread; `octavo inspect` prints it, the log has it. Knows nothing of files or kernels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from torch import Tensor

from octavo.quantization.formats.source import Taken
from octavo.quantization.scheme import ActivationScheme, CacheScheme, LinearWeights, QuantizedTensor

MIB = 1 << 20
COLUMNS = ("product", "shape", "stored", "weight", "activation", "KiB", "loss", "from")


@dataclass(frozen=True)
class ProductReport:
    """One product as read. loss: ‖W − Ŵ‖ / ‖W‖ if its weight was written anew; None: kept, or not measured."""

    name: str
    shape: tuple[int, int]
    stored: str
    weight: str
    activation: str
    num_bytes: int
    tensors: tuple[str, ...]
    loss: float | None
    note: str


@dataclass(frozen=True)
class CacheReport:
    """The cache of one attention module."""

    name: str
    scheme: str
    tensors: tuple[str, ...]
    note: str


@dataclass
class LoadReport:
    """All of a model, in the order of reading."""

    weight_scheme: str = ""
    products: list[ProductReport] = field(default_factory=list)
    caches: list[CacheReport] = field(default_factory=list)
    float_bytes: int = 0  # embedding and norms
    _last: str = "the configuration"

    def add_product(self, name: str, linear: LinearWeights, *, taken: Sequence[Taken]) -> None:
        """Note a product that was read from the tensors `taken`."""
        self._last = name
        product = ProductReport(
            name=name,
            shape=linear.shape,
            stored=max(taken, key=lambda tensor: tensor.num_bytes).dtype if taken else "",
            weight=weight_text(linear.weight),
            activation=activation_text(linear.activation),
            num_bytes=_num_bytes(linear),
            tensors=tuple(tensor.name for tensor in taken),
            loss=linear.loss,
            note=linear.note,
        )
        self.products.append(product)

    def add_cache(self, name: str, scheme: CacheScheme, *, int8: bool, taken: Sequence[Taken]) -> None:
        """Note a layer's cache."""
        tensors = tuple(tensor.name for tensor in taken)
        self.caches.append(CacheReport(name, cache_text(scheme) if int8 else "float", tensors, scheme.note))

    def add_float(self, name: str, tensor: Tensor) -> None:
        """Note a tensor that is no product."""
        self._last = name
        self.float_bytes += tensor.numel() * tensor.element_size()

    def last_name(self) -> str:
        """Of what was read last: where an error is."""
        return self._last

    @property
    def num_bytes(self) -> int:
        return self.float_bytes + sum(product.num_bytes for product in self.products)

    @property
    def notes(self) -> list[str]:
        """Each thing that was left out or changed, once."""
        notes = [product.note for product in self.products] + [cache.note for cache in self.caches]
        return list(dict.fromkeys(note for note in notes if note))

    @property
    def worst(self) -> ProductReport | None:
        """The product that lost most by being written anew; None if none was measured."""
        measured = [product for product in self.products if product.loss is not None]
        return max(measured, key=lambda product: product.loss or 0.0, default=None)

    def summary(self) -> str:
        """One line."""
        caches = "/".join(sorted({cache.scheme for cache in self.caches}))
        size = f"{len(self.products)} products, {self.num_bytes / MIB:.1f} MiB"
        parts = [f"weights: {self.weight_scheme}, {size}", f"cache: {caches}"]
        if self.worst is not None and self.worst.loss is not None:
            parts.append(f"largest loss {self.worst.loss:.2e} in {self.worst.name}")
        return "; ".join([*parts, *self.notes])

    def table(self) -> str:
        """A line per product and cache; the same product of many experts is one line."""
        rows = [COLUMNS, *(_product_row(same) for same in _together(self.products))]
        rows += [(cache.name, "", "", f"cache {cache.scheme}", "", "", "", _shorten(cache)) for cache in self.caches]
        widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS) - 1)] + [0]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        return "\n".join(lines)

    def to_json(self) -> dict[str, object]:
        """The same as plain values."""
        return {
            "weight_scheme": self.weight_scheme,
            "num_bytes": self.num_bytes,
            "float_bytes": self.float_bytes,
            "notes": self.notes,
            "products": [asdict(product) for product in self.products],
            "caches": [asdict(cache) for cache in self.caches],
        }


def weight_text(weight: QuantizedTensor | Tensor) -> str:
    """For people: `int8 per channel`, `int8 groups of 128, zero points`, `fp8 per tensor`, `bfloat16`, …"""
    if not isinstance(weight, QuantizedTensor):
        return str(weight.dtype).removeprefix("torch.")
    kind = "fp8" if weight.q.is_floating_point() else "int8"
    if weight.group_size is not None:
        text = f"{kind} groups of {weight.group_size}"
    else:
        text = f"{kind} per tensor" if weight.scale.numel() == 1 else f"{kind} per channel"
    return text if weight.zero_point is None else f"{text}, zero points"


def activation_text(scheme: ActivationScheme) -> str:
    if scheme.limbs != 1:
        return {0: "float", 2: "two int8 per token"}[scheme.limbs]
    kind = "fp8" if scheme.fp8 else "int8"
    if scheme.static_scale is None:
        return f"{kind} per token"
    return f"{kind} static" if scheme.zero_point == 0 else f"{kind} static, zero point"


def cache_text(scheme: CacheScheme) -> str:
    if scheme.k_scale is None:
        return "int8 dynamic"
    return "int8 static per head" if scheme.k_scale.numel() > 1 else "int8 static"


def _num_bytes(linear: LinearWeights) -> int:
    tensors = [linear.bias]
    if isinstance(linear.weight, QuantizedTensor):
        tensors += [linear.weight.q, linear.weight.scale, linear.weight.zero_point]
    else:
        tensors.append(linear.weight)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _together(products: Sequence[ProductReport]) -> list[list[ProductReport]]:
    """Products in order; those of experts that are alike in all but their number as one."""
    groups: dict[tuple[object, ...], list[ProductReport]] = {}
    for product in products:
        kind = re.sub(r"experts\.\d+\.", "experts.*.", product.name)
        key = (kind, product.shape, product.stored, product.weight, product.activation, product.note)
        groups.setdefault(key, []).append(product)
    return list(groups.values())


def _product_row(same: Sequence[ProductReport]) -> tuple[str, ...]:
    first = same[0]
    name = first.name if len(same) == 1 else re.sub(r"experts\.\d+\.", f"experts.({len(same)}).", first.name)
    losses = [product.loss for product in same if product.loss is not None]
    return (
        name,
        "x".join(map(str, first.shape)),
        first.stored,
        first.weight,
        first.activation,
        f"{sum(product.num_bytes for product in same) / 1024:.1f}",
        f"{max(losses):.2e}" if losses else "-",
        _shorten(first),
    )


def _shorten(line: ProductReport | CacheReport) -> str:
    """The tensors' names without the product's, and the note."""
    names = ", ".join(name.removeprefix(f"{line.name}.") for name in line.tensors)
    return f"{names} ({line.note})" if line.note else names
