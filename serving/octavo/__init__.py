"""Octavo: int8 large language models behind Triton Inference Server.

`LLM` is the engine without a server; it is imported on first use, so that processes without torch stay light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from octavo.engine.llm import LLM as LLM

__all__ = ["LLM", "__version__"]


def __getattr__(name: str) -> object:
    if name == "LLM":
        from octavo.engine.llm import LLM

        return LLM
    raise AttributeError(f"module 'octavo' has no attribute {name!r}")
