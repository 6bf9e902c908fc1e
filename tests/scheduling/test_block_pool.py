"""Behaviours of the block pool and its prefix cache."""

from __future__ import annotations

import pytest

from octavo.scheduling.block_pool import BLOCK_SIZE, BlockPool, extend_digests, num_blocks_for


def chain(token_ids: list[int], *, extra_key: bytes = b"") -> list[bytes]:
    digests: list[bytes] = []
    extend_digests(digests, token_ids, upto=len(token_ids) // BLOCK_SIZE, extra_key=extra_key)
    return digests


def cached_pool(num_blocks: int, token_ids: list[int]) -> tuple[BlockPool, list[int]]:
    """A pool in which the full blocks of `token_ids` are cached and nothing is used."""
    pool = BlockPool(num_blocks)
    blocks = pool.allocate(len(token_ids) // BLOCK_SIZE)
    for block, digest in zip(blocks, chain(token_ids)):
        pool.register(block, digest)
    pool.free(blocks)
    return pool, blocks


def test_blocks_are_counted_up():
    assert [num_blocks_for(count) for count in (0, 1, 64, 65, 128)] == [0, 1, 1, 2, 2]


def test_allocate_gives_distinct_blocks_and_none_when_short():
    pool = BlockPool(4)
    first = pool.allocate(3)
    assert len(set(first)) == 3
    assert pool.allocate(2) is None
    assert (pool.num_free, pool.num_used) == (1, 3)
    pool.free(first)
    assert pool.num_free == 4
    pool.check_integrity()


def test_registered_blocks_stay_findable_after_they_are_freed():
    token_ids = list(range(200))
    pool, blocks = cached_pool(8, token_ids)
    assert pool.match(chain(token_ids)) == blocks
    assert (pool.num_cached, pool.num_free) == (3, 5)
    pool.check_integrity()


def test_a_match_ends_at_the_first_other_token():
    pool, blocks = cached_pool(8, list(range(192)))
    other = [*range(70), -1, *range(71, 192)]
    assert pool.match(chain(other)) == blocks[:1]


def test_an_equal_block_after_another_prefix_is_no_hit():
    pool, _ = cached_pool(8, [1] * 64 + [2] * 64)
    assert pool.match(chain([3] * 64 + [2] * 64)) == []


def test_an_extra_key_separates_equal_tokens():
    assert chain([1] * 64) != chain([1] * 64, extra_key=b"tenant")


def test_digests_are_the_same_whether_extended_at_once_or_block_by_block():
    token_ids = list(range(300))
    digests: list[bytes] = []
    for upto in range(1, 5):
        extend_digests(digests, token_ids, upto=upto)
    assert digests == chain(token_ids)
    assert len(set(digests)) == 4


def test_token_ids_that_share_a_python_hash_are_told_apart():
    assert hash(-1) == hash(-2)
    assert chain([-1] * 64) != chain([-2] * 64)


def test_hits_are_held_and_shared():
    token_ids = list(range(128))
    pool, blocks = cached_pool(4, token_ids)
    first = pool.allocate(1, hits=pool.match(chain(token_ids)))
    second = pool.allocate(1, hits=pool.match(chain(token_ids)))
    assert first[:2] == second[:2] == blocks
    assert pool.num_used == 4
    pool.free(first)
    assert pool.references[blocks[0]] == 1
    assert pool.num_used == 3
    pool.check_integrity()


def test_idle_hits_do_not_count_as_room():
    token_ids = list(range(128))
    pool, _ = cached_pool(3, token_ids)
    hits = pool.match(chain(token_ids))
    assert pool.can_allocate(1, hits=hits)
    assert not pool.can_allocate(2, hits=hits)
    assert not pool.can_allocate(1, hits=hits, spare=1)
    assert pool.allocate(2, hits=hits) is None
    assert pool.num_cached == 2


def test_free_blocks_are_taken_before_cached_ones():
    pool, blocks = cached_pool(4, list(range(128)))
    assert not set(pool.allocate(2)) & set(blocks)


def test_the_tail_of_a_prefix_is_evicted_before_its_head():
    token_ids = list(range(192))
    pool, blocks = cached_pool(3, token_ids)
    assert pool.allocate(1) == [blocks[2]]
    assert pool.match(chain(token_ids)) == blocks[:2]
    assert pool.allocate(1) == [blocks[1]]
    assert pool.match(chain(token_ids)) == blocks[:1]
    pool.check_integrity()


def test_the_least_recently_used_prefix_is_evicted_first():
    pool = BlockPool(2)
    old, new = [1] * 64, [2] * 64
    for token_ids in (old, new):
        (block,) = pool.allocate(1)
        pool.register(block, chain(token_ids)[0])
        pool.free([block])
    pool.free(pool.allocate(0, hits=pool.match(chain(old))))  # used again
    pool.allocate(1)
    assert pool.match(chain(old))
    assert not pool.match(chain(new))


def test_a_second_block_of_equal_content_stays_unknown():
    pool = BlockPool(3)
    first, second = pool.allocate(2)
    digest = chain([1] * 64)[0]
    pool.register(first, digest)
    pool.register(second, digest)
    pool.free([first, second])
    assert (pool.num_cached, pool.num_free) == (1, 2)
    pool.check_integrity()


def test_integrity_notices_a_block_freed_twice():
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.free(blocks)
    pool._free.append(blocks[0])
    with pytest.raises(AssertionError):
        pool.check_integrity()


def test_a_pool_needs_a_block():
    with pytest.raises(ValueError, match="num_blocks"):
        BlockPool(0)
