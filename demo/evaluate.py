"""Measures the finished model: greedy exact match and perplexity, in float, W8A16 and A8W8C8.

transformers runs all three; the 8-bit ones are simulated (quantised.py). Writes evaluation.json and the model card.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from tqdm import tqdm
from transformers import DynamicCache, LlamaForCausalLM

from demo.card import write_card
from demo.corpus import Corpus, Message
from demo.corpus.build import FACT_FILES
from demo.encoding import IGNORED, Encoder, pad_batch
from demo.quantised import load_dequantised, quantised_activations, quantised_cache
from demo.reference import write_reference
from demo.tokenizer import write_json

TRAINED_SAMPLE = 400  # trained questions, drawn with a fixed seed
ROWS = 32
FREE_TOPICS = frozenset(Path(name).stem for name in FACT_FILES)  # hand-written; the others are templates
Pair = tuple[str, str, str]  # topic, question, answer


@dataclass(frozen=True)
class Runner:
    """A model with the cache and the surroundings that one variant needs."""

    model: LlamaForCausalLM
    make_cache: Callable[[], DynamicCache]
    surroundings: Callable[[LlamaForCausalLM], AbstractContextManager[None]]


def no_surroundings(_: LlamaForCausalLM) -> AbstractContextManager[None]:
    """For variants whose model runs as it is."""
    return nullcontext()


def make_runners(float_folder: Path, out: Path) -> dict[str, Runner]:
    """The three variants by name."""
    float_model = LlamaForCausalLM.from_pretrained(float_folder, dtype=torch.float32).eval()
    model, scales = load_dequantised(out)
    return {
        "float": Runner(float_model, DynamicCache, no_surroundings),
        "W8A16": Runner(model, DynamicCache, no_surroundings),
        "A8W8C8": Runner(model, lambda: quantised_cache(scales), quantised_activations),
    }


@torch.inference_mode()
def greedy(runner: Runner, prompts: Sequence[list[int]], *, end: int, max_new: int) -> list[list[int]]:
    """Greedy answers to prompts of one length, without the end token."""
    ids = torch.tensor(prompts)  # [rows, length]
    cache, produced = runner.make_cache(), []
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(max_new):
        hidden = runner.model.model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
        ids = runner.model.lm_head(hidden[:, -1:]).argmax(dim=-1)  # [rows, 1]
        produced.append(ids)
        ended |= ids[:, 0] == end
        if bool(ended.all()):
            break
    rows = torch.cat(produced, dim=1).tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


def answers_of(runner: Runner, encoder: Encoder, pairs: Sequence[Pair], *, label: str) -> list[str]:
    """The greedy answer to each question asked alone, in the order of `pairs`."""
    groups: dict[int, list[int]] = defaultdict(list)
    prompts = [encoder.prompt([Message("user", question)]) for _, question, _ in pairs]
    for index in sorted(range(len(pairs)), key=lambda index: len(pairs[index][2])):
        groups[len(prompts[index])].append(index)
    chunks = [indices[i : i + ROWS] for indices in groups.values() for i in range(0, len(indices), ROWS)]
    answers = [""] * len(pairs)
    for chunk in tqdm(chunks, desc=label, mininterval=2.0):
        longest = max(len(encoder.text(pairs[index][2])) for index in chunk) + 8
        rows = greedy(runner, [prompts[index] for index in chunk], end=encoder.end, max_new=longest)
        for index, row in zip(chunk, rows, strict=True):
            answers[index] = encoder.tokenizer.decode(row, skip_special_tokens=False)
    return answers


@torch.inference_mode()
def perplexity(runner: Runner, encoder: Encoder, pairs: Sequence[Pair]) -> float:
    """Per answer token, end token included, with the right answer's earlier tokens given."""
    total, count = 0.0, 0
    for start in range(0, len(pairs), ROWS):
        batch = pairs[start : start + ROWS]
        talks = [(Message("user", question), Message("assistant", answer)) for _, question, answer in batch]
        ids, labels = pad_batch([encoder.conversation(talk) for talk in talks], pad=encoder.pad)
        hidden = runner.model.model(input_ids=ids, past_key_values=runner.make_cache(), use_cache=True)
        logits = runner.model.lm_head(hidden.last_hidden_state[:, :-1])  # [rows, length - 1, vocab]
        targets = labels[:, 1:]
        total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum").item()
        count += int((targets != IGNORED).sum())
    return math.exp(total / count)


def evaluation_parts(corpus: Corpus) -> dict[str, list[Pair]]:
    """Trained questions (a sample) and the two kinds of held-out ones."""
    held_out = corpus.held_out_pairs()
    return {
        "trained": random.Random(0).sample(corpus.train_pairs(), TRAINED_SAMPLE),
        "held_out_template": [pair for pair in held_out if pair[0] not in FREE_TOPICS],
        "held_out_free": [pair for pair in held_out if pair[0] in FREE_TOPICS],
    }


def measure(runner: Runner, encoder: Encoder, pairs: Sequence[Pair], *, label: str) -> dict[str, float | int]:
    """Figures of one variant on one part."""
    with runner.surroundings(runner.model):
        answers = answers_of(runner, encoder, pairs, label=label)
        figure = perplexity(runner, encoder, pairs)
    exact = sum(answer == pair[2] for answer, pair in zip(answers, pairs, strict=True))
    return {"questions": len(pairs), "exact_match": round(exact / len(pairs), 4), "perplexity": round(figure, 4)}


def write_evaluation(float_folder: Path, corpus: Corpus, *, out: Path, reference: Path) -> None:
    """Measures every variant on every part; writes `out`/evaluation.json, `out`/README.md and `reference`."""
    encoder = Encoder(Tokenizer.from_file(str(out / "tokenizer.json")))
    figures = {
        variant: {
            part: measure(runner, encoder, pairs, label=f"{variant} {part}")
            for part, pairs in evaluation_parts(corpus).items()
        }
        for variant, runner in make_runners(float_folder, out).items()
    }
    write_json(out / "evaluation.json", figures)
    write_card(out, corpus, figures)
    write_reference(float_folder, corpus, encoder, path=reference)
