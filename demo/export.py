"""Makes the finished model with `octavo quantize`, as any user would: from a float folder and two files of text.

The made folder is moved to its place at the end, so a reader never sees half of it. Runs offline.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from demo.corpus import Conversation, Corpus, Message
from demo.corpus.build import EpochDrawer
from demo.quantised import projections
from demo.tokenizer import write_json
from demo.train import ROPE_THETA
from octavo.cli.main import main as octavo

CALIBRATION_EPOCH = 1000  # drawn like a training epoch, but never trained on in this order
FLOAT_FOLDER = "octavo-demo-float"
SAMPLES = 400  # sequences to calibrate on, and as many to measure on
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
KEPT_FILES = ("README.md", "evaluation.json")  # written by later stages


def config_json(config: LlamaConfig) -> dict[str, object]:
    """config.json with the classic field names, which old and new readers know."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": ROPE_THETA,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": "bfloat16",
    }


def write_float_folder(model: LlamaForCausalLM, *, tokenizer_folder: Path, folder: Path) -> None:
    """The trained model as a Hugging Face folder: products in float32, what stays float in bfloat16, the head tied."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    products = {f"{name}.weight" for name, _ in projections(model)}
    tensors = {
        name: value.detach().to(torch.float32 if name in products else torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config_json(model.config))
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer_folder / name, folder / name)


def write_texts(corpus: Corpus, *, calibration: Path, held_out: Path) -> None:
    """Text like that of training to calibrate on, and every question that was never trained on, with its answer."""
    drawn = EpochDrawer(corpus, seed=0).draw(CALIBRATION_EPOCH)
    random.Random(0).shuffle(drawn)
    lines = [
        {"messages": as_json(item.messages)}
        if isinstance(item, Conversation)
        else {"text": item.prompt + item.continuation}
        for item in drawn
    ]
    write_lines(calibration, lines)
    talks = [
        (Message("user", question), Message("assistant", answer)) for _, question, answer in corpus.held_out_pairs()
    ]
    write_lines(held_out, [{"messages": as_json(talk)} for talk in talks])


def as_json(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as calibration files have them."""
    return [{"role": message.role, "content": message.content} for message in messages]


def write_lines(path: Path, lines: Sequence[object]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def export_model(model: LlamaForCausalLM, corpus: Corpus, *, tokenizer_folder: Path, work: Path, out: Path) -> None:
    """Quantises the model and puts the folder in place of an older one. Raises SystemExit if it cannot be made."""
    folder, made = work / FLOAT_FOLDER, work / "made"
    calibration, held_out = work / "calibration.jsonl", work / "held_out.jsonl"
    write_float_folder(model, tokenizer_folder=tokenizer_folder, folder=folder)
    write_texts(corpus, calibration=calibration, held_out=held_out)
    shutil.rmtree(made, ignore_errors=True)
    code = octavo([
        "quantize", str(folder), "--scheme", "a8w8c8", "--calibration", str(calibration), "--held-out", str(held_out),
        "--samples", str(SAMPLES), "--out", str(made),
    ])  # fmt: skip
    if code != 0:
        raise SystemExit(code)
    put_in_place(made, out)


def put_in_place(made: Path, out: Path) -> None:
    """Copy the made folder beside its place with what later stages wrote before, then change places."""
    fresh, old = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
    for folder in (fresh, old):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made, fresh)
    for name in KEPT_FILES:
        if (out / name).exists():
            shutil.copyfile(out / name, fresh / name)
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)
