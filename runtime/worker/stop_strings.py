"""Finds stop strings in the text of one running choice, token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence


class TextDecoder(Protocol):
    """Turns token ids into text piece by piece; holds back bytes that do not yet make a character."""

    def push(self, ids: list[int]) -> str:
        """The text that these tokens add; may be empty."""
        ...


class StopStringMatcher:
    """Watches the output of one choice. It keeps only as much text as a stop string could still begin in.

    A stop string that is complete before `min_tokens` tokens are there does not count. Guarantee: the token reported
    is the first at which decoded text contains a stop string, wherever token borders lie.
    """

    def __init__(self, decoder: TextDecoder, stop: Sequence[str], min_tokens: int = 0) -> None:
        """Start before the first output token.

        Raises:
            ValueError: `stop` is empty or holds an empty string.
        """
        if not stop or "" in stop:
            raise ValueError(f"stop is {list(stop)!r}, write at least one string and no empty one")
        self._decoder = decoder
        self._stop = tuple(stop)
        self._keep = max(map(len, self._stop)) - 1
        self._tail = ""
        self._too_early = min_tokens - 1

    def push(self, tokens: Sequence[int]) -> tuple[int, str] | None:
        """Read the next output tokens, in order, until a stop string is complete.

        Returns the index in `tokens` of the token that completed it, and the stop string: of several the one that
        begins first in the text, then the one named first. The tokens after it are not read.
        """
        for index, token in enumerate(tokens):
            piece = self._decoder.push([token])
            self._too_early -= 1
            if not piece:
                continue
            text = self._tail + piece
            if self._too_early < 0:
                matched = self._find(text, len(self._tail))
                if matched is not None:
                    return index, matched
            self._tail = text[-self._keep :] if self._keep else ""
        return None

    def _find(self, text: str, old: int) -> str | None:
        """The first stop string that ends after the first `old` characters."""
        best, best_start = None, len(text)
        for stop in self._stop:
            start = text.find(stop, max(0, old - len(stop) + 1))
            if 0 <= start < best_start:
                best, best_start = stop, start
        return best
