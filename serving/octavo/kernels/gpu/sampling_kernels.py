"""Sampling as kernels, one program a row: no sort, thresholds are found by halving the range of possible logits.

Float32 logits map to int32 keys of the same order; each pass over the row counts or sums what lies above a key. What is
kept is written (key, cut): all above the key, and of its equals those with ids up to cut. Sums are float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.gpu.arithmetic import rounded

SMALLEST = tl.constexpr(-2147483648)  # below every key


@triton.jit
def penalize(
    z_ptr,  # [B, V] float32, changed
    seen_start_ptr,  # [B + 1] int32
    seen_ids_ptr,  # int32, each once per row
    seen_counts_ptr,  # int32
    repetition_ptr,  # [B] float32
    frequency_ptr,
    presence_ptr,
    bias_start_ptr,
    bias_ids_ptr,
    bias_values_ptr,
    V,
    BLOCK: tl.constexpr,
):
    """Penalties, then biases, of one row. Ids outside the vocabulary are passed over. Grid: (B,)."""
    row = tl.program_id(0).to(tl.int64)
    repetition = tl.load(repetition_ptr + row)
    frequency = tl.load(frequency_ptr + row)
    presence = tl.load(presence_ptr + row)
    zero = tl.minimum(V, 0)
    end = tl.load(seen_start_ptr + row + 1)
    for start in range(tl.load(seen_start_ptr + row), end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        token = tl.load(seen_ids_ptr + i, mask=i < end, other=-1)
        count = tl.load(seen_counts_ptr + i, mask=i < end, other=0)
        known = (token >= 0) & (token < V)
        z = tl.load(z_ptr + row * V + token, mask=known, other=0.0)
        z = tl.where(z > 0.0, tl.div_rn(z, repetition + tl.zeros_like(z)), z * repetition)
        z = rounded(z, zero) - rounded(frequency * count.to(tl.float32), zero)
        z = tl.where(count > 0, z - presence, z)
        tl.store(z_ptr + row * V + token, z, mask=known)
    tl.debug_barrier()
    end = tl.load(bias_start_ptr + row + 1)
    for start in range(tl.load(bias_start_ptr + row), end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        token = tl.load(bias_ids_ptr + i, mask=i < end, other=-1)
        known = (token >= 0) & (token < V)
        z = tl.load(z_ptr + row * V + token, mask=known, other=0.0)
        z += tl.load(bias_values_ptr + i, mask=i < end, other=0.0)
        tl.store(z_ptr + row * V + token, z, mask=known)


@triton.jit
def sample(
    z_ptr,  # [B, V] float32
    ids_ptr,  # [B] int64
    temperature_ptr,  # [B] float32
    top_p_ptr,
    top_k_ptr,  # [B] int32
    min_p_ptr,
    seed_ptr,  # [B] int64
    position_ptr,  # [B] int64
    V,
    BLOCK: tl.constexpr,
):
    """One token of a row. Grid: (B,)."""
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * V
    maximum, best = _argmax(z_row, V, BLOCK)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row).to(tl.float64)
    token = best
    if temperature > 0.0:
        peak = tl.div_rn(maximum, temperature)  # division is monotone: the largest stays the largest
        if tl.abs(peak) < float("inf"):
            key = tl.full((), SMALLEST, tl.int32)
            cut = V
            if (top_k > 0) & (top_k < V):
                key, cut = _largest(z_row, temperature, top_k, _key(peak), V, BLOCK)
            if top_p < 1.0:
                key, cut = _nucleus(z_row, temperature, peak, top_p, key, cut, V, BLOCK)
            least = tl.load(min_p_ptr + row).to(tl.float64)
            u = _uniform(tl.load(seed_ptr + row), tl.load(position_ptr + row))
            token = _draw(z_row, temperature, peak, key, cut, least, u, V, BLOCK)
    tl.store(ids_ptr + row, token.to(tl.int64))


@triton.jit
def summarize(
    z_ptr,  # [R, V] float32
    tokens_ptr,  # [R] int64
    maximum_ptr,  # [R] float64
    sum_ptr,  # [R] float64: Σ exp(z − maximum)
    rank_ptr,  # [R] int64, from 1
    V,
    BLOCK: tl.constexpr,
):
    """What log-probabilities of a row need. Grid: (R,)."""
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * V
    maximum, _ = _argmax(z_row, V, BLOCK)
    token = tl.load(tokens_ptr + row)
    mine = tl.load(z_row + token)
    total = tl.zeros((), tl.float64)
    rank = tl.full((), 1, tl.int64)
    for start in range(0, V, BLOCK):
        i = start + tl.arange(0, BLOCK)
        z = tl.load(z_row + i, mask=i < V, other=float("-inf"))
        total += tl.sum(tl.exp(z.to(tl.float64) - maximum.to(tl.float64)), 0)
        ahead = (z > mine) | ((z == mine) & (i < token))
        rank += tl.sum((ahead & (i < V)).to(tl.int32), 0)
    tl.store(maximum_ptr + row, maximum.to(tl.float64))
    tl.store(sum_ptr + row, total)
    tl.store(rank_ptr + row, rank)


@triton.jit
def largest(
    z_ptr,  # [R, V] float32
    ids_ptr,  # [R, count] int64
    V,
    count,
    BLOCK: tl.constexpr,
):
    """Ids of a row's largest logits in order, equals by ascending id, NaN before all. One pass an id. Grid: (R,)."""
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * V
    before = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)  # above every place
    for n in range(count):
        found = tl.full((), -0x8000000000000000, tl.int64)
        for start in range(0, V, BLOCK):
            i = start + tl.arange(0, BLOCK)
            place = _place_of(tl.load(z_row + i, mask=i < V, other=0.0), i)
            left = (place < before) & (i < V)
            found = tl.maximum(found, tl.max(tl.where(left, place, -0x8000000000000000), 0))
        tl.store(ids_ptr + row * count + n, 0x7FFFFFFF - (found & 0x7FFFFFFF))
        before = found


@triton.jit
def _place_of(z, i):
    """An int64 that orders tokens: the larger the logit, then the lower the id, the larger. No two are the same."""
    key = tl.where(z == z, _key(z), 0x7FFFFFFF)
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - i).to(tl.int64)


@triton.jit
def _block(z_row, start, V, BLOCK: tl.constexpr):
    """Ids and logits from `start`; behind the row and for nan -inf."""
    i = start + tl.arange(0, BLOCK)
    z = tl.load(z_row + i, mask=i < V, other=float("-inf"))
    return i, tl.where(z == z, z, float("-inf"))


@triton.jit
def _argmax(z_row, V, BLOCK: tl.constexpr):
    """The largest logit and the lowest id that has it."""
    maximum = tl.full((), float("-inf"), tl.float32)
    best = tl.full((), 0, tl.int32)
    for start in range(0, V, BLOCK):
        i, z = _block(z_row, start, V, BLOCK)
        top = tl.max(z, 0)
        first = tl.min(tl.where(z == top, i, V), 0)
        best = tl.where(top > maximum, first, best)
        maximum = tl.maximum(maximum, top)
    return maximum, best


@triton.jit
def _key(z):
    """An int32 that orders like the float, both zeros alike."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def _scaled(z, temperature):
    """z / temperature, one rounding."""
    return tl.div_rn(z, temperature + tl.zeros_like(z))


@triton.jit
def _weight(z, peak):
    """exp(z − peak) in float64."""
    return tl.exp(z.to(tl.float64) - peak.to(tl.float64))


@triton.jit
def _count_above(z_row, temperature, key, V, BLOCK: tl.constexpr):
    """How many keys are larger."""
    count = tl.full((), 0, tl.int32)
    for start in range(0, V, BLOCK):
        i, z = _block(z_row, start, V, BLOCK)
        above = (_key(_scaled(z, temperature)) > key) & (i < V)
        count += tl.sum(above.to(tl.int32), 0)
    return count


@triton.jit
def _sum_above(z_row, temperature, peak, above, key, cut, V, BLOCK: tl.constexpr):
    """Σ of the weights of kept tokens whose key is larger than `above` (int64)."""
    total = tl.zeros((), tl.float64)
    for start in range(0, V, BLOCK):
        i, z = _block(z_row, start, V, BLOCK)
        z = _scaled(z, temperature)
        k = _key(z)
        chosen = ((k > key) | ((k == key) & (i <= cut))) & (k.to(tl.int64) > above) & (i < V)
        if tl.max(chosen.to(tl.int32), 0) > 0:
            total += tl.sum(tl.where(chosen, _weight(z, peak), 0.0), 0)
    return total


@triton.jit
def _place(z_row, temperature, key, wanted, V, BLOCK: tl.constexpr):
    """The id of the `wanted`-th token, from 1, that has this key."""
    cut = tl.full((), 0, tl.int32)
    seen = tl.full((), 0, tl.int32)
    for start in range(0, V, BLOCK):
        i, z = _block(z_row, start, V, BLOCK)
        equal = ((_key(_scaled(z, temperature)) == key) & (i < V)).to(tl.int32)
        order = seen + tl.cumsum(equal, 0)
        cut = tl.maximum(cut, tl.max(tl.where((equal > 0) & (order <= wanted), i, 0), 0))
        seen += tl.sum(equal, 0)
    return cut


@triton.jit
def _largest(z_row, temperature, count, highest, V, BLOCK: tl.constexpr):
    """(key, cut) of the `count` largest, lower ids first among equals."""
    low = tl.full((), SMALLEST, tl.int64)  # more than count - 1 are above
    high = highest.to(tl.int64)  # fewer than count are above
    while high - low > 1:
        middle = (low + high) >> 1
        if _count_above(z_row, temperature, middle.to(tl.int32), V, BLOCK) >= count:
            low = middle
        else:
            high = middle
    key = high.to(tl.int32)
    left = count - _count_above(z_row, temperature, key, V, BLOCK)
    return key, _place(z_row, temperature, key, left, V, BLOCK)


@triton.jit
def _nucleus(z_row, temperature, peak, top_p, key, cut, V, BLOCK: tl.constexpr):
    """(key, cut) of the shortest prefix, in descending (logit, ascending id), whose weights reach top_p of the kept."""
    low = key.to(tl.int64) - 1  # the kept weights above reach the goal
    high = _key(peak).to(tl.int64)  # those above do not
    goal = top_p * _sum_above(z_row, temperature, peak, low, key, cut, V, BLOCK)
    goal = tl.maximum(goal, 1e-300)  # at least one token
    while high - low > 1:
        middle = (low + high) >> 1
        if _sum_above(z_row, temperature, peak, middle, key, cut, V, BLOCK) >= goal:
            low = middle
        else:
            high = middle
    found = high.to(tl.int32)
    bits = tl.where(found >= 0, found, found ^ 0x7FFFFFFF)
    one = _weight(bits.to(tl.float32, bitcast=True), peak)
    above = _sum_above(z_row, temperature, peak, high, key, cut, V, BLOCK)
    equals = tl.maximum(tl.ceil((goal - above) / tl.maximum(one, 1e-300)), 1.0)
    last = _place(z_row, temperature, found, tl.minimum(equals, 2147483647.0).to(tl.int32), V, BLOCK)
    return found, tl.where(found == key, tl.minimum(last, cut), last)


@triton.jit
def _draw(z_row, temperature, peak, key, cut, least, u, V, BLOCK: tl.constexpr):
    """The first kept token, in ascending id, at which the running sum of weights exceeds u of the whole."""
    total = tl.zeros((), tl.float64)
    for start in range(0, V, BLOCK):
        _, e = _kept(z_row, start, temperature, peak, key, cut, least, V, BLOCK)
        total += tl.sum(e, 0)
    goal = u * total
    token = tl.full((), -1, tl.int32)
    running = tl.zeros((), tl.float64)
    for start in range(0, V, BLOCK):
        if token < 0:
            i, e = _kept(z_row, start, temperature, peak, key, cut, least, V, BLOCK)
            after = running + tl.sum(e, 0)
            if after > goal:
                passed = (running + tl.cumsum(e, 0) > goal) & (e > 0.0)
                first = tl.min(tl.where(passed, i, V), 0)
                # The running sum may round to just below the block's: then it is the block's last.
                token = tl.where(first < V, first, tl.max(tl.where(e > 0.0, i, 0), 0))
            running = after
    return token


@triton.jit
def _kept(z_row, start, temperature, peak, key, cut, least, V, BLOCK: tl.constexpr):
    """Ids from `start` and their weights, 0 for what was not kept."""
    i, z = _block(z_row, start, V, BLOCK)
    z = _scaled(z, temperature)
    k = _key(z)
    e = _weight(z, peak)
    chosen = ((k > key) | ((k == key) & (i <= cut))) & (e >= least) & (i < V)
    return i, tl.where(chosen, e, 0.0)


@triton.jit
def _uniform(seed, position):
    """A float64 in [0, 1) from (seed, position): the top 53 bits of splitmix64(seed + splitmix64(position))."""
    mixed = _splitmix64(seed.to(tl.uint64) + _splitmix64(position.to(tl.uint64)))
    return (mixed >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _splitmix64(x):
    """The mixing function of that name, on uint64."""
    z = x + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)
