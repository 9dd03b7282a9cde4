"""Messages between a worker and its process: pickled, whole and in order, over a socket pair."""

from __future__ import annotations

import pickle
import select
import socket
import struct
import time
from typing import Any

_HEADER = struct.Struct("<Q")
_MAX_DESCRIPTORS = 8  # with one message
_BUFFER_BYTES = 4 << 20  # a plan and a result fit, so that a send seldom waits for the other side


class Channel:
    """One end. One thread may send while another receives."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)

    def send(self, message: Any, timeout_s: float | None = None, descriptors: tuple[int, ...] = ()) -> None:
        """Send a message, and open files with it; the caller keeps its own descriptors of them.

        Raises:
            OSError: the other end is closed, or (TimeoutError) does not take the message in time.
        """
        payload = pickle.dumps(message, protocol=5)
        self._socket.settimeout(timeout_s)
        data = _HEADER.pack(len(payload)) + payload
        sent = socket.send_fds(self._socket, [data], descriptors) if descriptors else self._socket.send(data)
        if sent < len(data):
            self._socket.sendall(memoryview(data)[sent:])

    def receive(self, timeout_s: float | None = None) -> tuple[Any, list[int]]:
        """Wait for a message; return it with the descriptors that came with it, which the caller owns.

        Raises:
            EOFError: the other end is closed.
            OSError: it was reset, or (TimeoutError) nothing came in time.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._socket.settimeout(timeout_s)
        header, descriptors, _, _ = socket.recv_fds(self._socket, _HEADER.size, _MAX_DESCRIPTORS)
        header += self._receive(_HEADER.size - len(header), deadline) if header else b""
        if not header:
            raise EOFError
        return pickle.loads(self._receive(_HEADER.unpack(header)[0], deadline)), descriptors

    def _receive(self, size: int, deadline: float | None) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            if deadline is not None:
                self._socket.settimeout(max(1e-3, deadline - time.monotonic()))
            count = self._socket.recv_into(view)
            if not count:
                raise EOFError
            view = view[count:]
        return data

    def has_message(self) -> bool:
        """Whether `receive` would return, or raise, at once."""
        return bool(select.select([self._socket], [], [], 0)[0])

    def close(self) -> None:
        self._socket.close()
