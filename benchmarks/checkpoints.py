"""Other forms of the standard model for the peers and the server: a tokenizer for it, and its bf16 checkpoint.

    python benchmarks/checkpoints.py L1B_FOLDER [--bf16 FOLDER] [--float-head FOLDER]

The tokenizer is made up: every id stands for a short text of its own, so whatever a model with random weights says has
a length in characters and goes back and forth.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

VOCAB = 32_000


def write_tokenizer(folder: Path, *, vocab: int = VOCAB) -> None:
    """tokenizer.json and its configuration, unless they are there."""
    if (folder / "tokenizer.json").is_file():
        return
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<s>", "</s>", *alphabet]
    words += [f"Ġw{index}" for index in range(vocab - len(words))]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<pad>", "<s>", "</s>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    )


def write_bf16(source: Path, target: Path) -> None:
    """The same weights in bfloat16, one file, unless it is there."""
    if (target / "config.json").is_file():
        return
    _write(source, target, keep_int8=False)
    write_tokenizer(target)
    config = json.loads((source / "w8a8.json").read_text())
    config.pop("quantization_config")
    (target / "config.json").write_text(json.dumps(config, indent=1))


def write_float_head(source: Path, target: Path) -> None:
    """W8A8 with the output head in bfloat16, for engines that know no int8 head, unless it is there."""
    if (target / "config.json").is_file():
        return
    _write(source, target, keep_int8=True)
    write_tokenizer(target)
    config = json.loads((source / "w8a8.json").read_text())
    config["quantization_config"]["ignore"] = ["lm_head"]
    (target / "config.json").write_text(json.dumps(config, indent=1))


def _write(source: Path, target: Path, *, keep_int8: bool) -> None:
    """model.safetensors; the head is always bfloat16."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(source / "model.safetensors", framework="pt") as file:
        for name in sorted(file.keys()):
            keep = keep_int8 and not name.startswith("lm_head")
            tensor = file.get_tensor(name)
            if name.endswith(".weight_scale") and not keep:
                continue
            if tensor.dtype == torch.int8 and not keep:
                scale = file.get_tensor(f"{name}_scale").float()  # [N, 1]
                tensor = (tensor.float() * scale).to(torch.bfloat16)
            tensors[name] = tensor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bf16", type=Path, metavar="FOLDER")
    parser.add_argument("--float-head", type=Path, metavar="FOLDER", help="W8A8 but for the head")
    arguments = parser.parse_args()
    write_tokenizer(arguments.folder)
    if arguments.bf16 is not None:
        write_bf16(arguments.folder, arguments.bf16)
    if arguments.float_head is not None:
        write_float_head(arguments.folder, arguments.float_head)


if __name__ == "__main__":
    main()
