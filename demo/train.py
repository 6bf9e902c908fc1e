"""Trains the demo model from nothing on the corpus; writes a float checkpoint after every epoch.

Runs offline on one CPU thread in about a quarter of an hour. The run is a function of its seed, the corpus and the
thread count. Knows nothing of quantisation.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from demo.corpus import Corpus
from demo.corpus.build import EpochDrawer
from demo.encoding import IGNORED, Encoder, make_batches
from demo.tokenizer import CONTEXT

ROPE_THETA = 10000.0


@dataclass(frozen=True)
class TrainSettings:
    """Everything a run depends on besides the corpus."""

    epochs: int = 34
    tokens_per_batch: int = 2048
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    seed: int = 20261121


def model_config(encoder: Encoder) -> LlamaConfig:
    """A Llama of about six million parameters with a tied head; every K is a multiple of 64."""
    return LlamaConfig(
        vocab_size=encoder.tokenizer.get_vocab_size(),
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=768,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=encoder.bos,
        eos_token_id=encoder.end,
        pad_token_id=encoder.pad,
    )


def answer_loss(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over learned positions; the head runs on those alone."""
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state  # [rows, length - 1, hidden]
    targets = labels[:, 1:]  # [rows, length - 1]
    learned = targets != IGNORED
    return F.cross_entropy(model.lm_head(hidden[learned]).float(), targets[learned])


def learning_rate_at(step: int, total: int, settings: TrainSettings) -> float:
    """Linear warm-up, then a cosine down to one hundredth."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    return settings.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def make_optimizer(model: LlamaForCausalLM, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW; norms are not decayed."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)


def train_model(
    corpus: Corpus, tokenizer: Tokenizer, *, settings: TrainSettings, work: Path, minutes: float | None = None
) -> LlamaForCausalLM:
    """Trains and returns the model; saves `work`/float after every epoch.

    `minutes` bounds the run: the schedule is fitted to the epochs that the first one's speed allows.
    """
    torch.manual_seed(settings.seed)
    encoder = Encoder(tokenizer)
    model = LlamaForCausalLM(model_config(encoder))
    optimizer = make_optimizer(model, settings)
    drawer = EpochDrawer(corpus, seed=settings.seed)
    started, step, epochs, epoch = time.monotonic(), 0, settings.epochs, 0
    while epoch < epochs:
        batches = draw_batches(drawer, encoder, epoch=epoch, settings=settings)
        step = train_epoch(model, optimizer, batches, step=step, epochs=epochs, epoch=epoch, settings=settings)
        model.save_pretrained(work / "float")
        epoch += 1
        if minutes is not None:
            per_epoch = (time.monotonic() - started) / epoch
            epochs = min(settings.epochs, max(epoch, int(60 * minutes / per_epoch)))
    return model


def draw_batches(
    drawer: EpochDrawer, encoder: Encoder, *, epoch: int, settings: TrainSettings
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of one epoch: a function of seed and epoch alone."""
    rng = random.Random(f"{settings.seed}/{epoch}/batches")
    encoded = [encoder.example(example, rng) for example in drawer.draw(epoch)]
    return make_batches(encoded, tokens_per_batch=settings.tokens_per_batch, pad=encoder.pad, rng=rng)


def train_epoch(
    model: LlamaForCausalLM,
    optimizer: torch.optim.AdamW,
    batches: list[tuple[torch.Tensor, torch.Tensor]],
    *,
    step: int,
    epochs: int,
    epoch: int,
    settings: TrainSettings,
) -> int:
    """One pass over the batches with a progress bar; returns the next step's number."""
    model.train()
    mean = 0.0
    bar = tqdm(batches, desc=f"epoch {epoch + 1}/{epochs}", mininterval=2.0)
    for index, (ids, labels) in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, epochs * len(batches), settings)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = answer_loss(model, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean += (loss.item() - mean) / (index + 1)
        bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
        step += 1
    return step
