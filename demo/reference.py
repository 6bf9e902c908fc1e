"""What the float model says about held-out text: small figures by which a test judges the served model.

Writes demo/reference.json, since the float model itself is not kept in the repository. Runs offline.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from demo.corpus import Corpus, Message
from demo.encoding import Encoder

REFERENCE = Path(__file__).parent / "reference.json"
SEQUENCES = 80  # held-out questions with their answers, drawn with a fixed seed


@torch.inference_mode()
def write_reference(float_folder: Path, corpus: Corpus, encoder: Encoder, *, path: Path) -> None:
    """For each sequence its ids, the most probable next token after each, and log p of the one that follows."""
    model = LlamaForCausalLM.from_pretrained(float_folder, dtype=torch.float32).eval()
    sequences = []
    for _, question, answer in random.Random(0).sample(corpus.held_out_pairs(), SEQUENCES):
        ids = encoder.conversation((Message("user", question), Message("assistant", answer))).ids
        chances = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(dim=-1)  # [length - 1, vocab]
        following = chances.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        sequences.append(
            {
                "ids": ids,
                "top1": chances.argmax(dim=-1).tolist(),
                "log_p": [round(value, 3) for value in following.tolist()],
            }
        )
    lines = ",\n".join(json.dumps(one, separators=(",", ":")) for one in sequences)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
