"""The specification of every operation in plain torch: slow, obviously right, row-independent. See
`interface.Kernels`.
"""

from __future__ import annotations

import torch

from octavo.first_calls import settle
from octavo.kernels.reference.attention import ReferenceAttention
from octavo.kernels.reference.moe import ReferenceMoe
from octavo.kernels.reference.products import ReferenceProducts
from octavo.kernels.reference.rows import ReferenceRows
from octavo.kernels.reference.sampling import ReferenceSampling


class ReferenceKernels(ReferenceProducts, ReferenceRows, ReferenceAttention, ReferenceMoe, ReferenceSampling):
    """`interface.Kernels` in torch on the CPU."""

    name = "reference"

    def __init__(self) -> None:
        settle()
        self.device = torch.device("cpu")
