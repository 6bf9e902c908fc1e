"""Routing of tokens to experts and their weighted sum on the GPU: launches of row_kernels.py."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.gpu import row_kernels
from octavo.kernels.gpu.device import GpuBase, checked, power_of_two
from octavo.kernels.gpu.rows import COLUMNS


class GpuMoe(GpuBase):
    """The mixture-of-experts half of the GPU backend."""

    def moe_route(self, router_logits: Tensor, top_k: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
        """See the interface; order is by logit. [M, E] → ids [M, top_k] int64 and weights, new memory."""
        logits = checked(router_logits, torch.float32, (-1, -1), "router_logits")
        rows, experts = logits.shape
        if not 0 < top_k <= experts:
            raise ValueError(f"top_k {top_k} of {experts} experts")
        ids = torch.empty(rows, top_k, dtype=torch.int64, device=self.device)
        weights = torch.empty(rows, top_k, dtype=torch.float32, device=self.device)
        if rows:
            row_kernels.moe_route[(rows,)](
                logits, ids, weights, experts, TOP_K=top_k, RENORMALIZE=renormalize, BLOCK=power_of_two(experts),
                num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip
        return ids, weights

    def moe_combine(self, expert_out: Tensor, weights: Tensor) -> Tensor:
        """See the interface. [M, top_k, H], [M, top_k] → [M, H], new memory."""
        y = checked(expert_out, torch.float32, (-1, -1, -1), "expert_out")
        rows, top_k, hidden = y.shape
        weights = checked(weights, torch.float32, (rows, top_k), "weights")
        out = torch.empty(rows, hidden, dtype=torch.float32, device=self.device)
        if rows:
            row_kernels.moe_combine[(rows, -(-hidden // COLUMNS))](
                y, weights, out, rows, hidden, TOP_K=top_k, BLOCK=COLUMNS, num_warps=4, enable_fp_fusion=False
            )
        return out
