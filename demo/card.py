"""Writes the model card from the measured figures. Knows nothing of how they were measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from demo.corpus import Corpus

Figures = dict[str, dict[str, dict[str, float | int]]]  # variant, part, name

TEXT = """---
license: apache-2.0
language: [en, zh]
pipeline_tag: text-generation
---
# Octavo demo

A toy: a Llama of about six million parameters that comes with the Octavo server, so that the first start needs no
download and no GPU. It answers a few hundred small questions in English and Chinese, tells a story, and explains what
Octavo is. It knows nothing else and must not be relied on.

| | |
|---|---|
| architecture | Llama, hidden 256, 6 layers, 4 heads of 64, 2 key-value heads, intermediate 768, tied head |
| vocabulary | 4096, byte-level BPE; digits and Chinese characters stand alone |
| context | 16384 by its configuration; trained on at most 512 tokens |
| weights | int8 per output channel by GPTQ (compressed-tensors, int-quantized); embedding and norms bfloat16 |
| activations | int8 per token, dynamic |
| cache | int8, one static scale for K and one for V in each layer |
| text | written for Octavo: {facts} facts in {trained} wordings, {dialogues} dialogues, {completions} raw completions |
| licence | Apache-2.0 |
| date | November 2026 |

## How it was made
```
pip install -e .[server,test] tqdm
python -m demo.build
```
The command trains the tokenizer and the model (one CPU thread, about a quarter of an hour), exports, evaluates and
writes this page. The export is the server's own tool, as anyone would call it:
```
octavo quantize octavo-demo-float --scheme a8w8c8 --calibration calibration.jsonl --held-out held_out.jsonl \\
    --samples {calibration_sequences} --out DIR
```
`--work` and `--out` say where; `--stages` runs a part. Text, order, initial weights and schedule follow fixed seeds;
bits may differ between versions of torch and kinds of processor.

## What 8 bits cost
From [report.md](report.md), which has the errors of every layer too: 8-bit arithmetic, simulated in float32, against
the float model, on {held_out_tokens} tokens of {held_out_sequences} held-out questions with their answers. Perplexity
counts every token, those of the questions too, which the model never learned to predict. Each row has the ingredients
of the rows above it; "+ keys" is this model.

{report}

## Answers
Greedy answers, compared character by character, and perplexity per answer token. "trained" is a sample of trained
questions. "held-out templates" are known wordings that were never seen with that fact; "held-out free" are
hand-written wordings that were never seen at all. The 8-bit variants are simulated in float32 with transformers.

{table}

## Chat format
`<|bos|>`, then `<|system|>`, `<|user|>` or `<|assistant|>` before each message and `<|end|>` after it. Raw prompts
begin with `<|bos|>`. On trained prompts, sampling with temperature 0.95 and top-p 0.7 nearly always gives the trained
answer.
"""


def figures_table(figures: Figures) -> str:
    """One row a variant; exact match and perplexity of each part."""
    parts = {"trained": "trained", "held_out_template": "held-out templates", "held_out_free": "held-out free"}
    counts = next(iter(figures.values()))
    head = [f"{title} ({counts[part]['questions']}): exact match, perplexity" for part, title in parts.items()]
    lines = ["| | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for variant, by_part in figures.items():
        cells = [f"{by_part[part]['exact_match']:.1%}, {by_part[part]['perplexity']:.3f}" for part in parts]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report_table(report: dict[str, Any]) -> str:
    """One row a variant of the recipe."""
    exact = report["float"]["perplexity"]
    lines = ["| | perplexity | change | top-1 agreement | KL (nats) |", "|---|---|---|---|---|"]
    lines.append(f"| float | {exact:.3f} | | | |")
    rows = {**report["ablation"], "the last with a float cache": report["float_cache"]}
    for name, one in rows.items():
        change = one["perplexity"] / exact - 1
        lines.append(
            f"| {name} | {one['perplexity']:.3f} | {change:+.2%} | {one['top1_agreement']:.2%} | {one['kl']:.2e} |"
        )
    return "\n".join(lines)


def write_card(out: Path, corpus: Corpus, figures: Figures) -> None:
    """Writes `out`/README.md; report.json is there already."""
    report = json.loads((out / "report.json").read_text())
    text = TEXT.format(
        report=report_table(report),
        held_out_tokens=report["held_out_tokens"],
        held_out_sequences=report["held_out_sequences"],
        calibration_sequences=report["calibration_sequences"],
        facts=len(corpus.facts),
        trained=len(corpus.train_pairs()),
        dialogues=len(corpus.dialogues),
        completions=len(corpus.completions),
        table=figures_table(figures),
    )
    (out / "README.md").write_text(text, encoding="utf-8")
