"""The parts of a decoder layer on the kernel interface. Run by the runner's worker thread.

Rows [M, width] are the tokens of a step; the residual stream is float32. Each part knows the kernels and its packed
weights; none knows what a sequence, a block or a step is beyond the `BatchLayout` it passes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels.interface import (
    FLOAT,
    Activation,
    ActivationFormat,
    BatchLayout,
    ExpertWeights,
    GroupsExperts,
    HeadLayout,
    Kernels,
    LayerCache,
    MultipliesFp8,
    PackedLinear,
)
from octavo.parallel.group import Group
from octavo.quantization.scheme import LinearWeights, QuantizedTensor, concatenate


def pack(kernels: Kernels, linear: LinearWeights) -> PackedLinear:
    """Hand a product's weights to the backend."""
    device = kernels.device
    bias = None if linear.bias is None else linear.bias.to(device)
    if not isinstance(linear.weight, QuantizedTensor):
        return kernels.pack_float(linear.weight.to(device), bias=bias)
    weight, scheme = linear.weight, linear.activation
    form = ActivationFormat(scheme.limbs, scheme.static_scale, scheme.zero_point, scheme.fp8)
    q, scale = weight.q.contiguous().to(device), weight.scale.contiguous().to(device)
    if scheme.fp8:
        if not isinstance(kernels, MultipliesFp8):
            raise ValueError(f"the {kernels.name} kernels have no products of fp8")
        return kernels.pack_fp8(q, scale, format=form, bias=bias)
    zero_point = None if weight.zero_point is None else weight.zero_point.contiguous().to(device)
    return kernels.pack_int8(q, scale, format=form, zero_point=zero_point, bias=bias)


class Projection:
    """Products of one input, outputs side by side: one packed product where their schemes agree, else one each."""

    def __init__(self, kernels: Kernels, parts: Sequence[LinearWeights]) -> None:
        fused = concatenate(parts)
        self._kernels = kernels
        self._products = [pack(kernels, part) for part in ([fused] if fused is not None else parts)]
        formats = {product.format for product in self._products}
        self.format = formats.pop() if len(formats) == 1 else FLOAT  # what the input comes in

    def __call__(self, x: Activation) -> Tensor:
        """[M, K] in `format` → [M, sum of N] float32."""
        if len(self._products) == 1:
            return self._kernels.linear(x, self._products[0])
        outputs = [self._kernels.linear(self._written(x, product.format), product) for product in self._products]
        return torch.cat(outputs, dim=1)

    @property
    def only(self) -> PackedLinear | None:
        """The product if it is one."""
        return self._products[0] if len(self._products) == 1 else None

    def _written(self, x: Activation, form: ActivationFormat) -> Activation:
        return self._kernels.quantize(x, form) if self.format == FLOAT and isinstance(x, Tensor) else x


class RowParallel:
    """A product whose inputs are spread over the ranks: their partial results are added in rank order."""

    def __init__(self, kernels: Kernels, group: Group, linear: LinearWeights) -> None:
        mine = linear if group.rank == 0 else LinearWeights(linear.weight, linear.activation)  # the bias is added once
        self._kernels = kernels
        self._group = group
        self._product = pack(kernels, mine)

    @property
    def only(self) -> PackedLinear | None:
        """The product if no other rank takes part."""
        return self._product if self._group.size == 1 else None

    @property
    def handoff(self) -> ActivationFormat:
        """What the operation before may write: float if the ranks must agree on a row's maximum first."""
        return self._product.format if self._group.size == 1 else FLOAT

    def __call__(self, x: Activation, *, residual: Tensor | None = None) -> Tensor:
        """[M, K] in `handoff` or float → [M, N] float32, new memory."""
        if isinstance(x, Tensor):
            absmax = None if self._group.size == 1 else self._group.max(self._kernels.absmax(x))
            x = self._kernels.quantize(x, self._product.format, absmax=absmax)
        mine = residual if self._group.rank == 0 else None
        return self._group.sum(self._kernels.linear(x, self._product, residual=mine))


class Norm:
    """RMS norm with its weight."""

    def __init__(self, kernels: Kernels, weight: Tensor, eps: float) -> None:
        self._kernels = kernels
        self.weight = weight  # [H] float32
        self.eps = eps

    def __call__(self, x: Tensor, form: ActivationFormat) -> tuple[Activation, Tensor]:
        """[M, H] float32 → (normed in `form`, the residual stream, which may be x itself)."""
        return self._kernels.rms_norm(x, self.weight, self.eps, form)


class Attention:
    """Queries, keys, values; rotation and cache; heads back to the hidden size."""

    def __init__(
        self,
        kernels: Kernels,
        *,
        qkv: Projection,
        out: RowParallel,
        heads: HeadLayout,
        q_norm: Tensor | None,  # [head_dim] float32
        k_norm: Tensor | None,
        eps: float,
    ) -> None:
        self._kernels = kernels
        self.qkv = qkv
        self.out = out
        self.heads = heads
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.eps = eps

    def attend(self, x: Activation, *, cos_sin: Tensor, layout: BatchLayout, cache: LayerCache) -> Tensor:
        """[M, H] in `qkv.format` → the heads' outputs [M, num_heads · head_dim] float32. Writes this step's K and V."""
        q = self.fill(x, cos_sin=cos_sin, layout=layout, cache=cache)
        return self._kernels.attention(q, layout, self.heads, cache)

    def fill(self, x: Activation, *, cos_sin: Tensor, layout: BatchLayout, cache: LayerCache) -> Tensor:
        """Write this step's K and V; returns the rotated queries [M, num_heads · head_dim] float32."""
        return self._kernels.rope_write(
            self.qkv(x), cos_sin, layout, self.heads, cache, q_norm=self.q_norm, k_norm=self.k_norm, eps=self.eps
        )


class Mlp:
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, kernels: Kernels, *, gate_up: Projection, down: RowParallel) -> None:
        self._kernels = kernels
        self.down = down
        self.gate_up = gate_up
        self.format = gate_up.format

    def __call__(self, x: Activation, *, residual: Tensor | None = None) -> Tensor:
        """[M, H] in `format` → [M, H] float32, new memory."""
        return self.down(self._kernels.silu_mul(self.gate_up(x), self.down.handoff), residual=residual)


@dataclass(frozen=True)
class SharedExpert:
    """An MLP that every row goes through, weighted by the sigmoid of a gate."""

    mlp: Mlp
    gate: Projection  # H → 1


class Experts:
    """A mixture: each row goes to top_k of the MLPs; outputs are added in top-k order, so a row's bits stay its own."""

    format = FLOAT

    def __init__(
        self,
        kernels: Kernels,
        *,
        router: Projection,
        experts: Sequence[Mlp],
        top_k: int,
        renormalize: bool,
        shared: SharedExpert | None = None,
    ) -> None:
        self._kernels = kernels
        self._router = router
        self._stacked = _stack_experts(kernels, experts)
        self._experts = () if self._stacked is not None else tuple(experts)  # their weights were copied
        self._top_k = top_k
        self._renormalize = renormalize
        self._shared = shared

    def __call__(self, x: Activation, *, residual: Tensor | None = None) -> Tensor:
        """[M, H] float32 → [M, H] float32."""
        assert isinstance(x, Tensor)  # `format` is float
        logits = self._router(self._kernels.quantize(x, self._router.format))  # [M, num_experts]
        ids, weights = self._kernels.moe_route(logits, self._top_k, renormalize=self._renormalize)
        outputs = self._one_by_one(x, ids) if self._stacked is None else self._at_once(x, ids, *self._stacked)
        mixed = self._kernels.moe_combine(outputs, weights)
        if self._shared is not None:
            mixed = mixed + self._through_shared(x, self._shared)
        return mixed if residual is None else residual + mixed

    @property
    def waits(self) -> bool:
        """Whether the host must learn which experts were chosen."""
        return self._stacked is None

    def _at_once(self, x: Tensor, ids: Tensor, gate_up: ExpertWeights, down: ExpertWeights) -> Tensor:
        """[M, top_k, H]."""
        assert isinstance(self._kernels, GroupsExperts)
        return self._kernels.run_experts(self._kernels.quantize(x, gate_up.format), ids, gate_up, down)

    def _one_by_one(self, x: Tensor, ids: Tensor) -> Tensor:
        """[M, top_k, H]."""
        outputs = torch.empty((*ids.shape, x.shape[1]), dtype=torch.float32, device=x.device)  # [M, top_k, H]
        for expert in torch.unique(ids).tolist():
            rows, places = (ids == expert).nonzero(as_tuple=True)
            mlp = self._experts[expert]
            outputs[rows, places] = mlp(self._kernels.quantize(x[rows], mlp.format))
        return outputs

    def _through_shared(self, x: Tensor, shared: SharedExpert) -> Tensor:
        """[M, H]. sigmoid(g) is the first weight of a softmax over (g, 0): an operation that keeps rows apart."""
        gate = shared.gate(self._kernels.quantize(x, shared.gate.format))  # [M, 1]
        ids, weights = self._kernels.moe_route(torch.cat((gate, torch.zeros_like(gate)), dim=1), 2, renormalize=False)
        weight = weights.gather(1, ids.argmin(dim=1, keepdim=True))  # [M, 1]
        output = shared.mlp(self._kernels.quantize(x, shared.mlp.format))
        return self._kernels.moe_combine(output[:, None], weight)


def _stack_experts(kernels: Kernels, experts: Sequence[Mlp]) -> tuple[ExpertWeights, ExpertWeights] | None:
    """gate_up and down of all experts as one product each; None if the backend cannot, or a rank has but a part."""
    if not isinstance(kernels, GroupsExperts):
        return None
    gate_up, down = [expert.gate_up.only for expert in experts], [expert.down.only for expert in experts]
    if None in gate_up or None in down:
        return None
    stacked = kernels.stack_experts([product for product in gate_up if product is not None])
    if stacked is None:
        return None
    other = kernels.stack_experts([product for product in down if product is not None])
    return None if other is None else (stacked, other)
