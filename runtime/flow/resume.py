"""What earlier runs of this flow finished: published by sinks when they open, read by sources before they run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator
    from pathlib import Path

    from ...graph.pipeline import Edge


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
        self._set(int.from_bytes(self._bits, "little") | int.from_bytes(other._bits, "little"))

    def intersect(self, other: LineSet) -> None:
        self._set(int.from_bytes(self._bits, "little") & int.from_bytes(other._bits, "little"))

    def _set(self, bits: int) -> None:
        self._bits = bytearray(bits.to_bytes(-(-bits.bit_length() // 8), "little"))

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


def is_same_file(base_dir: Path, recorded: str, path: str) -> bool:
    """Whether two ways to write a path lead to the same file."""
    other = base_dir / recorded
    return recorded == path or (other.exists() and other.samefile(base_dir / path))


class ResumeIndex:
    """The finished lines of every input of a flow. One object for all operators of a flow.

    The flow opens every operator before it runs any, and sinks before sources, so the index is complete when a source
    reads it. What leaves an operator takes one of its ports, and there each of its edges: a line is finished when it
    stands in the outputs that one such way through the flow ends in. Edges that lead to no file count for nothing.
    """

    def __init__(self, edges: Iterable[Edge] = ()) -> None:
        self._ways: dict[str, dict[str, list[str]]] = {}  # by operator and port: the operators behind it
        for edge in edges:
            self._ways.setdefault(edge.source, {}).setdefault(edge.source_port, []).append(edge.target)
        self._inputs: dict[tuple[str, str], FinishedLines] = {}
        self._outputs: dict[str, ResumeIndex] = {}  # by the sink's name
        self.sent: dict[str, SentLines] = {}  # by the source's name; for the instance that follows a failed one

    def entry(self, file: str, fingerprint: str) -> FinishedLines:
        """The lines of that input that stand in any output, an empty entry if there are none yet."""
        key = (file, fingerprint)
        found = self._inputs.get(key)
        if found is None:
            found = self._inputs[key] = FinishedLines(file, fingerprint)
        return found

    def lines_of(self, files: Collection[str], fingerprint: str) -> LineSet:
        """The lines that stand in any output, of an input that goes by these names."""
        lines = LineSet()
        for file in files:
            if (file, fingerprint) in self._inputs:
                lines.update(self._inputs[file, fingerprint].lines)
        return lines

    def names_of(self, path: str, fingerprint: str, base_dir: Path) -> list[str]:
        """Under which names the outputs know the input at `path` with that content.

        Another name is the same input's if it leads to the same file, or to none: then the file was renamed. A copy
        that is still there is another input.
        """
        return [
            entry.file
            for entry in self
            if entry.fingerprint == fingerprint
            and (is_same_file(base_dir, entry.file, path) or not (base_dir / entry.file).exists())
        ]

    def publish(self, finished: ResumeIndex, sink: str) -> None:
        """Add what one output, which the sink of that name writes, holds."""
        self._outputs[sink] = finished
        for theirs in finished:
            ours = self.entry(theirs.file, theirs.fingerprint)
            ours.lines.update(theirs.lines)
            ours.outputs |= theirs.outputs

    def lines_finished(self, source: str, files: Collection[str], fingerprint: str) -> LineSet:
        """The lines of an input, which goes by these names, that the source of that name need not send again."""
        found = self._lines_behind(source, files, fingerprint, {})
        return self.lines_of(files, fingerprint) if found is None else found

    def _lines_behind(
        self, name: str, files: Collection[str], fingerprint: str, known: dict[str, LineSet | None]
    ) -> LineSet | None:
        """None where no edge leads to an output."""
        if name in known:
            return known[name]
        ways: list[LineSet] = []
        if name in self._outputs:
            ways = [self._outputs[name].lines_of(files, fingerprint)]
        for targets in self._ways.get(name, {}).values():
            behind = [self._lines_behind(target, files, fingerprint, known) for target in targets]
            copies = [lines for lines in behind if lines is not None]
            if copies:
                ways.append(LineSet())
                ways[-1].update(copies[0])
                for lines in copies[1:]:
                    ways[-1].intersect(lines)
        if not ways:
            known[name] = None
            return None
        finished = LineSet()
        for lines in ways:
            finished.update(lines)
        known[name] = finished
        return finished

    def __iter__(self) -> Iterator[FinishedLines]:
        return iter(list(self._inputs.values()))
