"""Fixtures for the demo model's tests: the corpus, the finished folder, its tokenizer and the dequantised model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
if str(REPOSITORY) not in sys.path:  # `demo` is a tool beside the product, not an installed package
    sys.path.insert(0, str(REPOSITORY))


@pytest.fixture(scope="session")
def model_dir() -> Path:
    return REPOSITORY / "demo" / "model"


@pytest.fixture(scope="session")
def corpus():
    from demo.corpus import build_corpus

    return build_corpus()


@pytest.fixture(scope="session")
def tokenizer(model_dir):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(model_dir / "tokenizer.json"))


@pytest.fixture(scope="session")
def encoder(tokenizer):
    from demo.encoding import Encoder

    return Encoder(tokenizer)


@pytest.fixture(scope="session")
def dequantised(model_dir):
    """(model, cache scales) of the finished folder, in float32."""
    from demo.quantised import load_dequantised

    return load_dequantised(model_dir)
