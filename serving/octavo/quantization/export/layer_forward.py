"""One decoder layer in plain float32 torch, with places where a caller looks at, or rounds, what 8 bits will hold.

Rows [M, H] are the tokens of several sequences one after another. Used while a checkpoint is made; the served model
runs on `octavo.models`, not on this.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from octavo.models.config import ModelConfig, MoeConfig
from octavo.quantization.export.streams import blocks


class Hooks:
    """Sees the inputs of products and the heads, and may change them. This one changes nothing."""

    def input(self, site: str, x: Tensor) -> Tensor:
        """[m, K]: the input of the products of a site."""
        return x

    def heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """q [M, heads, D], k and v [M, kv_heads, D], rotated: what the cache gives back of k and v."""
        return k, v


@dataclass(frozen=True)
class Rows:
    """The sequences of a stream and the rotary table."""

    lengths: Sequence[int]
    cos_sin: Tensor  # [positions, rotary_dim]

    def positions(self) -> Tensor:
        return torch.cat([torch.arange(length) for length in self.lengths])

    def blocks(self) -> Iterator[tuple[slice, Rows]]:
        """Whole sequences, as many as go through a layer at once, and which rows they are."""
        return ((part, Rows(lengths, self.cos_sin)) for part, lengths in blocks(self.lengths))


def run_layer(
    weights: Mapping[str, Tensor], x: Tensor, rows: Rows, *, config: ModelConfig, index: int, hooks: Hooks
) -> Tensor:
    """[M, H] → [M, H]."""
    normed = hooks.input("qkv", rms_norm(x, weights["input_norm"], config.rms_norm_eps))
    heads = _attention(weights, normed, rows, config=config, index=index, hooks=hooks)
    x = x + _linear(weights, "o", hooks.input("o", heads))
    normed = rms_norm(x, weights["mlp_norm"], config.rms_norm_eps)
    if config.moe is not None and index in config.moe.layers:
        return x + _experts(weights, normed, config.moe, hooks)
    return x + _mlp(weights, "", normed, hooks)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def _linear(weights: Mapping[str, Tensor], role: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{role}.weight"], weights.get(f"{role}.bias"))


def _attention(
    weights: Mapping[str, Tensor], x: Tensor, rows: Rows, *, config: ModelConfig, index: int, hooks: Hooks
) -> Tensor:
    q, k, v = (_linear(weights, role, x).unflatten(1, (-1, config.head_dim)) for role in "qkv")  # [M, heads, D]
    if "q_norm" in weights:
        q = rms_norm(q, weights["q_norm"], config.rms_norm_eps)
        k = rms_norm(k, weights["k_norm"], config.rms_norm_eps)
    angles = rows.cos_sin[rows.positions()]  # [M, rotary_dim]
    q, k = _rotate(q, angles), _rotate(k, angles)
    k, v = hooks.heads(q, k, v)
    group = config.num_heads // config.num_kv_heads
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    parts = zip(*(tensor.split(list(rows.lengths)) for tensor in (q, k, v)))
    return torch.cat([_attend(*part, scale=config.head_dim**-0.5, window=config.windows[index]) for part in parts])


def _attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
    """One sequence: [T, heads, D] each → [T, heads · D]."""
    length = q.shape[0]
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    if window is None or window >= length:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        behind = torch.arange(length)[:, None] - torch.arange(length)[None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=(behind >= 0) & (behind < window), scale=scale)
    return out[0].transpose(0, 1).flatten(1)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x: [M, heads, D]; angles: [M, rotary_dim]."""
    half = angles.shape[1] // 2
    cos, sin = angles[:, None, :half], angles[:, None, half:]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def _mlp(weights: Mapping[str, Tensor], prefix: str, x: Tensor, hooks: Hooks) -> Tensor:
    x = hooks.input(f"{prefix}mlp", x)
    inner = F.silu(_linear(weights, f"{prefix}gate", x)) * _linear(weights, f"{prefix}up", x)
    return _linear(weights, f"{prefix}down", hooks.input(f"{prefix}down", inner))


def _experts(weights: Mapping[str, Tensor], x: Tensor, moe: MoeConfig, hooks: Hooks) -> Tensor:
    hooks.input("router", x)  # to be looked at: routers stay float
    chances = _linear(weights, "router", x).softmax(dim=-1)
    top, ids = chances.topk(moe.top_k, dim=-1)  # [M, top_k]
    top = top / top.sum(dim=-1, keepdim=True) if moe.renormalize else top
    mixed = torch.zeros_like(x)
    for expert in torch.unique(ids).tolist():
        chosen, places = (ids == expert).nonzero(as_tuple=True)
        output = _mlp(weights, f"experts.{expert}.", x[chosen], hooks)
        mixed.index_add_(0, chosen, output * top[chosen, places][:, None])
    if moe.shared_intermediate_size is not None:
        gate = torch.sigmoid(_linear(weights, "shared_gate", x))
        mixed = mixed + gate * _mlp(weights, "shared.", x, hooks)
    return mixed
