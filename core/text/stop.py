"""Stop strings in streamed text.

One Aho-Corasick automaton for all stop strings of a request (Aho & Corasick 1975): a constant
amount of work a character, however many strings there are, and its depth is exactly how much of
the text has to be held back. The result never depends on how the text was cut into chunks: the
string that is complete first wins, and of those that end together the longest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopStrings:
    """The automaton; built once a request and shared by its sequences."""

    __slots__ = ("_children", "_fallback", "depth", "match")

    def __init__(self, strings: Sequence[str]) -> None:
        self._children: list[dict[str, int]] = [{}]
        self._fallback = [0]
        self.depth = [0]
        self.match: list[str | None] = [None]
        for string in strings:
            self._insert(string)
        self._link()

    def _insert(self, string: str) -> None:
        state = 0
        for char in string:
            child = self._children[state].get(char)
            if child is None:
                child = self._children[state][char] = len(self._children)
                self._children.append({})
                self._fallback.append(0)
                self.depth.append(self.depth[state] + 1)
                self.match.append(None)
            state = child
        self.match[state] = string

    def _link(self) -> None:
        """Breadth first: a state falls back to the longest proper suffix that is a state."""
        queue = deque(self._children[0].values())
        while queue:
            state = queue.popleft()
            for char, child in self._children[state].items():
                self._fallback[child] = self.advance(self._fallback[state], char)
                if self.match[child] is None:
                    self.match[child] = self.match[self._fallback[child]]
                queue.append(child)

    def advance(self, state: int, char: str) -> int:
        while state and char not in self._children[state]:
            state = self._fallback[state]
        return self._children[state].get(char, 0)


class StopMatcher:
    """Finds the first stop string in one sequence's text, and holds back what may become one.

    After a match `matched` is the string; nothing may be fed any more.
    """

    __slots__ = ("_held", "_include", "_state", "_strings", "matched")

    def __init__(self, strings: StopStrings, include: bool = False) -> None:
        self._strings = strings
        self._include = include
        self._state = 0
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str, *, armed: bool = True) -> str:
        """The text that can be shown now. Not `armed` (below `min_tokens`): ends are ignored."""
        strings, state = self._strings, self._state
        offset = len(self._held)
        pending = self._held + text
        for position, char in enumerate(text, start=offset + 1):
            state = strings.advance(state, char)
            found = strings.match[state]
            if found is not None and armed:
                self.matched = found
                self._held = ""
                return pending[: position if self._include else position - len(found)]
        self._state = state
        shown = len(pending) - (0 if self._include else strings.depth[state])
        self._held = pending[shown:]
        return pending[:shown]

    def flush(self) -> str:
        """What was held back, once nothing can follow."""
        held, self._held = self._held, ""
        return held
