"""The arithmetic: percentiles, rates, errors by kind; and the work: lengths, arrivals, files."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pytest

from octavo.cli.bench.figures import Outcome, most_at_once, percentile, spread, summarize
from octavo.cli.bench.work import Shape, WorkError, arrivals, item_of, random_items, read_dataset


@pytest.mark.parametrize("share", [0, 1, 50, 90, 99, 100])
@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_percentile_is_that_of_numpy(share: float, count: int) -> None:
    values = list(np.random.default_rng(count).random(count))
    assert percentile(values, share) == pytest.approx(np.percentile(values, share))


def test_percentile_of_nothing_is_an_error_and_spread_of_nothing_is_none() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)
    assert spread([]) is None


def test_outcome_times_are_from_sending() -> None:
    one = Outcome(0, due=1.0, sent=2.0, arrivals=[2.5, 2.6, 2.9], ended=3.0, output_tokens=5)
    assert one.ttft == pytest.approx(0.5)
    assert one.gaps == pytest.approx([0.1, 0.3])
    assert one.e2e == pytest.approx(1.0)
    assert one.tpot == pytest.approx(0.1)  # 0.4 s for the four tokens after the first
    assert Outcome(0, due=0.0, arrivals=[1.0], output_tokens=1).tpot is None


def test_a_failed_request_counts_as_failed_and_in_no_other_figure() -> None:
    good = Outcome(0, due=0, sent=0, arrivals=[0.1, 0.2], ended=0.2, input_tokens=10, output_tokens=2, counted="usage")
    bad = Outcome(1, due=0, sent=0, arrivals=[0.9], input_tokens=99, output_tokens=99)
    bad.fail("HTTP 429", "queue full", now=1.0)
    again = Outcome(2, due=0, sent=0)
    again.fail("HTTP 429", "later", now=0.5)
    summary = summarize([good, bad, again], began=0.0, cpu_seconds=0.25)
    assert (summary["completed"], summary["failed"]) == (1, 2)
    assert summary["errors"] == {"HTTP 429": {"count": 2, "first": "queue full"}}
    assert summary["output_tok_per_s"] == pytest.approx(2.0)
    assert summary["total_tok_per_s"] == pytest.approx(12.0)
    assert summary["ttft"]["max_ms"] == pytest.approx(100.0)
    assert summary["tokens_counted_by"] == {"usage": 1}
    assert summary["generator_cpu_share"] == pytest.approx(0.25)
    assert summary["sent_late"] is None


def test_a_run_without_answers_has_no_latencies() -> None:
    bad = Outcome(0, due=0, sent=0)
    bad.fail("timeout", "", now=2.0)
    summary = summarize([bad], began=0.0)
    assert summary["ttft"] is summary["itl"] is summary["e2e"] is None
    assert summary["output_tok_per_s"] == 0.0


def test_most_at_once_counts_overlaps() -> None:
    spans = [(0, 2), (1, 3), (2, 4), (5, 6)]
    assert most_at_once([Outcome(0, due=0, sent=a, ended=b) for a, b in spans]) == 2


def test_arrivals_are_a_seeded_poisson_process() -> None:
    due = arrivals(20_000, 50.0, seed=3)
    gaps = np.diff(due).tolist()
    assert due == arrivals(20_000, 50.0, seed=3)
    assert due != arrivals(20_000, 50.0, seed=4)
    assert due[0] == 0.0
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert statistics.pstdev(gaps) == pytest.approx(1 / 50, rel=0.05)  # exponential: as wide as its mean
    assert arrivals(3, float("inf"), seed=0) == [0.0, 0.0, 0.0]


def test_random_prompts_have_the_lengths_asked_for_and_share_their_beginning() -> None:
    items = random_items(50, Shape(100, 20, 0.5, 30), seed=1)
    assert items == random_items(50, Shape(100, 20, 0.5, 30), seed=1)
    lengths = [len(item.token_ids or ()) for item in items]
    assert min(lengths) >= 50
    assert max(lengths) <= 150
    assert len(set(lengths)) > 10
    assert len({item.token_ids[:30] for item in items if item.token_ids}) == 1
    assert len({item.token_ids[30:40] for item in items if item.token_ids}) == 50
    assert all(10 <= item.output_len <= 30 for item in items)


def test_word_prompts_have_one_word_a_token() -> None:
    (item,) = random_items(1, Shape(64, 8, words=True), seed=0)
    assert item.token_ids is None
    assert len((item.text or "").split()) == 64


def test_dataset_lines_of_each_kind_are_read(tmp_path: Path) -> None:
    rows = [
        {"prompt": "hello", "output_len": 7},
        {"prompt": [1, 2, 3]},
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ]
    path = tmp_path / "asked.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    first, ids, chat, recorded = read_dataset(path, output_len=64)
    assert (first.text, first.output_len) == ("hello", 7)
    assert (ids.token_ids, ids.output_len) == ((1, 2, 3), 64)
    assert (chat.messages, chat.output_len) == (({"role": "user", "content": "hi"},), 9)
    assert recorded.messages == ({"role": "user", "content": "q"},)


@pytest.mark.parametrize("line", ["[1]", "{}", '{"prompt": ""}', "{", '{"prompt": "a", "output_len": -1}'])
def test_a_bad_dataset_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text('{"prompt": "good"}\n' + line + "\n")
    with pytest.raises(WorkError, match="line 2"):
        read_dataset(path, output_len=4)


def test_prompt_may_be_given_under_three_names() -> None:
    for row in ({"prompt": "x"}, {"text": "x"}, {"input_ids": [5]}):
        assert item_of(row, output_len=1).output_len == 1
