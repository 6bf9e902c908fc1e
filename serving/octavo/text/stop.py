"""Stop strings: found across token borders, several at a time, one step a character.

`StopStrings` is one automaton per request (Aho and Corasick), immutable and shared by its choices; `StopMatcher` is
the state of one sequence. The match that is completed first wins; of several that end at one character the longest.
So what matches depends on the text alone, not on how tokens cut it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class StopStrings:
    """The automaton. Node 0 is the root; `depth[node]` characters of the text may be the beginning of a stop string."""

    def __init__(self, stops: Iterable[str]) -> None:
        self.edges: list[dict[str, int]] = [{}]
        self.depth = [0]
        self.fail = [0]
        self.matched = [""]  # longest stop string that ends here
        for stop in stops:
            self._add(stop)
        self._link()
        self.first = frozenset(self.edges[0])

    def _add(self, stop: str) -> None:
        node = 0
        for character in stop:
            if character not in self.edges[node]:
                self.edges[node][character] = len(self.edges)
                self.edges.append({})
                self.depth.append(self.depth[node] + 1)
                self.fail.append(0)
                self.matched.append("")
            node = self.edges[node][character]
        self.matched[node] = stop

    def _link(self) -> None:
        """Breadth first: where to go on when the next character does not fit."""
        queue = deque(self.edges[0].values())
        while queue:
            node = queue.popleft()
            for character, child in self.edges[node].items():
                queue.append(child)
                self.fail[child] = self.step(self.fail[node], character)
                self.matched[child] = self.matched[child] or self.matched[self.fail[child]]

    def step(self, node: int, character: str) -> int:
        while True:
            following = self.edges[node].get(character)
            if following is not None:
                return following
            if not node:
                return 0
            node = self.fail[node]


class StopMatcher:
    """Where one sequence's text stands in the automaton."""

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._node = 0

    @property
    def num_held(self) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        return self._stops.depth[self._node]

    def feed(self, text: str, *, ignore: bool = False) -> tuple[int, str] | None:
        """Go over `text`; (how many of its characters end the first match, the stop string), if there is one."""
        stops, node = self._stops, self._node
        if not node and stops.first.isdisjoint(text):
            return None
        for index, character in enumerate(text):
            node = stops.step(node, character)
            if stops.matched[node] and not ignore:
                self._node = 0
                return index + 1, stops.matched[node]
        self._node = node
        return None
