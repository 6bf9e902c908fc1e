"""An 8B shape with random weights on a card: it loads, 48 sequences run at once, and company changes no token."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"))

from gpu_engine import Engine

from gpu.steps import ROOM_FOR_8B


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    if torch.cuda.mem_get_info()[0] < ROOM_FOR_8B:
        pytest.skip(f"needs {ROOM_FOR_8B >> 30} GiB of free device memory")
    made = Engine.load(request.getfixturevalue("large_folder"), batch_size=48, longest=2048, device="cuda")
    yield made
    made.close()


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 128000, (30 + 25 * i,), generator=generator).tolist() for i in range(count)]


def answers(engine: Engine, wanted: list[list[int]]) -> list[list[int]]:
    """32 tokens of each prompt, all queued at once; seeds follow from the place in the list."""
    engine.next_id = 0
    ids = [engine.add(prompt, 32) for prompt in wanted]
    found = engine.drain()
    return [found[seq_id] for seq_id in ids]


def test_48_sequences_say_what_they_say_alone(engine: Engine) -> None:
    crowd = answers(engine, prompts(48))
    assert all(len(tokens) == 32 for tokens in crowd)
    assert len({tuple(tokens) for tokens in crowd}) == 48
    for index in (0, 17, 47):
        engine.next_id = index
        seq_id = engine.add(prompts(48)[index], 32)
        assert engine.drain()[seq_id] == crowd[index]


def test_a_prompt_longer_than_a_step_and_a_step_of_many_rows_agree(engine: Engine) -> None:
    """Tokens after a prompt of 1900 do not depend on what else is in its steps."""
    long = [torch.randint(3, 128000, (1900,), generator=torch.Generator().manual_seed(9)).tolist()]
    alone = answers(engine, long)[0]
    assert answers(engine, long + prompts(20))[0] == alone
