"""What came of a session of peers.py: medians, ratios to the best, shares of the limit, what was promised; a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from meter import Rates, seconds_per_token
from peer_process import Peer

LOWER_IS_BETTER = ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms", "load_s", "resident_mib")
NOT_COMPARED = ("seconds", "resident_mib", "room")
# what is promised: times the best peer, and share of the machine's limit
GOALS: dict[str, tuple[float, float | None]] = {
    "decode_1": (1.3, 0.89), "decode_4": (1.4, 0.80), "decode_16": (1.5, 0.57), "decode_32": (1.45, 0.71),
    "prompt_512": (1.2, 0.77), "prompt_2048": (1.27, 0.70), "serve_16": (1.3, None),
}  # fmt: skip


def medians(peer: Peer) -> dict[str, dict[str, float]]:
    """name -> column -> median over the runs; memory is the most of all but the long contexts."""
    out = {}
    for name, rows in peer.figures.items():
        columns = [key for key in rows[0] if key not in NOT_COMPARED]
        out[name] = {key: statistics.median(row[key] for row in rows) for key in columns}
        out[name]["runs"] = len(rows)
    short = [row for name, rows in peer.figures.items() if "_at_" not in name for row in rows]
    out["memory"] = {"resident_mib": max(row["resident_mib"] for row in short)}
    return out


def shares(figures: dict[str, dict[str, float]], machine: dict[str, Rates]) -> dict[str, float]:
    """name -> what of the limit of int8 weights a peer reached, by the machine's medians while it was measured."""
    return {
        name: row["tok_s"] * seconds_per_token(name, 1, machine[name], cache=False)[0]
        for name, row in figures.items()
        if name in machine and name.startswith(("decode", "prompt"))
    }


def ratios(ours: dict[str, dict[str, float]], others: dict[str, dict[str, dict[str, float]]]) -> dict[str, object]:
    """Each figure's ratio to the best peer, above 1 where ours is better whichever way is up."""
    out = {}
    for name, row in ours.items():
        for column, value in row.items():
            found = {peer: figures[name][column] for peer, figures in others.items() if column in figures.get(name, {})}
            if column == "runs" or not found or not value:
                continue
            lower = column in LOWER_IS_BETTER
            best = (min if lower else max)(found, key=lambda peer: found[peer])
            ratio = found[best] / value if lower else value / found[best]
            out[f"{name}.{column}"] = {"ours": value, "best": found[best], "peer": best, "ratio": ratio}
    return out


def goal_text(key: str, ratio: float, share: float | None) -> str:
    """What was promised for a figure, and whether it was kept."""
    name, column = key.rsplit(".", 1)
    if column != "tok_s" or name not in GOALS:
        return ""
    times, part = GOALS[name]
    text = f"≥ {times}" + ("" if ratio >= times else " missed")
    if part is None or share is None:
        return text
    return f"{text}; ≥ {part:.0%}" + ("" if share >= part else " missed")


def table(
    names: Sequence[str],
    figures: dict[str, dict[str, dict[str, float]]],
    compared: dict[str, dict[str, object]],
    ours: dict[str, float],
) -> str:
    """`ours`: what of the limit we reached."""
    lines = ["| figure | " + " | ".join(names) + " | ours / best | of the limit | goal |"]
    lines.append("|---|" + "---|" * (len(names) + 3))
    keys: dict[str, None] = {}
    for name in names:
        keys |= {f"{task}.{key}": None for task, row in figures.get(name, {}).items() for key in row if key != "runs"}
    for key in keys:
        task, column = key.rsplit(".", 1)
        values = [figures.get(name, {}).get(task, {}).get(column) for name in names]
        cells = ["-" if value is None else f"{value:.1f}" for value in values]
        entry, share = compared.get(key), ours.get(task) if column == "tok_s" else None
        cells.append(f"{entry['ratio']:.2f} ({entry['peer']})" if entry else "-")
        cells.append("-" if share is None else f"{share:.0%}")
        cells.append(goal_text(key, float(str(entry["ratio"])), share) if entry else "")
        lines.append(f"| {task} {column} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
