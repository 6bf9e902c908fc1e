"""Routing of tokens to experts and their weighted sum on the CPU: checks arguments and calls csrc/moe.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.cpu.library import CpuBase, checked, pointer

SIGNATURES = {"octavo_moe_route": "p" + "ppp" + "iiii", "octavo_moe_combine": "p" + "ppp" + "iii"}


class CpuMoe(CpuBase):
    """The mixture-of-experts half of the CPU backend."""

    def moe_route(self, router_logits: Tensor, top_k: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
        """See the interface; order is by logit. [M, E] → ids [M, top_k] int64 and weights, new memory."""
        logits = checked(router_logits, torch.float32, (-1, -1), "router_logits")
        rows, experts = logits.shape
        if not 0 < top_k <= experts:
            raise ValueError(f"top_k {top_k} of {experts} experts")
        ids = torch.empty(rows, top_k, dtype=torch.int64)
        weights = torch.empty(rows, top_k)
        self._lib.octavo_moe_route(
            self._pool, pointer(logits), pointer(ids), pointer(weights), rows, experts, top_k, int(renormalize)
        )
        return ids, weights

    def moe_combine(self, expert_out: Tensor, weights: Tensor) -> Tensor:
        """See the interface. [M, top_k, H], [M, top_k] → [M, H], new memory."""
        y = checked(expert_out, torch.float32, (-1, -1, -1), "expert_out")
        rows, top_k, hidden = y.shape
        weights = checked(weights, torch.float32, (rows, top_k), "weights")
        out = torch.empty(rows, hidden)
        self._lib.octavo_moe_combine(self._pool, pointer(y), pointer(weights), pointer(out), rows, top_k, hidden)
        return out
