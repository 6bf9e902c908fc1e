"""report.md and report.json beside the weights: what the checkpoint lost, where, and what each ingredient bought."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from octavo.quantization.export.evaluation import Measured
from octavo.quantization.export.folder import write_json

PLOT = "report.png"


def write_report(
    folder: Path,
    *,
    about: Mapping[str, object],
    exact: Measured,
    variants: Mapping[str, Measured],
    float_cache: Measured | None,
    layers: Sequence[Mapping[str, Any]],
    float_units: Mapping[str, Sequence[str]],
) -> None:
    """Both files, and a plot where matplotlib is installed."""
    last = list(variants.values())[-1]
    values = {
        **about,
        "float": asdict(exact),
        "made": asdict(last),
        "ablation": {name: asdict(measured) for name, measured in variants.items()},
        "float_cache": None if float_cache is None else asdict(float_cache),
        "kept_float": {layer: list(units) for layer, units in float_units.items()},
        "layers": list(layers),
    }
    write_json(folder / "report.json", values)
    has_plot = _plot(folder / PLOT, layers)
    lines = [*_head(about), *_figures(exact, variants, float_cache), *_kept(float_units), *_layers(layers)]
    lines += ["", f"![error per layer]({PLOT})"] if has_plot else []
    (folder / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _head(about: Mapping[str, object]) -> list[str]:
    return [
        f"# Quantisation report: {about['scheme']}",
        "",
        f"Made of `{about['model']}` ({about['architecture']}). Calibration: {about['calibration_tokens']} tokens in "
        f"{about['calibration_sequences']} sequences; measured on {about['held_out_tokens']} held-out tokens in "
        f"{about['held_out_sequences']} sequences. 8-bit arithmetic is simulated in float32.",
        "",
    ]


def _figures(exact: Measured, variants: Mapping[str, Measured], float_cache: Measured | None) -> list[str]:
    lines = [
        "## Against the float model",
        "",
        f"Each row has the ingredients of the rows above it; `{list(variants)[-1]}` is this checkpoint.",
        "",
        "| | perplexity | change | top-1 agreement | KL (nats) |",
        "|---|---|---|---|---|",
        f"| float | {exact.perplexity:.4f} | | | |",
    ]
    rows = dict(variants) if float_cache is None else {**variants, "the last with a float cache": float_cache}
    for name, one in rows.items():
        change = one.perplexity / exact.perplexity - 1
        lines.append(f"| {name} | {one.perplexity:.4f} | {change:+.2%} | {one.top1_agreement:.2%} | {one.kl:.2e} |")
    return lines


def _kept(float_units: Mapping[str, Sequence[str]]) -> list[str]:
    if not float_units:
        return []
    items = ", ".join(f"layer {layer}: {' '.join(units)}" for layer, units in sorted(float_units.items(), key=_number))
    return ["", "## Left in float", "", f"By measured sensitivity: {items}."]


def _number(item: tuple[str, object]) -> int:
    return int(item[0])


def _layers(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "",
        "## Per layer",
        "",
        "Relative error of the layer's output on held-out text: by this layer alone (exact inputs), and with all "
        "layers before it. Weights: mean relative error of the products' outputs on calibration text, with nearest "
        "rounding and as made. Strengths: how far outliers were moved, 0 is not at all.",
        "",
        "| layer | alone | accumulated | weights, nearest | weights, as made | strengths |",
        "|---|---|---|---|---|---|",
    ]
    for index, layer in enumerate(layers):
        errors = list(layer["products"].values()) or [(0.0, 0.0)]
        nearest, made = (sum(error[column] for error in errors) / len(errors) for column in (0, 1))
        strengths = ", ".join(f"{name} {value:g}" for name, value in layer["strengths"].items()) or "-"
        lines.append(
            f"| {index} | {layer['alone']:.2e} | {layer['accumulated']:.2e} | {nearest:.2e} | {made:.2e} "
            f"| {strengths} |"
        )
    return lines


def _plot(path: Path, layers: Sequence[Mapping[str, Any]]) -> bool:
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for name in ("alone", "accumulated"):
        axes.plot([layer[name] for layer in layers], marker="o", label=name)
    axes.set_xlabel("layer")
    axes.set_ylabel("relative error of the output")
    axes.set_yscale("log")
    axes.legend()
    figure.savefig(path, dpi=120)
    return True
