"""Builds the demo model from nothing: `python -m demo.build` (tokenizer, training, export, evaluation, model card).

The only entry point of this package. Working files (the float checkpoint) go to --work, the finished model to --out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from demo.corpus import Corpus, build_corpus
from demo.reference import REFERENCE
from demo.tokenizer import train_tokenizer, write_tokenizer
from demo.train import TrainSettings, train_model

STAGES = ("tokenizer", "train", "export", "evaluate")
MODEL_DIR = Path(__file__).parent / "model"


def parse_arguments() -> argparse.Namespace:
    """Command line of the build."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="working files: float checkpoint")
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="the finished model")
    parser.add_argument("--reference", type=Path, default=REFERENCE, help="what the float model says, for a test")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--epochs", type=int, default=TrainSettings.epochs)
    parser.add_argument("--minutes", type=float, default=None, help="stop training early to keep to this time")
    parser.add_argument("--threads", type=int, default=1, help="another number gives other bits")
    return parser.parse_args()


def run_stage(stage: str, corpus: Corpus, arguments: argparse.Namespace) -> None:
    """Runs one stage; each reads what the stages before it wrote."""
    from demo import evaluate, export

    work, out = arguments.work, arguments.out
    if stage == "tokenizer":
        write_tokenizer(train_tokenizer(corpus.texts()), work / "tokenizer")
    elif stage == "train":
        settings = TrainSettings(epochs=arguments.epochs)
        tokenizer = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
        train_model(corpus, tokenizer, settings=settings, work=work, minutes=arguments.minutes)
    elif stage == "export":
        model = LlamaForCausalLM.from_pretrained(work / "float", dtype=torch.float32)
        export.export_model(model, corpus, tokenizer_folder=work / "tokenizer", work=work, out=out)
    else:
        evaluate.write_evaluation(work / export.FLOAT_FOLDER, corpus, out=out, reference=arguments.reference)


def main() -> None:
    """Runs the stages that were asked for, in order."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    corpus = build_corpus()
    for stage in STAGES:
        if stage in arguments.stages:
            print(f"== {stage}", flush=True)
            run_stage(stage, corpus, arguments)


if __name__ == "__main__":
    main()
