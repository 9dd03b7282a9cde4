"""What earlier runs of this flow finished: published by sinks when they open, read by sources before they run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class LineSet:
    """A set of line numbers, one bit each: 100 million lines take 12.5 MB."""

    __slots__ = ("_bits",)

    def __init__(self) -> None:
        self._bits = bytearray()

    def add(self, line: int) -> None:
        byte = line >> 3
        if byte >= len(self._bits):
            self._bits.extend(bytes(max(byte + 1 - len(self._bits), len(self._bits) // 4, 64)))
        self._bits[byte] |= 1 << (line & 7)

    def update(self, other: LineSet) -> None:
        size = max(len(self._bits), len(other._bits))
        union = int.from_bytes(self._bits, "little") | int.from_bytes(other._bits, "little")
        self._bits = bytearray(union.to_bytes(size, "little"))

    def __contains__(self, line: int) -> bool:
        byte = line >> 3
        return byte < len(self._bits) and bool(self._bits[byte] >> (line & 7) & 1)

    def __len__(self) -> int:
        return int.from_bytes(self._bits, "little").bit_count()


@dataclass(slots=True)
class FinishedLines:
    """The lines of one input, as one name and one content, that stand in the outputs."""

    file: str
    fingerprint: str
    lines: LineSet = field(default_factory=LineSet)
    outputs: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class SentLines:
    """Up to which line a source has sent, of which content."""

    fingerprint: str
    last_line: int


class ResumeIndex:
    """The finished lines of every input of a flow. One object for all operators of a flow.

    The flow opens every operator before it runs any, and sinks before sources, so the index is complete when a source
    reads it. A line is finished when it stands in the output of any sink.
    """

    def __init__(self) -> None:
        self._inputs: dict[tuple[str, str], FinishedLines] = {}
        self.sent: dict[str, SentLines] = {}  # by the source's name; for the instance that follows a failed one

    def entry(self, file: str, fingerprint: str) -> FinishedLines:
        """The finished lines of that input, an empty entry if there are none yet."""
        key = (file, fingerprint)
        found = self._inputs.get(key)
        if found is None:
            found = self._inputs[key] = FinishedLines(file, fingerprint)
        return found

    def publish(self, finished: ResumeIndex) -> None:
        """Add what one output holds."""
        for theirs in finished:
            ours = self.entry(theirs.file, theirs.fingerprint)
            ours.lines.update(theirs.lines)
            ours.outputs |= theirs.outputs

    def __iter__(self) -> Iterator[FinishedLines]:
        return iter(list(self._inputs.values()))
