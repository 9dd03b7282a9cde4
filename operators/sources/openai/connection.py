"""uvicorn's connection, with what it leaves out: limits of time, size and number, and who listens for its end."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from .errors import HTTPError
from .http_date import http_date

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("sageLLM.http")
_uvicorn_log = logging.getLogger("sageLLM.http.uvicorn")
_uvicorn_log.setLevel(logging.ERROR)  # it warns of each connection that says garbage

_UPGRADE = re.compile(rb"\r\nupgrade:[^\r\n]*", re.IGNORECASE)
MAX_HEAD_BYTES = 64 * 1024
_REQUESTS_IN_A_ROW = 64  # that wait for their turn on one connection
_READ_AT_ONCE = 256 * 1024  # by the event loop: what comes with a head may be a body


@dataclass(frozen=True, slots=True)
class Limits:
    """`read_timeout_s` is for a request's head; what it is for a body is the endpoint's business."""

    max_connections: int
    read_timeout_s: float


class ServerConfig(uvicorn.Config):
    """uvicorn's configuration with our limits, and whom to tell that a connection has gone."""

    limits: Limits
    on_lost: Callable[[], None]


class _Transport:
    """asyncio's transport, which can keep what is written for the next write: each of its own costs a system call."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._write = transport.write
        self.is_closing = transport.is_closing
        self._kept = b""
        self.keeps = False  # the next write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if self._kept:
            data, self._kept = self._kept + data, b""
        if self.keeps:
            self._kept, self.keeps = data, False
        else:
            self._write(data)


class Connection(HttpToolsProtocol):
    """One client. A request finds it under `scope["state"]["connection"]`."""

    config: ServerConfig
    transport: Any  # a _Transport

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logger = _uvicorn_log
        self._on_lost: Callable[[], None] | None = None
        self._answering: RequestResponseCycle | None = None  # of several requests in a row `cycle` is the last one
        self._read_timer: Any = None
        self._head_bytes = 0
        self._in_head = False
        self._in_body = False  # or in none, at the end of the head
        self._in_chunks = True  # a stream's answer

    # -- for the endpoints -------------------------------------------------------------------------------------------

    @property
    def is_stalled(self) -> bool:
        """Whether its client reads more slowly than is written."""
        return self.flow.write_paused

    @property
    def has_body(self) -> bool:
        """Whether all of the request is here."""
        return not self._in_body

    def keep_next_write(self) -> None:
        """What is written next goes out with what is written after it: a head with its body."""
        self.transport.keeps = True

    def begin_stream(self) -> bool:
        """Whether an answer of unknown length comes in chunks. To HTTP/1.0, which knows none, it ends with the
        connection."""
        self._in_chunks = self.cycle.scope["http_version"] != "1.0"
        if not self._in_chunks:
            self.cycle.chunked_encoding = False
        return self._in_chunks

    def write_chunk(self, data: bytes) -> None:
        """Send a part of a streamed answer that has begun, never waiting: look at `is_stalled` before.

        It does what the application's `send` does, which wants a task for every write.
        """
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._in_chunks else data)

    def expect(self, data: bytes) -> None:
        """The application's `send` is about to be given a part of a streamed answer."""
        if not self._in_chunks:
            self.cycle.expected_content_length = len(data)

    def on_lost(self, listener: Callable[[], None] | None) -> None:
        """Whom to tell when the client goes away; one at a time, as one request at a time is answered."""
        self._on_lost = listener
        if listener is not None and self.transport.is_closing():
            listener()

    def cut(self, reason: str) -> None:
        """Close it at once; what has been written and not read is lost."""
        log.info("connection of %s cut: %s", self.client, reason)
        self._tell_lost()
        self.transport.abort()

    # -- asyncio's protocol ------------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        keeping: Any = _Transport(transport)
        super().connection_made(keeping)
        if len(self.connections) > self.config.limits.max_connections:
            self._refuse(HTTPError(503, "too many connections: try again later", "too_many_connections"))
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._tell_lost()
        super().connection_lost(exc)
        self._stop_timer()
        if self._on_lost is not None:
            self._on_lost()
        self.config.on_lost()

    def _tell_lost(self) -> None:
        if self._answering is not None:
            self._answering.disconnected = True

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def data_received(self, data: bytes) -> None:
        if not self._in_body:
            data = _without_upgrade(data)
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES + _READ_AT_ONCE:
                self._refuse(HTTPError(431, f"the headers have more than {MAX_HEAD_BYTES} bytes", "headers_too_large"))
                return
        super().data_received(data)
        awaits_head = not self._in_body and (self._in_head or self._is_idle)
        if awaits_head and self._read_timer is None and not self.transport.is_closing():
            self._await_head()  # also after blank lines, or a body that came late: uvicorn's own timer has been stopped

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= _REQUESTS_IN_A_ROW:
            raise ValueError("requests came before those before them were answered")
        super().on_message_begin()
        self._in_head = True
        self.scope["state"]["connection"] = self

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_body:  # else it is a trailer, which nobody reads
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._head_bytes = 0
        self._in_head, self._in_body = False, True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._stop_timer()
        self._in_body = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_body and not self.transport.is_closing():
            self._await_head()  # the rest of a body that nobody has asked for

    def send_400_response(self, msg: str) -> None:
        self._refuse(HTTPError(400, "what came is not HTTP", "invalid_http"))

    # -- heads -------------------------------------------------------------------------------------------------------

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _await_head(self) -> None:
        self._stop_timer()
        self._read_timer = self.loop.call_later(self.config.limits.read_timeout_s, self._head_is_late)

    def _stop_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _head_is_late(self) -> None:
        self._read_timer = None
        if not self._is_idle:
            self._await_head()  # what it has been asked for before comes first
            return
        seconds = self.config.limits.read_timeout_s
        self._refuse(HTTPError(408, f"no request came within {seconds:g} s", "read_timeout"))

    def _refuse(self, error: HTTPError) -> None:
        """Answer what is no request that an endpoint could see, and close."""
        if self._is_idle and not self._in_body and not self.transport.is_closing():
            self.transport.write(
                b"HTTP/1.1 %d %b\r\ndate: %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
                b"connection: close\r\n\r\n%b"
                % (error.status, HTTPStatus(error.status).phrase.encode(), http_date(), len(error.body), error.body)
            )
        self.transport.close()


def _without_upgrade(data: bytes) -> bytes:
    """A head that asks for another protocol, as Java's client does for HTTP/2, without that: the parser would take the
    body for the other protocol's."""
    if b"pgrade" not in data:
        return data
    head, end, rest = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"", head) + end + rest
