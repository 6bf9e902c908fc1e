"""What the prefix cache saves in chats: several users, eight turns each, one long system prompt that all share.

    python benchmarks/prefix_chat.py [--folder MODEL_DIR] [--users 4] [--turns 8] [--json FILE] [--png FILE]

Runs every turn twice, on an engine with the prefix cache and on one without, in turn; the answers must be the same
tokens. Ends with 1 if a promise is broken: 85 % of the prompt work saved; the first token of later turns within a
quarter of the time that it takes without the cache; the same tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from plots import Panel, draw

from octavo.engine.core import EngineCore, scheduler_for
from octavo.protocol.messages import SamplingParams, Submit
from octavo.settings import set_thread_environ, with_overrides

HERE = Path(__file__).resolve().parent
SYSTEM, QUESTION, ANSWER = 1_000, 40, 48  # tokens
SAVED, LATER = 0.85, 0.25


@dataclass
class Turn:
    """One answer: the prompt's length, what of it was found, the first token's time."""

    prompt: int
    cached: int
    ttft: float
    token_ids: list[int]


@dataclass
class Engine:
    """The model and its loop, with or without the cache of prefixes."""

    core: EngineCore
    next_id: int = 0
    turns: list[list[Turn]] = field(default_factory=list)  # by turn, then by user

    @classmethod
    def load(cls, folder: str, *, prefix_cache: bool) -> Engine:
        settings = with_overrides(
            {
                "model_dir": folder,
                "max_seq_len": 4096,
                "max_dec_len": 256,
                "batch_size": 8,
                "block_bs": 8.0,
                "prefix_cache": prefix_cache,
            }
        )
        set_thread_environ(settings)
        from octavo.engine.load import load_runner

        runner = load_runner(settings, lambda stage, fraction: None)
        return cls(EngineCore(scheduler_for(settings, runner.info), runner, time.monotonic))

    def answer(self, prompt: list[int], *, seed: int, tokens: int = ANSWER) -> Turn:
        self.next_id += 1
        params = SamplingParams(max_tokens=tokens, temperature=0.8, top_p=0.95, seed=seed)
        began = time.perf_counter()
        self.core.add(Submit(self.next_id, list(prompt), params))
        turn = Turn(len(prompt), 0, 0.0, [])
        while self.core.has_work:
            for output in self.core.turn():
                if not turn.token_ids:
                    turn.ttft = time.perf_counter() - began
                    turn.cached = output.cached_tokens
                turn.token_ids += output.token_ids
        return turn


def chat(engines: list[Engine], *, users: int, turns: int, vocab: int) -> None:
    """All users' first turns, then their second ones, and so on: other chats come between two turns of one."""
    generator = random.Random(11)

    def tokens(count: int) -> list[int]:
        return [generator.randrange(3, vocab) for _ in range(count)]

    system = tokens(SYSTEM)
    histories = [list(system) for _ in range(users)]
    for number in range(turns):
        for engine in engines:
            engine.turns.append([])
        for user, history in enumerate(histories):
            history += tokens(QUESTION)
            answers = [engine.answer(history, seed=1000 * user + number) for engine in engines]
            for engine, turn in zip(engines, answers):
                engine.turns[-1].append(turn)
            history += answers[0].token_ids


def figures(cached: Engine, cold: Engine) -> dict[str, object]:
    rows = [turn for turns in cached.turns for turn in turns]
    asked, found = sum(turn.prompt for turn in rows), sum(turn.cached for turn in rows)
    by_turn = [
        {
            "turn": number + 1,
            "prompt_tokens": with_cache[0].prompt,
            "ttft_ms": statistics.median(turn.ttft for turn in with_cache) * 1e3,
            "cold_ttft_ms": statistics.median(turn.ttft for turn in without) * 1e3,
        }
        for number, (with_cache, without) in enumerate(zip(cached.turns, cold.turns))
    ]
    later = [one.ttft / other.ttft for a, b in zip(cached.turns[1:], cold.turns[1:]) for one, other in zip(a, b)]
    same = [[turn.token_ids for turn in turns] for turns in cached.turns] == [
        [turn.token_ids for turn in turns] for turns in cold.turns
    ]
    return {
        "prompt_tokens": asked,
        "found_in_cache": found,
        "saved": found / asked,
        "later_ttft_over_cold": statistics.median(later),
        "same_tokens": same,
        "by_turn": by_turn,
    }


def verdicts(out: dict[str, object]) -> list[tuple[bool, str]]:
    saved, later = float(str(out["saved"])), float(str(out["later_ttft_over_cold"]))
    return [
        (saved >= SAVED, f"prompt work saved: {saved:.1%} (≥ {SAVED:.0%})"),
        (later <= LATER, f"first token of later turns over cold: {later:.2f} (≤ {LATER})"),
        (bool(out["same_tokens"]), "the same tokens with and without the cache"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default=str(HERE.parent / "demo" / "model"))
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "prefix_chat.json")
    parser.add_argument("--png", type=Path, default=HERE / "results" / "prefix_chat.png")
    arguments = parser.parse_args()
    cached, cold = (Engine.load(arguments.folder, prefix_cache=kept) for kept in (True, False))
    for engine in (cached, cold):  # pages and threads; the words are not those of the chats
        engine.answer(list(range(3, 203)), seed=1, tokens=4)
    vocab = cached.core.runner.info.vocab_size
    chat([cached, cold], users=arguments.users, turns=arguments.turns, vocab=vocab)
    out = figures(cached, cold)
    for engine in (cached, cold):
        engine.core.runner.close()
    found = verdicts(out)
    header = {"date": time.strftime("%Y-%m-%d"), "model": Path(arguments.folder).name, "users": arguments.users}
    full = {**header, **out, "verdicts": [{"holds": holds, "text": text} for holds, text in found]}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(full, indent=1) + "\n")
    rows = full["by_turn"]
    assert isinstance(rows, list)
    lines = {key: [(row["turn"], row[key]) for row in rows] for key in ("ttft_ms", "cold_ttft_ms")}
    draw(arguments.png, [Panel("Time to first token", "turn", "ms", lines)], title="Chats with a shared system prompt")
    for holds, text in found:
        print(f"{'holds ' if holds else 'BROKEN'}  {text}")
    return 0 if all(holds for holds, _ in found) else 1


if __name__ == "__main__":
    sys.exit(main())
