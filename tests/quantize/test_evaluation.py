"""What is measured block by block and part by part equals the same worked out at once; statistics likewise."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from octavo.quantization.export import evaluation, streams
from octavo.quantization.export.evaluation import Head, measure
from octavo.quantization.export.layer_forward import rms_norm
from octavo.quantization.export.statistics import EXTREME_ROWS, InputStatistics, Sample
from octavo.quantization.export.streams import Stream

HIDDEN, VOCAB = 24, 101


def test_measures_equal_those_over_the_whole_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "ROWS", 17)
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in (9, 40, 13)]
    exact = torch.randn(62, HIDDEN, generator=generator)
    made = exact + 0.3 * torch.randn(62, HIDDEN, generator=generator)
    norm, weight = torch.rand(HIDDEN, generator=generator) + 0.5, 2 * torch.randn(VOCAB, HIDDEN, generator=generator)
    files = {"float": Stream(tmp_path / "float", HIDDEN), "made": Stream(tmp_path / "made", HIDDEN)}
    files["float"].write([exact])
    files["made"].write(made.split(20))
    found = measure(Head(norm, 1e-6, lambda: weight.split(30)), files, sequences, exact="float")

    last = torch.tensor([9, 49, 62]) - 1  # nothing follows these
    kept = [row for row in range(62) if row not in last.tolist()]
    targets = torch.tensor([token for ids in sequences for token in ids[1:]])
    p, q = ((rms_norm(x, norm, 1e-6) @ weight.T).double().log_softmax(1)[kept] for x in (exact, made))
    loss = -q.gather(1, targets[:, None]).mean()
    assert found["made"].perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert found["made"].top1_agreement == pytest.approx(float((p.argmax(1) == q.argmax(1)).double().mean()))
    assert found["made"].top1_agreement < 1
    assert found["made"].kl == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-4)
    assert found["float"].kl == pytest.approx(0, abs=1e-12)
    assert found["float"].top1_agreement == 1


def test_a_stream_gives_the_rows_that_were_written(tmp_path: Path) -> None:
    rows = torch.randn(10, 3)
    stream = Stream(tmp_path / "rows", 3)
    stream.write(rows.split(4))
    assert torch.equal(stream.after(2).read(slice(1, 7)), rows[3:9])
    with pytest.raises(OSError, match="ends before row 9"):
        stream.after(2).read(slice(1, 9))


def test_blocks_hold_whole_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "BLOCK_ROWS", 10)
    found = list(streams.blocks([4, 5, 3, 12, 1, 9]))
    assert [lengths for _, lengths in found] == [[4, 5], [3], [12], [1, 9]]
    assert [(rows.start, rows.stop) for rows, _ in found] == [(0, 9), (9, 12), (12, 24), (24, 34)]


def test_statistics_do_not_depend_on_blocks() -> None:
    x = torch.randn(700, 6, generator=torch.Generator().manual_seed(1))
    whole, parts = InputStatistics(6), InputStatistics(6)
    whole.add(x)
    for part in x.split(37):
        parts.add(part)
    assert parts.num_rows == 700
    assert torch.equal(parts.maxima, x.abs().amax(0))
    # sums of 700 float32 products of about 1, in another order
    torch.testing.assert_close(parts.hessian.double(), x.double().T @ x.double(), rtol=1e-5, atol=2e-4)
    largest = x.abs().amax(1).topk(EXTREME_ROWS).values
    assert torch.equal(parts.extremes.abs().amax(1).sort().values, largest.sort().values)
    assert torch.equal(parts.sample, whole.sample)
    assert torch.equal(parts.sample, x[::2])


@pytest.mark.parametrize("size", [1, 3, 50, 1000])
def test_a_sample_is_spread_evenly(size: int) -> None:
    sample = Sample(64)
    for part in torch.arange(1000).split(size):
        sample.add(part)
    assert torch.equal(sample.rows(), torch.arange(0, 1000, 16))
