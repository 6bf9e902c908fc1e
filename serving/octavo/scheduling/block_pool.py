"""The cache's blocks: reference counts, the free list and the hash-chained prefix cache. Engine thread only.

Owns which block is free, used or cached; knows nothing of sequences, plans or tensors. Each block is in one state:

    free    no content worth keeping
    used    one or more sequences refer to it
    cached  nobody refers to it, its content can be found; taken, oldest first, when none is free

A full block's digest covers its parent's digest and its own tokens, so one lookup vouches for the whole prefix. It is a
128-bit BLAKE2b: Python's hash() could collide and hand one request the tokens of another.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Seq

BLOCK_SIZE = 64  # tokens


def num_blocks_for(num_tokens: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // BLOCK_SIZE)


def extend_digests(digests: list[bytes], token_ids: list[int], *, upto: int, extra_key: bytes = b"") -> None:
    """Append the chained digests of full blocks until `digests` has `upto` of them.

    `extra_key` separates the caches of adapters or tenants.
    """
    first = len(digests)
    if first >= upto:
        return
    parent = digests[-1] if digests else hashlib.blake2b(extra_key, digest_size=16).digest()
    packed = memoryview(array("q", token_ids[first * BLOCK_SIZE : upto * BLOCK_SIZE]).tobytes())
    width = BLOCK_SIZE * 8  # bytes of one block's ids
    for offset in range(0, (upto - first) * width, width):
        hasher = hashlib.blake2b(parent, digest_size=16)
        hasher.update(packed[offset : offset + width])
        parent = hasher.digest()
        digests.append(parent)


class BlockPool:
    """All blocks of the cache, 0 .. num_blocks-1."""

    def __init__(self, num_blocks: int, *, prefix_cache: bool = True) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks ({num_blocks}) must be at least 1")
        self.num_blocks = num_blocks
        self.prefix_cache = prefix_cache
        self._references = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: low numbers first
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._by_digest: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def references(self) -> tuple[int, ...]:
        """How many tables hold each block."""
        return tuple(self._references)

    def match(self, digests: Seq[bytes]) -> list[int]:
        """Blocks that hold the longest known prefix of the chain. They are not held: `allocate` takes them."""
        hits: list[int] = []
        for digest in digests:
            block = self._by_digest.get(digest)
            if block is None:
                break
            hits.append(block)
        return hits

    def can_allocate(self, count: int, *, hits: Seq[int] = (), spare: int = 0) -> bool:
        """Whether `hits` can be held and `count` more blocks taken, with `spare` left over."""
        idle_hits = sum(1 for block in hits if not self._references[block])
        return len(self._free) + len(self._cached) - idle_hits >= count + spare

    def allocate(self, count: int, *, hits: Seq[int] = ()) -> list[int] | None:
        """`hits`, held, followed by `count` blocks of undefined content; None, and no change, when short."""
        if not self.can_allocate(count, hits=hits):
            return None
        for block in hits:
            if not self._references[block]:
                del self._cached[block]
            self._references[block] += 1
        return [*hits, *(self._take() for _ in range(count))]

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        self._references[block] = 1
        return block

    def _forget(self, block: int) -> None:
        digest = self._digests[block]
        assert digest is not None
        del self._by_digest[digest]
        self._digests[block] = None

    def free(self, blocks: Seq[int]) -> None:
        """Drop one reference to each block of a table. Tails become the older entries, so heads are evicted last."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block]:
                continue
            if self._digests[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def register(self, block: int, digest: bytes) -> None:
        """Make a full, computed block findable. A second block of the same content stays unknown."""
        if self._digests[block] is None and digest not in self._by_digest:
            self._digests[block] = digest
            self._by_digest[digest] = block

    def count_exclusive(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` would become available if their one holder let go."""
        return sum(1 for block in blocks if self._references[block] == 1)

    def check_idle(self) -> None:
        """AssertionError if a block is in use. Unlike `check_integrity` it does not look at every block."""
        assert len(self._free) + len(self._cached) == self.num_blocks, "a block is lost"
        assert len(self._by_digest) == len(self._cached), "digests and blocks differ"

    def check_integrity(self) -> None:
        """Free + used + cached = all, each block in one state, digests and blocks one to one. AssertionError if not."""
        free, cached = set(self._free), set(self._cached)
        used = {block for block, count in enumerate(self._references) if count}
        assert len(free) == len(self._free), "a block is twice in the free list"
        assert free.isdisjoint(cached) and used.isdisjoint(free | cached), "a block is in two states"  # noqa: PT018
        assert len(free) + len(cached) + len(used) == self.num_blocks, "a block is lost"
        assert all(count >= 0 for count in self._references), "a reference count is negative"
        named = {block: digest for block, digest in enumerate(self._digests) if digest is not None}
        assert {digest: block for block, digest in named.items()} == self._by_digest, "digests and blocks differ"
        assert cached <= named.keys(), "a cached block cannot be found"
        assert not free & named.keys(), "a free block can be found"
