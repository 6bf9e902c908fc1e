"""Tokens that only the device knows yet: `-1 - slot` stands for the one sampled last in a slot, and is put in there.

Used by the GPU runner's worker thread. Nothing here waits for the device, and no step has to wait for the one before.
"""

from __future__ import annotations

import torch
from torch import Tensor


def resolve(token_ids: Tensor, last_token: Tensor) -> Tensor:
    """Ids [M] int64 in which -1 - slot stands for the token sampled last in that slot. last_token: [num_slots + 1]."""
    return torch.where(token_ids < 0, last_token[(-1 - token_ids).clamp(min=0)], token_ids)


def settle_counts(start: Tensor, ids: Tensor, counts: Tensor, last_token: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and counts [S] int32 of lists whose last entry may stand for a slot's newest token, with count 1.

    Where the list has that token already, it is counted there and the entry becomes -1, which counts for nothing.
    start: [R + 1] int32, a list for each row. Integers only: the same in any order.
    """
    owner = torch.searchsorted(start[1:], torch.arange(len(ids), dtype=start.dtype, device=ids.device), right=True)
    last = ids[(start[1:] - 1).clamp(min=0).long()].long()  # [R]; of an empty list somebody's, and nobody asks
    newest = resolve(last, last_token).masked_fill(last >= 0, -1)[owner].to(ids.dtype)  # [S]
    known = (ids == newest).to(counts.dtype)
    listed = torch.zeros(len(start) - 1, dtype=counts.dtype, device=ids.device).index_add_(0, owner, known)[owner]
    return torch.where(ids < 0, newest.masked_fill(listed > 0, -1), ids), counts + known
