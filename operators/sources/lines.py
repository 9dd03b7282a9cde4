"""Cut a stream of bytes into numbered lines, in memory bounded by the longest line allowed."""

from __future__ import annotations

from typing import NamedTuple

RAW_LIMIT = 2048  # bytes of a bad line that its dead letter shows


class Line(NamedTuple):
    """One line without its newline. `data` is only the first `RAW_LIMIT` bytes where the line is `oversize`."""

    number: int  # 1-based
    offset: int  # of its first byte
    data: bytes
    size: int  # bytes in the stream
    oversize: bool

    def raw(self) -> str:
        """The line as text for a dead letter: bytes that are not UTF-8 escaped, cut after `RAW_LIMIT` bytes."""
        text = self.data[:RAW_LIMIT].decode("utf-8", "backslashreplace")
        return text if self.size <= RAW_LIMIT else f"{text}... ({self.size} bytes)"


class LineSplitter:
    """Give it chunks, get the lines that are complete; a line above `max_line_bytes` is skipped, not kept."""

    def __init__(self, max_line_bytes: int) -> None:
        self._max = max_line_bytes
        self._number = 1
        self._offset = 0
        self._size = 0
        self._begun = bytearray()  # of the line; not as it came, which may have been byte by byte

    def feed(self, chunk: bytes) -> list[Line]:
        first, *rest = chunk.split(b"\n")
        self._append(first)
        lines = []
        for part in rest:
            lines.append(self._cut(newline=1))
            self._append(part)
        return lines

    def finish(self) -> list[Line]:
        """The last line, if the stream did not end with a newline."""
        return [self._cut(newline=0)] if self._size else []

    def _append(self, part: bytes) -> None:
        self._size += len(part)
        self._begun += part
        if self._size > self._max:
            del self._begun[RAW_LIMIT:]

    def _cut(self, newline: int) -> Line:
        line = Line(self._number, self._offset, bytes(self._begun), self._size, self._size > self._max)
        self._number += 1
        self._offset += self._size + newline
        self._size = 0
        self._begun.clear()
        return line
