"""Routing of tokens to experts and the weighted sum of what they return, in plain torch.

Every sum runs in a written order, so a row's bits do not depend on the other rows. Knows nothing of the experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.reference.attention import exp
from octavo.kernels.reference.cache import fold


class ReferenceMoe:
    """The mixture-of-experts half of the reference backend."""

    def moe_route(self, router_logits: Tensor, top_k: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
        """See the interface. [M, E] → ids [M, top_k] int64, weights [M, top_k] float32.

        Order is by logit, so two experts whose float32 probabilities round to the same value still rank by logit.
        p = e / f32(Σ e) with e = exp(z − max z) in float32 and the sum in float64, ascending experts.
        """
        if not 0 < top_k <= router_logits.shape[1]:
            raise ValueError(f"top_k {top_k} of {router_logits.shape[1]} experts")
        z = router_logits.float()
        e = exp(z - z.amax(dim=-1, keepdim=True))
        p = e / fold(e.double(), dim=-1).float()[:, None]
        ids = torch.sort(z, dim=-1, descending=True, stable=True).indices[:, :top_k]
        weights = p.gather(1, ids)
        if renormalize:
            weights = weights / fold(weights, dim=-1)[:, None]
        return ids, weights

    def moe_combine(self, expert_out: Tensor, weights: Tensor) -> Tensor:
        """See the interface. [M, top_k, H], [M, top_k] → [M, H]."""
        return fold(expert_out * weights[..., None], dim=1)
