"""What is done to one layer: outliers moved, weights rounded, cache scales set. Knows one layer and its statistics."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from octavo.models.config import ModelConfig
from octavo.quantization.export.layer_weights import FLOAT_ROLES, Product, Weights
from octavo.quantization.export.scheme_names import Scheme
from octavo.quantization.export.statistics import InputStatistics, Recorder, Rounding
from octavo.quantization.gptq import round_gptq, round_nearest, row_energies, row_errors
from octavo.quantization.scheme import QuantizedTensor, dequantize
from octavo.quantization.smooth import Smoothing, key_scale, search_channels, search_clip, search_keys, static_scale

MAX_SEARCHED = 12  # weights that one search looks at: many experts are alike


@dataclass(frozen=True)
class Ingredients:
    """Which parts of the recipe are used."""

    name: str
    smoothing: bool = True
    gptq: bool = True
    keys: bool = True
    clipping: bool = True
    act_order: bool = True
    cache_per_head: bool = False


@dataclass
class MadeLayer:
    """A layer as it will be served."""

    weights: Weights  # float32, smoothed; of quantised products the dequantised values
    quantized: dict[str, QuantizedTensor]  # by role
    rounding: Rounding
    strengths: dict[str, float] = field(default_factory=dict)
    product_errors: dict[str, tuple[float, float]] = field(default_factory=dict)  # role: nearest, as made; relative
    clips: dict[str, float] = field(default_factory=dict)  # site: which part of the largest input its scale holds


def make_layer(
    weights: Mapping[str, Tensor],
    products: list[Product],  # q, k and v apart
    seen: Recorder,
    *,
    config: ModelConfig,
    scheme: Scheme,
    ingredients: Ingredients,
    float_units: Container[str] = (),
) -> MadeLayer:
    """Quantise a layer whose inputs were recorded. The statistics in `seen` are changed along with the weights."""
    changed = dict(weights)  # tensors are replaced, never written into
    made = MadeLayer(changed, {}, Rounding(scheme.eight_bit_inputs, float_units))
    if ingredients.keys and scheme.eight_bit_cache:
        made.strengths["keys"] = _smooth_keys(changed, seen, config, per_head=ingredients.cache_per_head)
    if ingredients.smoothing:
        _smooth(made, products, seen, config=config, scheme=scheme, float_units=float_units)
    rounded = [product for product in products if product.unit != "float" and product.unit not in float_units]
    exact = dict(changed) if scheme.static_inputs else {}
    for product in rounded:
        _round(made, product, seen, scheme=scheme, ingredients=ingredients)
    if scheme.static_inputs:
        _set_input_scales(made, exact, rounded, seen, clipping=ingredients.clipping)
    if scheme.eight_bit_cache:
        assert seen.k_maxima is not None
        assert seen.v_maxima is not None
        made.rounding.k_scale = key_scale(seen.k_maxima, per_head=ingredients.cache_per_head)
        made.rounding.v_scale = key_scale(seen.v_maxima, per_head=ingredients.cache_per_head)
    return made


def _round(made: MadeLayer, product: Product, seen: Recorder, *, scheme: Scheme, ingredients: Ingredients) -> None:
    name = f"{product.role}.weight"
    weight, inputs = made.weights[name], seen.sites.get(product.site)
    if inputs is None:  # an expert that no calibration token reached
        chosen = round_nearest(weight, group_size=scheme.group_size)
    else:
        chosen, errors = _rounded(weight, inputs.hessian, scheme=scheme, ingredients=ingredients)
        energy = float(row_energies(weight, inputs.hessian).sum()) or 1.0
        before, after = ((max(float(error.sum()), 0.0) / energy) ** 0.5 for error in errors)
        made.product_errors[product.role] = (before, after)
    made.quantized[product.role] = chosen
    made.weights[name] = dequantize(chosen)


def _rounded(
    weight: Tensor, hessian: Tensor, *, scheme: Scheme, ingredients: Ingredients
) -> tuple[QuantizedTensor, tuple[Tensor, Tensor]]:
    """The levels, and the errors of each row by nearest rounding and by these."""
    if ingredients.gptq:
        found = round_gptq(weight, hessian, group_size=scheme.group_size, act_order=ingredients.act_order)
        return found.chosen, (found.nearest_errors, found.errors)
    nearest = round_nearest(weight, group_size=scheme.group_size)
    errors = row_errors(weight, nearest, hessian)
    return nearest, (errors, errors)


def _set_input_scales(
    made: MadeLayer, exact: Mapping[str, Tensor], products: list[Product], seen: Recorder, *, clipping: bool
) -> None:
    """A scale for the input of every product; all experts share that of what the router hears."""
    origins: dict[str, list[Product]] = {}  # by the site whose statistics count
    for product in products:
        origin = "router" if product.unit == "mlp" and "router" in seen.sites else product.site
        origins.setdefault(origin, []).append(product)
    scales = made.rounding.input_scales
    for origin, members in origins.items():
        if origin in seen.sites:
            scale, made.clips[origin] = _input_scale(seen.sites[origin], made, exact, members, clipping=clipping)
            scales.update({product.site: scale for product in members})
    for origin, members in origins.items():
        if origin not in seen.sites:  # an expert that no calibration token reached: as wide as the widest
            widest = torch.stack([scale for site, scale in scales.items() if site.endswith(".down")]).amax(dim=0)
            scales.update({product.site: widest for product in members})


def _input_scale(
    inputs: InputStatistics, made: MadeLayer, exact: Mapping[str, Tensor], products: list[Product], *, clipping: bool
) -> tuple[Tensor, float]:
    """The scale [1], and which part of the largest value it holds."""
    names = [f"{product.role}.weight" for product in products[:MAX_SEARCHED]]
    clip = 1.0
    if clipping:
        pairs = [(exact[name], made.weights[name]) for name in names]
        share = inputs.extremes.shape[0] / inputs.num_rows
        clip = search_clip(inputs.sample, inputs.extremes, inputs.maxima, pairs, share=share)
    return static_scale(inputs.maxima) * clip, clip


def _smooth_keys(weights: Weights, seen: Recorder, config: ModelConfig, *, per_head: bool) -> float:
    """Divide k and multiply q per rotary pair, in their weights and biases or in their norms."""
    assert seen.k_maxima is not None
    in_norms = "k_norm" in weights
    grouped = seen.q.unflatten(1, (config.num_kv_heads, -1))  # [m, kv_heads, group, D]
    found = search_keys(grouped, seen.k, seen.k_maxima, shared=in_norms, per_head=per_head)
    factors = found.factors  # [kv_heads, D]
    seen.k_maxima = seen.k_maxima / factors
    if in_norms:
        weights["k_norm"] = weights["k_norm"] / factors[0]
        weights["q_norm"] = weights["q_norm"] * factors[0]
        return found.strength
    group = config.num_heads // config.num_kv_heads
    _scale_rows(weights, "k", 1 / factors.flatten())
    _scale_rows(weights, "q", factors.repeat_interleave(group, dim=0).flatten())
    return found.strength


def _smooth(
    made: MadeLayer,
    products: list[Product],
    seen: Recorder,
    *,
    config: ModelConfig,
    scheme: Scheme,
    float_units: Container[str],
) -> None:
    """Norm to qkv, v to o, norm to gate and up, up to down."""
    weights = made.weights
    has_experts = "router.weight" in weights
    inputs = {"qkv": "qkv", "o": "o", "mlp": "router" if has_experts else "mlp"}
    for unit, site in inputs.items():
        if unit in float_units:
            continue
        roles = [product.role for product in products if product.unit == unit]
        groups = _value_channels(config) if unit == "o" else None
        cached = unit == "o" and scheme.eight_bit_cache
        found = _search(weights, roles, seen, site, scheme=scheme, groups=groups, cached=cached)
        made.strengths[unit] = found.strength
        if unit == "o":
            _fold_values(weights, seen, found.factors, config)
            continue
        _fold_norm(weights, "input_norm" if unit == "qkv" else "mlp_norm", roles, found.factors)
        _rescale(seen, [site, *(product.site for product in products if product.unit == unit)], found.factors)
    for product in products:
        if product.unit == "down" and "down" not in float_units and product.site in seen.sites:
            found = _search(weights, [product.role], seen, product.site, scheme=scheme)
            made.strengths.setdefault("down", found.strength)
            _scale_rows(weights, product.role.removesuffix("down") + "up", 1 / found.factors)
            name = f"{product.role}.weight"
            weights[name] = weights[name] * found.factors
            _rescale(seen, [product.site], found.factors)


def _search(
    weights: Weights,
    roles: list[str],
    seen: Recorder,
    site: str,
    *,
    scheme: Scheme,
    groups: Tensor | None = None,
    cached: bool = False,
) -> Smoothing:
    inputs = seen.sites[site]
    return search_channels(
        inputs.sample,
        inputs.maxima,
        [weights[f"{role}.weight"] for role in roles[:MAX_SEARCHED]],
        groups=groups,
        eight_bit_inputs=scheme.eight_bit_inputs,
        static_inputs=scheme.static_inputs,
        cached=cached,
        group_size=scheme.group_size,
    )


def _fold_norm(weights: Weights, norm: str, roles: list[str], factors: Tensor) -> None:
    """The norm puts out less where its products take in more; a float router hears the same."""
    weights[norm] = weights[norm] / factors
    hearers = [*roles, *FLOAT_ROLES] if norm == "mlp_norm" else roles
    for role in hearers:
        if f"{role}.weight" in weights:
            weights[f"{role}.weight"] = weights[f"{role}.weight"] * factors


def _fold_values(weights: Weights, seen: Recorder, factors: Tensor, config: ModelConfig) -> None:
    """v / f and o · f; the heads of a group share a value, and so its factors."""
    group = config.num_heads // config.num_kv_heads
    per_value = factors.view(config.num_kv_heads, group, config.head_dim)[:, 0]  # [kv_heads, D]
    _scale_rows(weights, "v", 1 / per_value.flatten())
    weights["o.weight"] = weights["o.weight"] * factors
    assert seen.v_maxima is not None
    seen.v_maxima = seen.v_maxima / per_value
    _rescale(seen, ["o"], factors)


def _value_channels(config: ModelConfig) -> Tensor:
    """The channel of v behind each input of o: [num_heads · D] int64."""
    group = config.num_heads // config.num_kv_heads
    channels = torch.arange(config.num_kv_heads * config.head_dim).view(config.num_kv_heads, 1, config.head_dim)
    return channels.expand(-1, group, -1).reshape(-1)


def _scale_rows(weights: Weights, role: str, factors: Tensor) -> None:
    weights[f"{role}.weight"] = weights[f"{role}.weight"] * factors[:, None]
    if f"{role}.bias" in weights:
        weights[f"{role}.bias"] = weights[f"{role}.bias"] * factors


def _rescale(seen: Recorder, sites: list[str], factors: Tensor) -> None:
    """Statistics of inputs that are now divided by `factors`."""
    for site in dict.fromkeys(sites):
        if site in seen.sites:
            seen.sites[site].divide(factors)
