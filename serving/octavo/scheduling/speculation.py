"""How many tokens to guess for a sequence, from what guesses cost and how often they came true. Engine thread only.

Prompt lookup: if the newest tokens occurred before, what followed them then is drafted now. A draft is verified by one
ordinary step over the newest token and the draft; it never changes what a sequence says, only how many steps that
takes. So all that is decided here, from measured times too, is a matter of speed. Knows no blocks and no plans.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from octavo.scheduling.ngrams import NgramIndex

INDEX_TOKENS = 1024  # that one step takes in for one sequence: a long prompt is indexed over several steps
LONG_MATCH = 8  # tokens; longer matches are trusted apart from shorter ones
DECAY = 0.9  # weight of what earlier drafts showed, per draft
MARGIN = 1.25  # a draft must gain this much of what it costs
LEAST_GAIN = 0.02  # of a step; what planning without a step ahead may cost
FIRST_PAUSE, LONGEST_PAUSE = 32, 1024  # tokens until a sequence that did not gain tries again
TRIAL_TOKENS = 3  # of such a try
TRIAL_MATCH = 6  # tokens that must match for it
TRIAL_RATE = 0.9  # what it hopes for
ROW_SHARE = 0.05  # what a row adds where nothing is known, as a share of a step of one row
STALE_STEPS = 4096  # a time that old is forgotten


@dataclass(slots=True)
class _Record:
    """Drafted tokens that were tried, and those that came true; older drafts weigh less."""

    tried: float
    accepted: float

    @property
    def rate(self) -> float:
        return self.accepted / self.tried

    def add(self, *, drafted: int, accepted: int) -> None:
        self.tried = self.tried * DECAY + min(accepted + 1, drafted)
        self.accepted = self.accepted * DECAY + accepted


@dataclass(slots=True)
class Speculation:
    """What is kept for one sequence that speculates."""

    index: NgramIndex = field(default_factory=NgramIndex)
    short: _Record = field(default_factory=lambda: _Record(2.0, 1.0))
    long: _Record = field(default_factory=lambda: _Record(5.0, 4.0))
    match: int = 0  # length of the match behind the draft under way
    pause: int = FIRST_PAUSE
    resume_at: int = 0  # tokens at which it may try again

    def record_of(self, match: int) -> _Record:
        return self.long if match >= LONG_MATCH else self.short

    def learn(self, *, drafted: int, accepted: int) -> None:
        """A draft was verified."""
        self.record_of(self.match).add(drafted=drafted, accepted=accepted)
        if 2 * accepted >= drafted:
            self.pause = FIRST_PAUSE


class StepCosts:
    """Measured seconds of steps by number of rows: one moving mean per power of two."""

    def __init__(self) -> None:
        self._means: dict[int, list[float]] = {}  # bits of the number of rows: rows, seconds, when last measured
        self._now = 0

    def measured(self, rows: int, seconds: float) -> None:
        self._now += 1
        mean = self._means.setdefault(rows.bit_length(), [float(rows), seconds, 0.0])
        mean[0] += 0.1 * (rows - mean[0])
        mean[1] += 0.1 * (min(seconds, 4 * mean[1]) - mean[1])  # one step that was held up says little
        mean[2] = self._now
        if self._now % STALE_STEPS == 0:
            self._means = {size: mean for size, mean in self._means.items() if mean[2] > self._now - STALE_STEPS}

    def curve(self) -> list[tuple[float, float]]:
        """Points (rows, seconds) in ascending order; seconds never fall. At least one."""
        points: list[tuple[float, float]] = []
        for _, (rows, seconds, _) in sorted(self._means.items()):
            points.append((rows, max(seconds, points[-1][1] if points else 0.0)))
        return points or [(1.0, 1.0)]


def interpolate(points: list[tuple[float, float]], rows: int) -> float:
    """Seconds of a step of `rows`: between known points on a line, beyond them by ROW_SHARE."""
    first_rows, first_seconds = points[0]
    slope = ROW_SHARE * first_seconds / (1.0 + ROW_SHARE * (first_rows - 1.0))
    if rows <= first_rows:
        return first_seconds - slope * (first_rows - rows)
    for (low, seconds), (high, after) in pairwise(points):
        if rows <= high:
            return seconds + (after - seconds) * (rows - low) / (high - low)
    last_rows, last_seconds = points[-1]
    return last_seconds + slope * (rows - last_rows)


@dataclass(slots=True)
class DraftBudget:
    """One step's drafts as they are handed out."""

    points: list[tuple[float, float]]
    num_sequences: int
    rows: int  # of the step, drafts so far included
    gain: float = 0.0  # expected, in steps

    @property
    def can_pay(self) -> bool:
        """Whether a token that is sure to come true would be worth its row."""
        return self.best(1.0, 1)[0] > 0

    @property
    def pays(self) -> bool:
        """Whether the drafts so far gain more than not planning ahead costs."""
        return self.gain >= LEAST_GAIN

    def best(self, rate: float, most: int) -> tuple[int, float]:
        """The most useful length of one more draft whose tokens come true at `rate`, and its gain.

        The gain is tokens per token that the step makes anyway, less the time that the rows add to it.
        """
        now = interpolate(self.points, self.rows)
        best, best_gain, expected, chance = 0, 0.0, 0.0, 1.0
        for count in range(1, most + 1):
            chance *= rate
            expected += chance
            added = interpolate(self.points, self.rows + count) / now - 1.0
            gain = expected / self.num_sequences - MARGIN * added
            if gain > best_gain:
                best, best_gain = count, gain
        return best, best_gain

    def take(self, count: int, gain: float) -> None:
        self.rows += count
        self.gain += gain


class Drafter:
    """Decides what is drafted."""

    def __init__(self) -> None:
        self.costs = StepCosts()

    def budget(self, *, num_sequences: int, rows: int) -> DraftBudget:
        return DraftBudget(self.costs.curve(), num_sequences, rows)

    def propose(
        self, state: Speculation, token_ids: list[int], *, pending: bool, most: int, budget: DraftBudget
    ) -> list[int]:
        """At most `most` tokens that may follow `token_ids`, or the one being sampled if `pending`; often none."""
        if not state.index.extend(token_ids, most=INDEX_TOKENS) or most < 1:
            return []
        match, follows = state.index.lookup(token_ids, most + pending)
        if not match:
            return []
        rate = state.record_of(match).rate
        count, gain = budget.best(rate, most)
        if not count or gain < LEAST_GAIN / budget.num_sequences:
            count, gain = self._trial(state, len(token_ids), match, most, budget)
            if not count:
                return []
        state.match = match
        budget.take(count, gain)
        return follows[pending : pending + count]

    def _trial(
        self, state: Speculation, num_tokens: int, match: int, most: int, budget: DraftBudget
    ) -> tuple[int, float]:
        """A short draft of a sequence that does not gain, now and then: its text may have changed."""
        if not state.resume_at:
            state.resume_at = num_tokens + state.pause
        if num_tokens < state.resume_at or match < TRIAL_MATCH:
            return 0, 0.0
        count = min(TRIAL_TOKENS, most)
        gain = budget.best(TRIAL_RATE, count)[1]
        if gain < LEAST_GAIN:
            return 0, 0.0
        state.pause = min(2 * state.pause, LONGEST_PAUSE)
        state.resume_at = num_tokens + state.pause
        return count, gain
