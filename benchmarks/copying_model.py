"""A model of the standard shape that repeats its prompt: weights written by hand, not trained.

It does what is known of attention that copies. A token is a vector of signs. The first layer puts the two tokens before
each place beside it (one head looks one back, one two back: a sum of cosines of the rotary frequencies that is largest
there). The second looks for places whose two tokens before are the newest two, and hands on the token that stands
there. All other layers do their whole work and add nothing. So every step costs what it costs in the standard model,
and the answers are the model's own: a prompt that ends as it began goes on as it went on then.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from standard_model import HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, LAYERS, VOCAB, model_config

ROPE_THETA = 1e10  # most frequencies turn so slowly that they compare contents, whatever the distance
SLOW = 12  # from this frequency on
CODE = 512  # signs of a token
BEFORE, BEFORE_TWO, COPIED, ONE = CODE, 2 * CODE, 3 * CODE, HIDDEN - 1  # where a state keeps what; `ONE` is always 1
LOOK_BACK, MATCH, COPY = 30.0, 12.0, 2.0  # how sharply heads look, and how loud a copy is
GROUP = HEADS // KV_HEADS


def make_copying_model(source: Path, target: Path) -> None:
    """From the standard model's folder, unless it is there."""
    if (target / "config.json").is_file():
        return
    target.mkdir(parents=True, exist_ok=True)
    with safe_open(source / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    for layer in range(LAYERS):
        write(tensors, f"model.layers.{layer}.mlp.down_proj", torch.zeros(HIDDEN, INTERMEDIATE))
        if layer > 1:
            write(tensors, f"model.layers.{layer}.self_attn.o_proj", torch.zeros(HIDDEN, HEADS * HEAD_DIM))
    for layer, weights in enumerate((looking_back(), matching())):
        for name, weight in weights.items():
            write(tensors, f"model.layers.{layer}.self_attn.{name}_proj", weight)
    codes = torch.randint(0, 2, (VOCAB, CODE), generator=torch.Generator().manual_seed(7)).float() * 2 - 1
    table, head = torch.zeros(VOCAB, HIDDEN), torch.zeros(VOCAB, HIDDEN)
    table[:, :CODE], table[:, ONE] = codes, 1.0
    head[:, COPIED:ONE] = codes[:, : ONE - COPIED]
    tensors["model.embed_tokens.weight"] = table.to(torch.bfloat16)
    write(tensors, "lm_head", head)
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps({**model_config("w8a8"), "rope_theta": ROPE_THETA}, indent=1))


def write(tensors: dict[str, torch.Tensor], name: str, weight: torch.Tensor) -> None:
    """As int8 with one scale per output."""
    scale = (weight.abs().amax(dim=1, keepdim=True) / 127).clamp_min(1e-6).to(torch.bfloat16)
    tensors[f"{name}.weight"] = (weight / scale.float()).round().clamp(-127, 127).to(torch.int8)
    tensors[f"{name}.weight_scale"] = scale


def empty() -> dict[str, torch.Tensor]:
    """Of the four products of attention."""
    wide, narrow = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {"q": (wide, HIDDEN), "k": (narrow, HIDDEN), "v": (narrow, HIDDEN), "o": (HIDDEN, wide)}
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def root_mean_square(parts: int) -> float:
    """Of a state in which so many codes, and the one, are written."""
    return ((parts * CODE + 1) / HIDDEN) ** 0.5


def looking_back() -> dict[str, torch.Tensor]:
    """Head 0 of each group looks one place back, head 1 two; each group carries its part of the code."""
    weights, norm = empty(), root_mean_square(1)
    frequencies = ROPE_THETA ** (-torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    for group in range(KV_HEADS):
        first = group * HEAD_DIM
        weights["k"][first : first + HEAD_DIM // 2, ONE] = norm
        carry(weights["v"], first, first, HEAD_DIM, norm)
        for back, place in ((1, BEFORE), (2, BEFORE_TWO)):
            row = (group * GROUP + back - 1) * HEAD_DIM
            turned = torch.cat([torch.cos(back * frequencies), -torch.sin(back * frequencies)])
            weights["q"][row : row + HEAD_DIM, ONE] = LOOK_BACK * HEAD_DIM**0.5 * turned * norm
            carry(weights["o"], place + first, row, HEAD_DIM, 1.0)
    return weights


def matching() -> dict[str, torch.Tensor]:
    """Head 0 of each group compares parts of the newest two codes with those before each place, on slow frequencies."""
    weights, norm = empty(), root_mean_square(3)
    half, slow = HEAD_DIM // 2, HEAD_DIM // 2 - SLOW
    for group in range(KV_HEADS):
        first, row = group * HEAD_DIM, group * GROUP * HEAD_DIM
        for channel, (queried, kept) in ((SLOW, (0, BEFORE)), (half + SLOW, (BEFORE, BEFORE_TWO))):
            carry(weights["q"], row + channel, queried + first, slow, MATCH * norm)
            carry(weights["k"], first + channel, kept + first, slow, norm)
        carry(weights["v"], first, first, HEAD_DIM, norm)
        copied = min(HEAD_DIM, ONE - COPIED - first)
        carry(weights["o"], COPIED + first, row, copied, COPY)
    return weights


def carry(weight: torch.Tensor, to: int, origin: int, count: int, gain: float) -> None:
    """Write `count` channels through."""
    index = torch.arange(count)
    weight[to + index, origin + index] = gain
