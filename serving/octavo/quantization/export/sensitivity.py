"""Which products stay float: those whose rounding changes a layer's output most for each parameter, under a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from octavo.models.config import ModelConfig
from octavo.quantization.export.layer_forward import Rows, run_layer
from octavo.quantization.export.layer_weights import Product
from octavo.quantization.export.scheme_names import Scheme
from octavo.quantization.export.statistics import Recorder, Rounding
from octavo.quantization.gptq import round_nearest
from octavo.quantization.scheme import dequantize
from octavo.quantization.smooth import static_scale

UNITS = ("qkv", "o", "mlp", "down")  # products of one input share a scheme, since servers fuse them


@dataclass(frozen=True)
class UnitError:
    """error: squared, relative to what the layer adds, if this unit alone is rounded."""

    layer: int
    unit: str
    num_parameters: int
    error: float


def unit_errors(
    weights: Mapping[str, Tensor],
    products: list[Product],
    x: Tensor,
    rows: Rows,
    *,
    config: ModelConfig,
    index: int,
    scheme: Scheme,
) -> tuple[list[UnitError], Tensor]:
    """The errors of a layer's units one at a time, and the layer's exact output."""
    seen = Recorder(config.rope.rotary_dim)
    exact = run_layer(weights, x, rows, config=config, index=index, hooks=seen)
    scales = {site: static_scale(inputs.maxima) for site, inputs in seen.sites.items()} if scheme.static_inputs else {}
    energy = float(exact.double().square().mean()) or 1.0
    found = []
    for unit in UNITS:
        members = [product for product in products if product.unit == unit]
        changed = dict(weights)
        for product in members:
            name = f"{product.role}.weight"
            changed[name] = dequantize(round_nearest(weights[name], group_size=scheme.group_size))
        others = tuple(other for other in UNITS if other != unit)
        rounding = Rounding(scheme.eight_bit_inputs, others, input_scales=scales)
        made = run_layer(changed, x, rows, config=config, index=index, hooks=rounding)
        size = sum(product.shape[0] * product.shape[1] for product in members)
        error = float((made - exact).double().square().mean()) / energy
        found.append(UnitError(index, unit, size, error))
    return found, exact


def choose_float(errors: list[UnitError], *, per_cent: float) -> dict[str, list[str]]:
    """Layer → units that stay float: the worst per parameter first, as long as they fit into the budget."""
    left = sum(one.num_parameters for one in errors) * per_cent / 100
    chosen: dict[str, list[str]] = {}
    for one in sorted(errors, key=lambda one: one.error / one.num_parameters, reverse=True):
        if one.num_parameters <= left:
            left -= one.num_parameters
            chosen.setdefault(str(one.layer), []).append(one.unit)
    return chosen
