"""One call of an endpoint: its headers, its body, and its answer."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import anyio

from .errors import HTTPError
from .http_date import http_date

if TYPE_CHECKING:
    from collections.abc import Iterable, MutableMapping

    from ..net.keys import Key
    from .connection import Connection
    from .service import Service

_JSON = b"application/json"
_MAX_ID = 128
STREAM_HEADERS = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
                  (b"x-accel-buffering", b"no"))  # fmt: skip


class Call:
    """`request_id` is what the header X-Request-Id says, or a new one; every answer carries it."""

    def __init__(self, service: Service, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        self.service = service
        self.path: str = scope["path"]
        self.method: str = scope["method"]
        self.connection: Connection = scope["state"]["connection"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.key: Key | None = None
        self.started = False  # the status is out: errors can only be told in the stream
        self._receive = receive
        self._send = send
        self.rest = ""  # of the path, where the endpoint's ends in a name
        given = self.headers.get(b"x-request-id")
        self._has_id = given is not None
        self.request_id = secrets.token_hex(16) if given is None else given.decode("latin-1")

    def check_headers(self) -> None:
        """Take no id that could not be sent back.

        Raises:
            HTTPError: 400.
        """
        given = self.request_id
        if not (0 < len(given) <= _MAX_ID and given.isascii() and given.isprintable()):
            self.request_id = secrets.token_hex(16)
            raise HTTPError(400, f"X-Request-Id: write 1 to {_MAX_ID} printable ASCII characters", "invalid_header")

    def name_after(self, prefix: str) -> None:
        """Begin the id with this, if it is a new one."""
        if not self._has_id:
            self.request_id = prefix + self.request_id

    # -- the request -------------------------------------------------------------------------------------------------

    async def read_json(self) -> bytes:
        """The body, which says that it is JSON.

        Raises:
            HTTPError: 413, 415, or 408 if it does not come within `read_timeout_s`.
        """
        kind = self.headers.get(b"content-type", b"")
        if kind != _JSON and kind.partition(b";")[0].strip().lower() != _JSON:
            found = kind.decode("latin-1") or "none"
            raise HTTPError(415, f"Content-Type: found {found}, write application/json", "unsupported_media_type")
        coding = self.headers.get(b"content-encoding", b"identity")
        if coding.lower() != b"identity":
            found = coding.decode("latin-1")
            raise HTTPError(415, f"Content-Encoding: found {found}, send the body as it is", "unsupported_media_type")
        limit = self.service.config.max_body_bytes
        if int(self.headers.get(b"content-length", b"0")) > limit:
            raise self._too_large(limit)
        if self.connection.has_body:
            return await self._read_body(limit)
        with anyio.move_on_after(self.service.config.read_timeout_s):
            return await self._read_body(limit)
        seconds = self.service.config.read_timeout_s
        raise HTTPError(408, f"the body did not come within {seconds:g} s", "read_timeout", headers=[_CLOSE])

    async def _read_body(self, limit: int) -> bytes:
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await self._receive()
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit:
                raise self._too_large(limit)
            more = message.get("more_body", False)
        return b"".join(parts)

    def _too_large(self, limit: int) -> HTTPError:
        return HTTPError(413, f"the body has more than {limit} bytes", "body_too_large")

    # -- the answer --------------------------------------------------------------------------------------------------

    async def answer(self, status: int, body: bytes, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Send a whole JSON answer."""
        length = b"%d" % len(body)
        all_headers = [(b"content-type", _JSON), (b"content-length", length), *self._common(), *headers]
        await self._begin(status, all_headers)
        await self._write({"type": "http.response.body", "body": body})

    async def begin_stream(self) -> None:
        """Send the status and headers of a stream of events, together with the first of them."""
        self.started = True
        framing = [] if self.connection.begin_stream() else [_CLOSE]
        await self._begin(200, [*STREAM_HEADERS, *framing, *self._common()])

    async def stream(self, data: bytes, more: bool = True) -> None:
        """Send events. Who does not read them within `write_timeout_s` is cut off."""
        if more and not self.connection.is_stalled:
            self.connection.write_chunk(data)
            return
        self.connection.expect(data)
        await self._write({"type": "http.response.body", "body": data, "more_body": more})

    async def _begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        if self.method != "HEAD":  # which is answered without a body
            self.connection.keep_next_write()
        await self._write({"type": "http.response.start", "status": status, "headers": headers})

    async def _write(self, message: dict[str, Any]) -> None:
        if not self.connection.is_stalled:
            await self._send(message)
            return
        with anyio.move_on_after(self.service.config.write_timeout_s) as scope:
            await self._send(message)
        if scope.cancelled_caught:
            self.connection.cut("it reads too slowly")

    def _common(self) -> tuple[tuple[bytes, bytes], ...]:
        return ((b"x-request-id", self.request_id.encode("ascii")), (b"date", http_date()))


_CLOSE = (b"connection", b"close")
