"""A plan as tensors: rows, blocks, positions, and which logits are wanted."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from engine_runner.plans import params, step
from octavo.engine.drawn import accept
from octavo.engine.sampler import SeenTokens, SlotStates
from octavo.engine.step_tensors import BlockTables, forward_batch
from octavo.protocol.messages import SamplingParams
from octavo.scheduling.plan import PENDING, Sampled, SequenceStep

CPU = torch.device("cpu")


def _sequence(slot: int, token_ids: list[int], *, start: int, table: list[int], wanted: SamplingParams) -> SequenceStep:
    return SequenceStep(
        seq_id=slot, slot=slot, fresh=False, start=start, token_ids=token_ids, block_table=table,
        sample=token_ids[-1] == PENDING, num_outputs=0, prompt_len=70, params=wanted,
    )  # fmt: skip


def test_rows_know_their_positions_and_slots() -> None:
    decode = _sequence(3, [PENDING], start=130, table=[9, 4, 7], wanted=params())
    prompt = _sequence(1, [11, 12, 13], start=63, table=[2, 5], wanted=params())
    batch = forward_batch([decode, prompt], np.array([0, 0, 0, 77]), BlockTables(4), device=CPU)
    assert batch.token_ids.tolist() == [77, 11, 12, 13]
    layout = batch.layout
    assert layout.query_start.tolist() == [0, 1, 4]
    assert layout.seq_lens.tolist() == [131, 66]
    assert layout.positions.tolist() == [130, 63, 64, 65]
    assert layout.slot_mapping.tolist() == [7 * 64 + 2, 2 * 64 + 63, 5 * 64, 5 * 64 + 1]
    assert layout.block_tables.tolist() == [[9, 4, 7], [2, 5, 0]]
    assert (layout.max_query_len, layout.max_seq_len) == (3, 131)
    assert batch.logits_rows.tolist() == [0]
    assert all(tensor.dtype == torch.int32 for tensor in (layout.positions, layout.slot_mapping, layout.block_tables))


def test_one_token_each_is_as_it_is_beside_longer_ones() -> None:
    """Decoding has a way of its own; a prompt of two tokens behind the same sequences takes the general one."""
    tables = {0: [9, 4, 7], 2: [1], 5: [3, 8], 6: [0, 2]}
    starts, tokens = {0: 130, 2: 0, 5: 127, 6: 64}, {0: PENDING, 2: 41, 5: 42, 6: PENDING}
    steps = [
        _sequence(slot, [tokens[slot]], start=starts[slot], table=table, wanted=params())
        for slot, table in tables.items()
    ]
    prompt = _sequence(1, [11, 12], start=0, table=[6], wanted=params())
    last_token = np.arange(50, 58)
    alone, beside = (forward_batch(each, last_token, BlockTables(8), device=CPU) for each in (steps, [*steps, prompt]))
    assert alone.token_ids.tolist() == beside.token_ids[:4].tolist() == [50, 41, 42, 56]
    assert alone.logits_rows.tolist() == beside.logits_rows.tolist() == [0, 3]
    for name, count in {"query_start": 5, "seq_lens": 4, "block_tables": 4, "positions": 4, "slot_mapping": 4}.items():
        mine, theirs = getattr(alone.layout, name), getattr(beside.layout, name)[:count]
        assert (mine.dtype, mine.tolist()) == (theirs.dtype, theirs.tolist())
    assert (alone.token_ids.dtype, alone.logits_rows.dtype) == (beside.token_ids.dtype, beside.logits_rows.dtype)
    assert (alone.layout.max_query_len, alone.layout.max_seq_len) == (1, 131)


def test_prompt_rows_follow_the_sampled_ones() -> None:
    wanted = params(prompt_logprobs=0)
    chunk = _sequence(0, [1, 2, 3], start=67, table=[0, 1], wanted=wanted)  # positions 67, 68, 69 of a prompt of 70
    decode = _sequence(1, [PENDING], start=5, table=[3], wanted=params())
    batch = forward_batch([chunk, decode], np.zeros(2, dtype=np.int64), BlockTables(2), device=CPU)
    assert batch.logits_rows.tolist() == [3, 0, 1]  # 69 predicts an output, not a prompt token


def test_seen_tokens_are_listed_once() -> None:
    seen = SeenTokens()
    for token in [*range(300), 5, 5]:
        seen.add(token, count=0)
    seen.add(5, count=1)
    seen.add(5, count=1)
    seen.add(1000, count=1)
    ids, counts = seen.arrays()
    assert ids.tolist() == [*range(300), 1000]
    assert counts.sum() == 3
    assert counts[5] == 2


def test_rows_carry_only_what_each_sequence_needs() -> None:
    slots = SlotStates(4)
    plain = step(0, [5, 6], params=params(seed=2**64 - 1), history=[5, 6])
    repeating = step(2, [5, 6, 5, 8], params=params(repetition_penalty=1.5), history=[5, 6, 5, 8], prompt_len=3)
    output_only = step(1, [5, 8], params=params(presence_penalty=0.5), history=[5, 8], prompt_len=1)
    for fresh in (plain, repeating, output_only):
        slots.start(fresh)
    slots.record(2, 6)
    wanted = params(min_tokens=4, end_token_ids=(2, 9), logit_bias={9: 3.0, 4: 1.0})
    banned = step(3, [1], params=wanted, num_outputs=3, history=[1])
    slots.start(banned)
    rows = slots.rows([plain, repeating, output_only, banned], device=CPU)
    assert rows.seed.tolist()[0] == -1  # the bits of the unsigned seed
    assert rows.seen_start.tolist() == [0, 0, 3, 4, 4]
    assert rows.seen_ids.tolist() == [5, 6, 8, 8]
    assert rows.seen_counts.tolist() == [0, 1, 1, 1]
    assert rows.bias_start.tolist() == [0, 0, 0, 0, 3]
    assert dict(zip(rows.bias_ids.tolist(), rows.bias_values.tolist())) == {9: float("-inf"), 4: 1.0, 2: float("-inf")}
    assert rows.position.tolist() == [0, 0, 0, 3]
    assert rows.bias_values.dtype == torch.float32


def test_a_released_slot_forgets_its_counts() -> None:
    slots = SlotStates(1)
    slots.start(step(0, [5], params=params(repetition_penalty=2.0, prompt_logprobs=1), history=[5]))
    assert slots.prompt(0) == [5]
    slots.release(0)
    assert slots.rows([step(0, [5], params=params())], device=CPU).seen_ids.numel() == 0
    assert slots.prompt(0) == ()


def _drafting(slot: int, token_ids: list[int], *, num_outputs: int, wanted: SamplingParams) -> SequenceStep:
    """A step whose first token is the newest known one."""
    return SequenceStep(
        seq_id=slot, slot=slot, fresh=False, start=4 + num_outputs - 1, token_ids=token_ids, block_table=[slot],
        sample=True, num_outputs=num_outputs, prompt_len=4, params=wanted, num_drafts=len(token_ids) - 1,
    )  # fmt: skip


def test_drafts_have_rows_of_logits_after_the_newest_token() -> None:
    drafting = _drafting(1, [PENDING, 21, 22], num_outputs=2, wanted=params())
    decode = _sequence(0, [PENDING], start=80, table=[3, 2], wanted=params())
    prompt = _sequence(2, [7, 8], start=0, table=[5], wanted=params())
    batch = forward_batch([decode, drafting, prompt], np.array([50, 51, 52]), BlockTables(3), device=CPU)
    assert batch.token_ids.tolist() == [50, 51, 21, 22, 7, 8]
    assert batch.layout.positions.tolist() == [80, 5, 6, 7, 0, 1]
    assert batch.layout.seq_lens.tolist() == [81, 8, 2]
    assert batch.logits_rows.tolist() == [0, 1, 2, 3]


def test_a_row_after_a_draft_counts_it_as_output() -> None:
    slots = SlotStates(2)
    wanted = params(presence_penalty=1.0, min_tokens=3, end_token_ids=(9,), logit_bias={4: 1.0})
    slots.start(step(1, [5, 6], params=wanted, history=[5, 6], prompt_len=1))
    slots.start(step(0, [5], params=params(), history=[5]))
    plain = _drafting(0, [5], num_outputs=1, wanted=params())
    drafting = _drafting(1, [6, 8, 6, 8], num_outputs=1, wanted=wanted)
    rows = slots.rows([drafting, plain], device=CPU)
    assert rows.position.tolist() == [1, 2, 3, 4, 1]
    assert rows.presence_penalty.tolist() == [1.0] * 4 + [0.0]
    seen = list(zip(rows.seen_ids.tolist(), rows.seen_counts.tolist()))
    starts = rows.seen_start.tolist()
    assert [sorted(seen[low:high]) for low, high in pairwise(starts)] == [
        [(6, 1)], [(6, 1), (8, 1)], [(6, 2), (8, 1)], [(6, 2), (8, 2)], [],
    ]  # fmt: skip
    assert rows.bias_start.tolist() == [0, 2, 4, 5, 6, 6]  # 9 is banned until three tokens are out
    assert slots.rows([plain], device=CPU).seen_ids.numel() == 0


def test_rows_are_made_anew_when_a_slot_changes() -> None:
    slots = SlotStates(1)
    one = step(0, [5], params=params(temperature=0.5), history=[5])
    slots.start(one)
    assert slots.rows([one], device=CPU).temperature.tolist() == [0.5]
    slots.start(step(0, [5], params=params(temperature=0.25), history=[5]))
    assert slots.rows([one], device=CPU).temperature.tolist() == [0.25]


def test_block_tables_grow_shrink_and_change_hands() -> None:
    tables = BlockTables(2)

    def of(*pairs: tuple[int, list[int]]) -> list[list[int]]:
        steps = [_sequence(slot, [1], start=0, table=table, wanted=params()) for slot, table in pairs]
        return tables.of(steps, np.array([slot for slot, _ in pairs])).tolist()

    assert of((1, [4]), (0, [1, 2, 3])) == [[4, 0, 0], [1, 2, 3]]
    long = list(range(40))
    assert of((1, long)) == [long]
    assert of((1, [7]), (0, [1, 2, 3])) == [[7, 0, 0], [1, 2, 3]]


def test_drafts_are_accepted_up_to_the_first_that_differs() -> None:
    recorded: list[tuple[int, int]] = []
    steps = [
        _drafting(1, [6, 8, 9], num_outputs=1, wanted=params()),
        _drafting(0, [5], num_outputs=1, wanted=params()),
        _drafting(2, [6, 3, 4, 5], num_outputs=1, wanted=params()),
    ]
    results = [Sampled(token) for token in (8, 1, 2, 77, 3, 4, 5, 6)]
    drawn = accept(steps, results, lambda slot, token: recorded.append((slot, token)))
    assert [[one.token_id, *(more.token_id for more in one.more)] for one in drawn if one is not None] == [
        [8, 1], [77], [3, 4, 5, 6],
    ]  # fmt: skip
    assert recorded == [(1, 8), (1, 1), (0, 77), (2, 3), (2, 4), (2, 5), (2, 6)]
