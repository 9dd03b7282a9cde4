"""One connection: a peer's messages in, its answers out, and nothing that happens here reaches any other."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import anyio
import anyio.lowlevel
from anyio.streams.tls import TLSStream
from pydantic import Field

from ....config import Config
from ....runtime.calls import Caller
from ...sinks.reply_format import KEEPALIVE, delta_fields, end_fields, error_fields, shed_fields
from .keys import bearer_of
from .messages import Authorization, Cancel, MessageError, read_message
from .outbox import Outbox

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable

    from anyio.abc import ByteStream

    from ....records import Completion, DeadLetter, Request, TokenDelta
    from ....runtime.flow.ledger import Outcome
    from .framing import Frame, Framing
    from .intake import Intake
    from .keys import Key, KeyRing

log = logging.getLogger("sageLLM")

_LINGER_S = 1.0
_FIRST_PROBE_S = 0.01
_LAST_PROBE_S = 5.0
_READ_BYTES = 8192  # and
_FRAMES_A_TURN = 32  # are what one peer may keep us busy with before everybody else has a turn
_CUT = (anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream, OSError)

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ConnectionConfig(Config):
    """The limits of each connection.

    `max_message_bytes` is the longest message that is read. While more than `buffer_bytes` wait to be written, no more
    messages are read, so what waits is bounded by that and by what the requests in flight can say. A peer that does
    not take 64 KiB within `write_timeout_s` is cut off. One from which nothing comes although it should, for up to two
    times `keepalive_s`, is gone: its machine does not answer. TLS, the WebSocket handshake and the key must be there
    within `handshake_timeout_s`. `idle_timeout_s` without a message and a request in flight closes it; 0 is never.
    """

    max_message_bytes: Annotated[int, Field(gt=0, lt=2**31)] = 4 * 1024 * 1024
    buffer_bytes: Annotated[int, Field(gt=0)] = 256 * 1024
    write_timeout_s: Seconds = 30.0
    keepalive_s: Annotated[float, Field(ge=1, le=32767, allow_inf_nan=False)] = 30.0
    handshake_timeout_s: Seconds = 10.0
    idle_timeout_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


@dataclass(frozen=True, slots=True)
class Service:
    """What the connections of one source share. `make_framing` is given `Connection.authenticate`."""

    config: ConnectionConfig
    intake: Intake
    keys: KeyRing
    tls: ssl.SSLContext | None
    make_framing: Callable[[Callable[[str | None], bool]], Framing]


class Connection:
    """Serves one peer. Requests that are in flight when it is cut off are cancelled."""

    def __init__(self, service: Service, stream: ByteStream, peer: str) -> None:
        self.peer = peer  # for the log
        self._stream = stream
        self._tls = service.tls
        self._config = service.config
        self._intake = service.intake
        self._keys = service.keys
        self._key: Key | None = None
        self._framing = service.make_framing(self.authenticate)
        self._requests: dict[str, Request] = {}
        self._count = 0  # requests so far
        self._outbox = Outbox()
        self._answered = anyio.Event()
        self._reading = anyio.CancelScope()
        self._all = anyio.CancelScope(shield=True)
        self._finished: str | None = None  # why nothing more is read
        self._heard_at = self._ended_at = anyio.current_time()

    # -- from outside --------------------------------------------------------------------------------------------------

    def finish(self, reason: str) -> None:
        """Read nothing more; write what there is, say goodbye and close."""
        self._finished = self._finished or reason
        self._reading.cancel()

    def cut(self) -> None:
        """Close at once."""
        self._all.cancel()

    def authenticate(self, authorization: str | None) -> bool:
        """Whether an Authorization header lets its sender in."""
        bearer = None if authorization is None else bearer_of(authorization)
        self._key = None if bearer is None else self._keys.authenticate(bearer)
        return self.is_welcome

    @property
    def is_welcome(self) -> bool:
        """Whether it has shown a key, if it must."""
        return self._key is not None or not self._keys.is_required

    async def serve(self) -> None:
        """Live until both sides have said everything, or one is gone. Only `finish` and `cut` end it from outside.

        Raises nothing: what goes wrong here is this connection's own.
        """
        with self._all:
            await self._guard(self._converse)
        self._outbox.close()
        self._cancel_all()
        with anyio.CancelScope(shield=True):
            await anyio.aclose_forcefully(self._stream)

    async def refuse(self, reason: str) -> None:
        """Say why this peer is not served, and close."""
        self._outbox.put(self._framing.refuse(error_fields(None, reason)))
        self._outbox.close()
        try:
            await self._guard(self._write)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.aclose_forcefully(self._stream)

    async def _guard(self, talk: Callable[[], Awaitable[None]]) -> None:
        try:
            if self._tls is not None:
                with anyio.fail_after(self._config.handshake_timeout_s):
                    self._stream = await TLSStream.wrap(self._stream, ssl_context=self._tls)
            await talk()
        except* _CUT as errors:
            log.debug("%s is gone: %r", self.peer, errors.exceptions[0])
        except* Exception as errors:
            log.error("the connection of %s failed", self.peer, exc_info=errors)
        else:
            with anyio.move_on_after(_LINGER_S), suppress(*_CUT):
                await self._linger()

    async def _converse(self) -> None:
        async with anyio.create_task_group() as tasks:
            for task in (self._read_to_end, self._watch_handshake, self._watch_idle, self._ping):
                tasks.start_soon(task)
            await self._write()
            tasks.cancel_scope.cancel()

    async def _read_to_end(self) -> None:
        with self._reading:
            await self._read()
            if not self._framing.is_closed:
                await self._wait_for_answers()
        self._cancel_all()
        self._outbox.put(self._framing.goodbye(self._finished or "that was all"))
        self._outbox.close()

    async def _linger(self) -> None:
        """End our side, and read until the peer has ended its own: else what it has not read yet might be lost."""
        stream: Any = self._stream
        if isinstance(stream, TLSStream):
            with suppress(*_CUT):
                await stream.unwrap()
            stream = stream.transport_stream
        await stream.send_eof()
        while not self._framing.has_said_goodbye:
            self._framing.receive(await stream.receive())

    def _cancel_all(self) -> None:
        self._intake.cancel([*self._requests.values()])

    # -- in ------------------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        while not self._framing.is_closed:
            try:
                data = await self._stream.receive(_READ_BYTES)
            except anyio.EndOfStream:
                await self._take(self._framing.end())
                if not self._framing.may_half_close:
                    raise
                return
            self._heard_at = anyio.current_time()
            frames = self._framing.receive(data)
            self._outbox.put(self._framing.data_to_send())
            await self._take(frames)
            await self._outbox.room(self._config.buffer_bytes)

    async def _take(self, frames: list[Frame]) -> None:
        for count, frame in enumerate(frames, 1):
            if self._finished is not None:
                return
            self._take_one(frame)
            if count % _FRAMES_A_TURN == 0:
                await anyio.lowlevel.checkpoint()
                await self._outbox.room(self._config.buffer_bytes)

    def _take_one(self, frame: Frame) -> None:
        try:
            message = read_message(frame, f"request-{self._count + 1}")
        except MessageError as error:
            in_flight = error.request_id in self._requests
            self._tell_error(None if in_flight else error.request_id, str(error), frame)
            if not self.is_welcome:
                log.info("%s was turned away: what it sent first is no key", self.peer)
                self.finish("a key is needed")
            return
        if isinstance(message, Authorization):
            if not self.authenticate(message.header):
                self._turn_away("the key is not known", frame)
        elif not self.is_welcome:
            self._turn_away('a key is needed: send {"authorization": "Bearer ..."} first', frame)
        elif isinstance(message, Cancel):
            if (request := self._requests.get(message.request_id)) is not None:
                self._intake.cancel([request])
        else:
            self._submit(message, frame)

    def _submit(self, request: Request, frame: Frame) -> None:
        self._count += 1
        request_id = request.request_id
        if request_id in self._requests:
            told = f"request_id {request_id!r} is in flight already on this connection: give each request its own"
            self._tell_error(None, told, frame)
            return
        self._requests[request_id] = request
        refusal = self._intake.submit(request, _Reply(self, request_id, frame.is_msgpack), self._key)
        if refusal is not None:
            del self._requests[request_id]
            fields = shed_fields(request_id, refusal.message, refusal.queue_depth, refusal.retry_after_s)
            self.tell(fields, frame.is_msgpack)

    def _tell_error(self, request_id: str | None, error: str, frame: Frame) -> None:
        self.tell(error_fields(request_id, error, frame.number), frame.is_msgpack)

    def _turn_away(self, reason: str, frame: Frame) -> None:
        log.info("%s was turned away: %s", self.peer, reason)
        self._tell_error(None, reason, frame)
        self.finish(reason)

    # -- out -----------------------------------------------------------------------------------------------------------

    def tell(self, fields: dict[str, Any], as_msgpack: bool) -> None:
        """Queue one message for the peer. Raises nothing: who tells it is not of this connection."""
        if self._outbox.closed:
            return
        try:
            self._outbox.put(self._framing.encode(fields, as_msgpack))
        except Exception:
            log.exception("what %s was to be told cannot be written", self.peer)
            self.cut()

    def end(self, request_id: str, fields: dict[str, Any], as_msgpack: bool) -> None:
        """A request has ended."""
        self._requests.pop(request_id, None)
        self._ended_at = anyio.current_time()
        self.tell(fields, as_msgpack)
        if not self._requests:
            self._answered.set()

    async def _wait_for_answers(self) -> None:
        """After the peer has ended its side, which may be all of it that is left: only a write can find out."""
        pause = _FIRST_PROBE_S
        while self._requests:
            self._answered = anyio.Event()
            with anyio.move_on_after(pause):
                await self._answered.wait()
            if self._requests:
                self.tell(KEEPALIVE, self._framing.writes_msgpack)
                pause = min(2 * pause, _LAST_PROBE_S)

    async def _write(self) -> None:
        while data := await self._outbox.take():
            with anyio.fail_after(self._config.write_timeout_s):
                await self._stream.send(data)

    # -- watching ------------------------------------------------------------------------------------------------------

    async def _watch_handshake(self) -> None:
        await anyio.sleep(self._config.handshake_timeout_s)
        if not (self._framing.is_ready and self.is_welcome):
            self._give_up("the handshake or the key did not come in time")

    async def _watch_idle(self) -> None:
        limit = self._config.idle_timeout_s
        while limit:
            idle = 0.0 if self._requests else anyio.current_time() - max(self._heard_at, self._ended_at)
            if idle >= limit:
                self._give_up(f"nothing came for {limit:g} s")
                return
            await anyio.sleep(limit - idle)

    def _give_up(self, reason: str) -> None:
        self.tell(error_fields(None, reason), self._framing.writes_msgpack)
        self.finish(reason)

    async def _ping(self) -> None:
        """Ask a peer whether it is there, where that is the protocol's task and not the operating system's."""
        while self._framing.pings:
            asked_at = anyio.current_time()
            ping = self._framing.ping()
            self._outbox.put(ping)
            await anyio.sleep(self._config.keepalive_s)
            is_read = self._outbox.size <= self._config.buffer_bytes
            if ping and is_read and self._heard_at < asked_at:
                raise anyio.BrokenResourceError


class _Reply(Caller):
    """Passes what one request is told to its connection, in the encoding in which it came."""

    def __init__(self, connection: Connection, request_id: str, as_msgpack: bool) -> None:
        self._connection, self._request_id, self._as_msgpack = connection, request_id, as_msgpack

    def receive_delta(self, delta: TokenDelta) -> None:
        self._connection.tell(delta_fields(delta), self._as_msgpack)

    def receive_end(self, record: Completion | DeadLetter | None, outcome: Outcome) -> None:
        fields = end_fields(self._request_id, record, outcome)
        self._connection.end(self._request_id, fields, self._as_msgpack)
