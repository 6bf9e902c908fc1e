"""Run by another Python, one with llmcompressor: makes a quantised checkpoint of a float one with that library.

`python llmcompressor_maker.py FLOAT OUT RECIPE`; calibration text is random tokens.
"""

from __future__ import annotations

import sys
from typing import Any

INT8_CACHE = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": True}


def recipes(name: str) -> list[Any]:
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    rest = {"targets": "Linear", "ignore": ["lm_head"]}
    found = {
        "w8a8": lambda: [GPTQModifier(scheme="W8A8", **rest)],
        "w8a16-channel": lambda: [GPTQModifier(config_groups={"group_0": _weights("channel")}, ignore=["lm_head"])],
        "w8a16-group": lambda: [QuantizationModifier(config_groups={"group_0": _weights("group")}, ignore=["lm_head"])],
        "w8a8c8": lambda: [QuantizationModifier(scheme="W8A8", kv_cache_scheme=INT8_CACHE, **rest)],
        "fp8": lambda: [QuantizationModifier(scheme="FP8", **rest)],
        "fp8-dynamic": lambda: [QuantizationModifier(scheme="FP8_DYNAMIC", **rest)],
        "smoothed": lambda: [_smoothing(), GPTQModifier(scheme="W8A8", **rest)],
    }
    return found[name]()


def _weights(strategy: str) -> dict[str, Any]:
    size = 32 if strategy == "group" else None
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": strategy, "group_size": size}
    return {"targets": ["Linear"], "weights": weights}


def _smoothing() -> Any:
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    return SmoothQuantModifier(smoothing_strength=0.5)


def make(source: str, target: str, recipe: str) -> None:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"t0": 0}, unk_token="t0"))  # the library asks for one, the text is ids already
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (16, 64), generator=generator).tolist()
    text = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 64] * 16})
    oneshot(
        model=model,
        processor=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0"),
        dataset=text,
        recipe=recipes(recipe),
        max_seq_length=64,
        num_calibration_samples=16,
    )
    model.save_pretrained(target, save_compressed=True)


if __name__ == "__main__":
    make(*sys.argv[1:])
