"""What prompt-lookup speculation gains and costs, on the standard model of benchmarks/cpu.py.

Its weights are random, so it repeats nothing by itself. Here every step does the model's whole work, head and sampling
included, and then the sampled token is replaced by the next one of a written answer: an edited copy of the prompt, new
text with quotes from it, another text, random tokens, or noise of twelve tokens, where drafts are always found and
never good. So times are the model's, and texts, matches and accepted drafts are real.

In three cases nothing is written. `own` samples the model's own tokens, which do not repeat. `loop` takes its likeliest
ones, and a model of random weights soon says the same again and again. `copy` is a model of the same shape whose
weights are made by hand to repeat its prompt (copying_model.py), asked to go on where its prompt began.

python benchmarks/speculation.py [--folder DIR] [--runs 3]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from copying_model import make_copying_model
from standard_model import make_model

from octavo.engine.core import IDLE_TOKENS, EngineCore, default_budget, make_scheduler
from octavo.engine.interface import Runner
from octavo.engine.load import load_runner
from octavo.protocol.messages import SamplingParams, Submit
from octavo.scheduling.plan import Sampled, SequenceStep, StepPlan, StepResult
from octavo.settings import DEMO_MODEL, REPOSITORY, with_overrides
from octavo.text.tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
CASES = ("edit", "quotes", "other", "random", "noise", "own", "loop", "copy")
UNWRITTEN = ("own", "loop", "copy")
WRITTEN = tuple(case for case in CASES if case not in UNWRITTEN)
PROMPT_TOKENS = {1: 512, 4: 256, 16: 128}  # by batch
COPY_FROM = 8  # tokens of its beginning that end a prompt
OUTPUT_TOKENS = {1: 160, 4: 128, 16: 96}


@dataclass
class Scripted:
    """A runner whose sampled tokens are those of written answers, by sequence id; its own where none is written."""

    inner: Runner
    answers: dict[int, list[int]] = field(default_factory=dict)
    plans: deque[StepPlan] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.info = self.inner.info

    def submit(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        self.inner.submit(plan)

    def collect(self) -> StepResult:
        result, plan = self.inner.collect(), self.plans.popleft()
        result.sampled = [
            self._sampled(step) if step.sample and self.answers[step.seq_id] else own
            for step, own in zip(plan.sequences, result.sampled)
        ]
        return result

    def close(self) -> None:
        self.inner.close()

    def _sampled(self, step: SequenceStep) -> Sampled:
        answer, place = self.answers[step.seq_id], step.num_outputs
        drawn = [Sampled(answer[place])]
        for draft in step.drafts:
            if answer[place] != draft:
                break
            place += 1
            drawn.append(Sampled(answer[place]))
        drawn[0].more = drawn[1:]
        return drawn[0]


# ---- texts


@dataclass
class Texts:
    """Prompts and answers from the documents and the code of this repository."""

    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        paths = [*sorted((REPOSITORY / "docs").glob("*.md")), *sorted((REPOSITORY / "serving").rglob("*.py"))]
        self._documents = [path.read_text() for path in paths if path.stat().st_size > 6000]

    def make(self, case: str, seed: int, *, length: int, count: int) -> tuple[list[int], list[int]]:
        """A prompt of `length` tokens and an answer of at least `count`."""
        dice = random.Random(seed)
        first, second = dice.sample(self._documents, 2)
        prompt = self.tokenizer.encode(first)[:length]
        if case == "copy":
            prompt[-COPY_FROM:] = prompt[:COPY_FROM]
        if case in UNWRITTEN:
            return prompt, []
        if case == "edit":
            answer = self._edited(self.tokenizer.decode(prompt), dice)
        elif case == "quotes":
            answer = self._quoting(prompt, self.tokenizer.encode(second), dice, count)
        elif case == "other":
            answer = self.tokenizer.encode(second)
        elif case == "random":
            answer = [dice.randrange(300, 4000) for _ in range(count)]
        else:
            answer = [dice.randrange(300, 312) for _ in range(count)]
            prompt = [dice.randrange(300, 312) for _ in prompt]
        return prompt, (answer + [dice.randrange(300, 4000) for _ in range(count)])[: count + 64]

    def _edited(self, text: str, dice: random.Random) -> list[int]:
        """The text with one word in twenty replaced."""
        words = text.split(" ")
        return self.tokenizer.encode(" ".join(dice.choice(words) if dice.random() < 0.05 else word for word in words))

    def _quoting(self, prompt: list[int], other: list[int], dice: random.Random, count: int) -> list[int]:
        """Twenty tokens of another text, then forty of the prompt, and so on."""
        answer: list[int] = []
        while len(answer) < count:
            start, place = dice.randrange(len(other) - 20), dice.randrange(len(prompt) - 40)
            answer += other[start : start + 20] + prompt[place : place + 40]
        return answer


# ---- measuring


def core_over(runner: Runner, speculation: str) -> EngineCore:
    scheduler = make_scheduler(
        runner.info,
        max_num_batched_tokens=default_budget(runner.info),
        prefix_cache=False,
        speculation=speculation,
        speculation_tokens=8,
        max_idle_tokens=IDLE_TOKENS,
    )
    return EngineCore(scheduler, runner, time.monotonic)


def tokens_per_second(
    core: EngineCore, runner: Scripted, answers: Sequence[tuple[list[int], list[int]]], temperature: float
) -> float:
    """Of a batch, from the moment when all prompts are done to the first end."""
    count = OUTPUT_TOKENS[len(answers)]
    for seq_id, (prompt, answer) in enumerate(answers):
        runner.answers[seq_id] = answer
        params = SamplingParams(max_tokens=count, temperature=temperature, top_p=0.95, seed=seq_id)
        core.add(Submit(seq_id, prompt, params))
    started: set[int] = set()
    while len(started) < len(answers):
        started |= {output.seq_id for output in core.turn()}
    tokens, ended = 0, False
    began = time.perf_counter()
    while not ended:
        outputs = core.turn()
        tokens += sum(len(output.token_ids) for output in outputs)
        ended = any(output.finish_reason is not None for output in outputs)
    seconds = time.perf_counter() - began
    core.abort_all()
    while core.has_work:
        core.turn()
    return tokens / seconds


def measure(runner: Scripted, texts: Texts, case: str, batch: int, runs: int) -> dict[str, float]:
    """Interleaved runs without and with; every run has texts of its own, the same for both."""
    cores = {name: core_over(runner, name) for name in ("none", "ngram")}
    rates: dict[str, list[float]] = {"none": [], "ngram": []}
    for run in range(runs):
        answers = [
            texts.make(case, 1000 * run + place, length=PROMPT_TOKENS[batch], count=OUTPUT_TOKENS[batch] + 64)
            for place in range(batch)
        ]
        order = list(cores.items()) if run % 2 else list(cores.items())[::-1]
        for name, core in order:
            rates[name].append(tokens_per_second(core, runner, answers, 0.8 if case in ("own", *WRITTEN) else 0.0))
    ratios = [fast / slow for slow, fast in zip(rates["none"], rates["ngram"])]
    stats = cores["ngram"].scheduler.stats()
    figures = {
        "none_tok_s": statistics.median(rates["none"]),
        "ngram_tok_s": statistics.median(rates["ngram"]),
        "ratio": statistics.median(ratios),
        "ratio_of_best": max(rates["ngram"]) / max(rates["none"]),  # says more on a machine that others use too
        "ratio_least": min(ratios),
        "ratio_most": max(ratios),
        "runs": runs,
        "drafted": stats.draft_tokens,
        "accepted": stats.accepted_tokens,
    }
    shown = "  ".join(f"{name} {value:.2f}" for name, value in figures.items())
    print(f"{case:7} batch {batch:2}: {shown}", file=sys.stderr, flush=True)
    return figures


def load(folder: Path, threads: int) -> Scripted:
    """As the server does, with room for all batches."""
    settings = with_overrides(
        {
            "model_dir": str(folder),
            "max_seq_len": 1024,
            "max_dec_len": 512,
            "batch_size": 16,
            "block_bs": 16.0,
            "num_threads": threads,
        }
    )
    runner = Scripted(load_runner(settings, lambda stage, fraction: None))
    gc.collect()
    gc.freeze()
    return runner


def copying(args: argparse.Namespace) -> Path:
    """The folder of the model that repeats its prompt, beside that of the standard one; made if it is asked for."""
    folder = args.folder.parent / "copying"
    if "copy" in args.cases:
        make_copying_model(args.folder, folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "octavo-bench" / "l1b")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], choices=list(OUTPUT_TOKENS))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--output", type=Path, default=HERE / "results" / "speculation.json", help="what is in it stays"
    )
    args = parser.parse_args()
    make_model(args.folder)
    load_before, kernels = os.getloadavg()[0], ""
    results: dict[str, dict[str, float]] = {}
    for folder, cases in ((args.folder, [case for case in args.cases if case != "copy"]), (copying(args), ["copy"])):
        if not set(cases) & set(args.cases):
            continue
        runner = load(folder, args.threads)
        texts = Texts(Tokenizer.load(str(DEMO_MODEL)))
        for batch in args.batches:
            results |= {f"{case}_{batch}": measure(runner, texts, case, batch, args.runs) for case in cases}
        runner.close()
        kernels = runner.info.kernels
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": args.threads,
        "kernels": kernels,
        "date": time.strftime("%Y-%m-%d"),
        "load_average": [load_before, os.getloadavg()[0]],
    }
    # cases that were not measured this time stay as they are
    earlier = json.loads(args.output.read_text()) if args.output.exists() else {}
    figures = {**earlier, "machine": machine, **results}
    args.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
