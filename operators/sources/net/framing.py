"""Messages in a stream of bytes, without any I/O: the bytes of a peer go in, its messages come out, and back.

Two framings: JSON lines, and MessagePack behind a length of 4 bytes, big-endian. websocket.py has the third.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgpack
from pydantic_core import to_json

from ..lines import LineSplitter

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..lines import Line

_BOM = b"\xef\xbb\xbf"
_LENGTH = 4  # bytes before a MessagePack message


class Frame(NamedTuple):
    """One message of a peer, not decoded yet; `error` is set where it is none, and `data` is its beginning then."""

    number: int  # 1-based: of the line, or of the message
    data: bytes
    is_msgpack: bool
    error: str | None = None


class Framing:
    """What a connection needs to know of how its messages are framed.

    `may_half_close`: a peer that has ended its side may still read. `pings`: the protocol has its own way to ask
    whether the peer is there.
    """

    may_half_close = True
    pings = False

    @property
    def is_ready(self) -> bool:
        """Whether messages may be sent."""
        return True

    @property
    def is_closed(self) -> bool:
        """Whether the peer neither sends nor reads messages any more."""
        return False

    @property
    def has_said_goodbye(self) -> bool:
        """Whether the peer expects the stream to be closed."""
        return False

    def receive(self, data: bytes) -> list[Frame]:
        """The messages that are complete with these bytes; empty ones are left out."""
        raise NotImplementedError

    def end(self) -> list[Frame]:
        """What is left when the peer has ended its side."""
        raise NotImplementedError

    def encode(self, fields: dict[str, Any], as_msgpack: bool) -> bytes:
        """One message to the peer; nothing where it would not be read any more."""
        raise NotImplementedError

    def refuse(self, fields: dict[str, Any]) -> bytes:
        """The only message to a peer that is not served."""
        return self.encode(fields, self.writes_msgpack)

    def data_to_send(self) -> bytes:
        """What the protocol itself has to answer."""
        return b""

    def goodbye(self, reason: str) -> bytes:
        """The last bytes to the peer."""
        return b""

    def ping(self) -> bytes:
        """What a peer that is there answers; nothing before it is ready."""
        return b""

    @property
    def writes_msgpack(self) -> bool:
        """How what belongs to no request is written."""
        return False


def encode_line(fields: dict[str, Any]) -> bytes:
    """A line of JSON; numbers that JSON does not have are null."""
    return to_json(fields, inf_nan_mode="null") + b"\n"


def encode_msgpack(fields: dict[str, Any]) -> bytes:
    """MessagePack, without the length before it."""
    packed: bytes = msgpack.packb(fields)
    return packed


class JsonLines(Framing):
    """One JSON object a line. A line above `max_message_bytes` is skipped up to its newline."""

    def __init__(self, max_message_bytes: int) -> None:
        self._max = max_message_bytes
        self._lines = LineSplitter(max_message_bytes)

    def receive(self, data: bytes) -> list[Frame]:
        return self._frames(self._lines.feed(data))

    def end(self) -> list[Frame]:
        return self._frames(self._lines.finish())

    def _frames(self, lines: list[Line]) -> list[Frame]:
        frames = []
        for line in lines:
            if line.oversize:
                error = f"the line has {line.size} bytes, max_message_bytes is {self._max}"
                frames.append(Frame(line.number, line.data, False, error))
                continue
            data = line.data.removeprefix(_BOM) if line.number == 1 else line.data
            if data.strip():
                frames.append(Frame(line.number, data, False))
        return frames

    def encode(self, fields: dict[str, Any], as_msgpack: bool) -> bytes:
        return encode_line(fields)


class LengthPrefixed(Framing):
    """MessagePack maps, each behind its length. One above `max_message_bytes` is skipped, not kept."""

    def __init__(self, max_message_bytes: int) -> None:
        self._max = max_message_bytes
        self._buffer = bytearray()
        self._skip = 0  # bytes of a message that is too long
        self._number = 0

    @property
    def writes_msgpack(self) -> bool:
        return True

    def receive(self, data: bytes) -> list[Frame]:
        skipped = min(self._skip, len(data))
        self._skip -= skipped
        self._buffer += memoryview(data)[skipped:]
        frames, start = [], 0
        while len(self._buffer) - start >= _LENGTH:
            size = int.from_bytes(self._buffer[start : start + _LENGTH])
            begin, end = start + _LENGTH, start + _LENGTH + size
            if size <= self._max and len(self._buffer) < end:
                break
            self._number += 1
            if size > self._max:
                error = f"the message has {size} bytes, max_message_bytes is {self._max}"
                frames.append(Frame(self._number, b"", True, error))
                self._skip = max(0, end - len(self._buffer))
            elif size:
                frames.append(Frame(self._number, bytes(self._buffer[begin:end]), True))
            start = min(end, len(self._buffer))
        del self._buffer[:start]
        return frames

    def end(self) -> list[Frame]:
        if not (self._buffer or self._skip):
            return []
        number = self._number + (not self._skip)
        self._buffer.clear()
        return [Frame(number, b"", True, "the stream ended inside a message")]

    def encode(self, fields: dict[str, Any], as_msgpack: bool) -> bytes:
        packed = encode_msgpack(fields)
        return len(packed).to_bytes(_LENGTH) + packed


FRAMINGS: dict[str, Callable[[int], Framing]] = {"json_lines": JsonLines, "msgpack": LengthPrefixed}
