"""The first call of torch's elementary functions, made while one thread runs.

torch hands exp, log, sqrt, cos and their like to oneMKL, which chooses a kernel of each at its first call. If two
threads make that call together, one of them may get a kernel whose results are good for three digits, for that one
call (github.com/pytorch/pytorch/issues/188792). Whoever computes something with them that has to be the same in every
process calls `settle` first.
"""

from __future__ import annotations

import functools

import torch

# What torch computes by oneMKL's vector functions where it was built with it.
_FUNCTIONS = (
    *("acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "expm1", "lgamma"),
    *("log", "log10", "log1p", "log2", "sin", "sqrt", "tan", "tanh"),
)


@functools.cache
def settle() -> None:
    """Call each function on one element, in both precisions. Does nothing from the second time on."""
    for dtype in (torch.float32, torch.float64):
        one = torch.full((1,), 0.5, dtype=dtype)
        for name in _FUNCTIONS:
            getattr(torch, name)(one)
