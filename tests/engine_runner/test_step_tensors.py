"""A plan as tensors: rows, blocks, positions, and which logits are wanted."""

from __future__ import annotations

import numpy as np
import torch

from engine_runner.plans import params, step
from octavo.engine.sampler import SeenTokens, SlotStates
from octavo.engine.step_tensors import forward_batch
from octavo.protocol.messages import SamplingParams
from octavo.scheduling.plan import PENDING, SequenceStep

CPU = torch.device("cpu")


def _sequence(slot: int, token_ids: list[int], *, start: int, table: list[int], wanted: SamplingParams) -> SequenceStep:
    return SequenceStep(
        seq_id=slot, slot=slot, fresh=False, start=start, token_ids=token_ids, block_table=table,
        sample=token_ids[-1] == PENDING, num_outputs=0, prompt_len=70, params=wanted,
    )  # fmt: skip


def test_rows_know_their_positions_and_slots() -> None:
    decode = _sequence(3, [PENDING], start=130, table=[9, 4, 7], wanted=params())
    prompt = _sequence(1, [11, 12, 13], start=63, table=[2, 5], wanted=params())
    batch = forward_batch([decode, prompt], np.array([0, 0, 0, 77]), device=CPU)
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


def test_prompt_rows_follow_the_sampled_ones() -> None:
    wanted = params(prompt_logprobs=0)
    chunk = _sequence(0, [1, 2, 3], start=67, table=[0, 1], wanted=wanted)  # positions 67, 68, 69 of a prompt of 70
    decode = _sequence(1, [PENDING], start=5, table=[3], wanted=params())
    batch = forward_batch([chunk, decode], np.zeros(2, dtype=np.int64), device=CPU)
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
    banned = step(3, [1], params=params(min_tokens=4, end_token_ids=(2, 9), logit_bias={9: 3.0, 4: 1.0}), num_outputs=3)
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
