"""Turns corpus examples into token ids and labels, and into batches of similar length.

Labels are -100 where nothing is learned: prompts, system and user turns. Knows nothing of the model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from demo.corpus import Completion, Conversation, Message
from demo.tokenizer import BOS, END, PAD, ROLES

IGNORED = -100
MAX_TOKENS = 512  # of one example; longer ones are cut


@dataclass(frozen=True)
class Encoded:
    """Token ids and labels of one example, equally long."""

    ids: list[int]
    labels: list[int]


class Encoder:
    """Encodes examples with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.bos, self.end, self.pad = (self.special(token) for token in (BOS, END, PAD))
        self.roles = {role: self.special(token) for role, token in ROLES.items()}

    def special(self, token: str) -> int:
        """The id of a special token. Raises ValueError if the tokenizer lacks it."""
        index = self.tokenizer.token_to_id(token)
        if index is None:
            raise ValueError(f"the tokenizer lacks {token}")
        return index

    def text(self, text: str) -> list[int]:
        """Ids of plain text, without <|bos|>."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the assistant begins, as the chat template gives them."""
        ids = [self.bos]
        for message in messages:
            ids += [self.roles[message.role], *self.text(message.content), self.end]
        return [*ids, self.roles["assistant"]]

    def conversation(self, messages: Sequence[Message]) -> Encoded:
        """Every assistant's answer and the end token after it is learned."""
        ids, labels = [self.bos], [IGNORED]
        for message in messages:
            content = [*self.text(message.content), self.end]
            learned = content if message.role == "assistant" else [IGNORED] * len(content)
            ids += [self.roles[message.role], *content]
            labels += [IGNORED, *learned]
        return Encoded(ids[:MAX_TOKENS], labels[:MAX_TOKENS])

    def completion(self, completion: Completion, *, with_bos: bool) -> Encoded:
        """The continuation is learned; prompt and continuation are tokenised apart, as they are when served."""
        prompt = [self.bos] * with_bos + self.text(completion.prompt)
        learned = [*self.text(completion.continuation), self.end]
        return Encoded((prompt + learned)[:MAX_TOKENS], ([IGNORED] * len(prompt) + learned)[:MAX_TOKENS])

    def example(self, example: Conversation | Completion, rng: random.Random) -> Encoded:
        """Any example; a quarter of the completions goes without <|bos|>."""
        if isinstance(example, Completion):
            return self.completion(example, with_bos=rng.random() < 0.75)
        return self.conversation(example.messages)


def make_batches(
    encoded: list[Encoded], *, tokens_per_batch: int, pad: int, rng: random.Random
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches (ids, labels), both [rows, length] int64, of similar lengths and in random order."""
    ordered = sorted(encoded, key=lambda item: (len(item.ids), rng.random()))
    batches: list[list[Encoded]] = [[]]
    for item in ordered:
        if (len(batches[-1]) + 1) * len(item.ids) > tokens_per_batch and batches[-1]:
            batches.append([])
        batches[-1].append(item)
    rng.shuffle(batches)
    return [pad_batch(batch, pad=pad) for batch in batches]


def pad_batch(batch: Sequence[Encoded], *, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right padding: a causal model needs no mask for it, and padded labels are ignored."""
    length = max(len(item.ids) for item in batch)
    ids = torch.tensor([item.ids + [pad] * (length - len(item.ids)) for item in batch])  # [rows, length]
    labels = torch.tensor([item.labels + [IGNORED] * (length - len(item.labels)) for item in batch])
    return ids, labels
