"""Calibration text as token ids: from a file of texts or messages, or written by the model itself.

Runs once before a checkpoint is made. Knows tokens, not layers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from octavo.engine.llm import LLM, SamplingParams
from octavo.protocol.errors import InvalidRequest
from octavo.quantization.errors import CheckpointError
from octavo.text.tokenizer import Tokenizer

HELD_OUT_EVERY = 5  # of the sequences one in five is kept for the measurement
SELF = "self"
MIN_TOKENS = 8  # a sequence shorter than that says little


@dataclass(frozen=True)
class CalibrationText:
    """Token ids: what the recipe may see, and what its result is measured on."""

    calibration: list[list[int]]
    held_out: list[list[int]]


def split(
    sequences: Sequence[list[int]], *, num_samples: int, seed: int, held_out: Sequence[list[int]] | None = None
) -> CalibrationText:
    """Draw `num_samples`, and as many held out; without text for that, one in five of those drawn is kept apart.

    Raises CheckpointError if there is too little.
    """
    if held_out is not None:
        return CalibrationText(
            _draw(sequences, num_samples, seed, flag="--calibration", least=1),
            _draw(held_out, num_samples, seed, flag="--held-out", least=1),
        )
    drawn = _draw(sequences, num_samples, seed, flag="--calibration", least=2)
    every = min(HELD_OUT_EVERY, len(drawn))
    apart = drawn[every - 1 :: every]
    return CalibrationText([ids for i, ids in enumerate(drawn) if i % every != every - 1], apart)


def _draw(sequences: Sequence[list[int]], count: int, seed: int, *, flag: str, least: int) -> list[list[int]]:
    usable = [ids for ids in sequences if len(ids) >= MIN_TOKENS]
    if len(usable) < least:
        wanted = "one or more is" if least == 1 else "two or more are"
        raise CheckpointError(f"{flag}: {len(usable)} sequences of at least {MIN_TOKENS} tokens; {wanted} needed")
    return random.Random(seed).sample(usable, min(count, len(usable)))


def read_text(path: Path, tokenizer: Tokenizer, *, max_tokens: int, flag: str = "--calibration") -> list[list[int]]:
    """Sequences of at most `max_tokens` of a jsonl file; longer texts become several. Raises CheckpointError."""
    if not path.is_file():
        instead = f", or `{SELF}`" if flag == "--calibration" else ""
        raise CheckpointError(f"{flag} {path}: no such file (give a .jsonl of texts or messages{instead})")
    found = []
    for number, line in _lines(path):
        ids = _encode(line, tokenizer, where=f"{path.name} line {number}")
        found += [ids[low : low + max_tokens] for low in range(0, len(ids), max_tokens)]
    return found


def write_own_text(folder: Path, *, num_sequences: int, max_tokens: int, seed: int, progress: bool) -> list[list[int]]:
    """Text by the model itself: after its first token, and one at random, it goes on as it likes.

    The whole model is in memory meanwhile, with weights of 8 bits.
    """
    with LLM(folder, weight_quant="wint8", use_cache_kv_int8=False, progress=progress) as llm:
        first = llm.tokenizer.encode("", add_special_tokens=True)
        ordinary = [i for i in range(llm.info.vocab_size) if i not in llm.tokenizer.special_ids]
        rng = random.Random(seed)
        prompts = [[*first, rng.choice(ordinary)] for _ in range(num_sequences)]
        ends = tuple(sorted({*llm.info.end_token_ids, *llm.tokenizer.eos_ids}))
        length = max_tokens - len(first) - 1
        params = [SamplingParams(max_tokens=length, end_token_ids=ends, seed=rng.getrandbits(63)) for _ in prompts]
        completions = llm.generate(prompts, params, progress=progress)
    return [[*prompt, *completion.token_ids] for prompt, completion in zip(prompts, completions)]


def _lines(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """The objects of the file with their line numbers."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            raise CheckpointError(f"{path.name} line {number}: is not JSON") from None
        if not isinstance(value, dict):
            raise CheckpointError(f'{path.name} line {number}: must be an object with "text" or "messages"')
        yield number, value


def _encode(line: dict[str, object], tokenizer: Tokenizer, *, where: str) -> list[int]:
    text, messages = line.get("text"), line.get("messages")
    if isinstance(text, str):
        return tokenizer.encode(text, add_special_tokens=True)
    if not isinstance(messages, list) or not all(
        isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
        for one in messages
    ):
        raise CheckpointError(f'{where}: needs "text" (a string) or "messages" (a list of role and content)')
    if tokenizer.chat_template is None:
        raise CheckpointError(f'{where}: has "messages", but the model has no chat template; give "text"')
    try:
        return tokenizer.encode(tokenizer.chat_template.render(messages, add_generation_prompt=False))
    except InvalidRequest as error:
        raise CheckpointError(f"{where}: {error}") from None
