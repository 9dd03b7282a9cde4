"""tcp_sink: results to another program, over a connection that is made again when it breaks."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import anyio
from anyio.abc import SocketAttribute
from anyio.streams.tls import TLSStream
from pydantic import Field

from ...config.problems import Contradiction
from ...errors import FlowError
from ...graph.operator_spec import ANY_KIND
from ...records import TokenDelta
from ...runtime.flow.operator import Operator, OperatorConfig, Port, RecordKind, operator
from ..sources.net.socket_options import keep_alive
from ..sources.net.tls import client_context
from .result_format import dump_line

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from anyio.abc import ByteStream, TaskGroup

    from ...runtime.flow.operator import Outlet

log = logging.getLogger("sageLLM")

_FIRST_PAUSE_S = 0.1
_LAST_PAUSE_S = 5.0
_KEEPALIVE_S = 30.0
_GOODBYE_S = 1.0  # for TLS to end its side
_CUT = (anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream, OSError)


class TcpSinkConfig(OperatorConfig):
    """Where the results go. With `acks` the peer answers each line, in order, with a line, whatever that says.

    A peer that is away, takes nothing or acknowledges nothing for `give_up_after_s` fails the run (None: never).
    With `tls` the peer must have a certificate for `host`, of a CA that the machine trusts or of the file `ca`.
    """

    host: Annotated[str, Field(min_length=1)]
    port: Annotated[int, Field(gt=0, le=65535)]
    acks: bool = False
    give_up_after_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 300.0
    tls: bool = False
    ca: Annotated[str, Field(min_length=1)] | None = None

    def contradictions(self) -> Iterable[Contradiction]:
        if self.ca is not None and not self.tls:
            yield Contradiction("ca is for tls: true: write that, or leave ca out", ("ca", "tls"))


class _Link:
    """One connection: what has come back on it, and whether it still holds."""

    def __init__(self, stream: ByteStream) -> None:
        self.stream = stream
        self.is_broken = False
        self.acked = 0  # lines
        self.changed = anyio.Event()

    async def read(self) -> None:
        try:
            while True:
                self.acked += (await self.stream.receive()).count(b"\n")
                self.changed.set()
        except _CUT:
            self.is_broken = True
            self.changed.set()


@operator("tcp_sink")
class TcpSink(Operator[TcpSinkConfig]):
    """Sends results to host:port, as the lines that jsonl_sink writes.

    Connects again, at growing intervals, when the connection breaks. A peer that is slow or away holds the pipeline up:
    a list of results is taken when the one before has been sent, and with `acks` acknowledged.

    Guarantee: with `acks: true` at least once: what was not acknowledged when a connection broke is sent again.
    Without, at most once: what was under way then is lost, and counted in the log. Nothing is remembered between runs.
    """

    config_model = TcpSinkConfig
    inputs = (Port("in", ANY_KIND - {RecordKind.REQUEST, RecordKind.SEQUENCE}),)
    guarantee = (
        "in a run at least once with acks: true; else at most once: what is under way when a connection breaks is lost"
    )
    example = """\
operators:
  send: {type: tcp_sink, host: 127.0.0.1, port: 9000, acks: true}
edges:
  - detokenize -> send
"""

    _tasks: TaskGroup  # of a run

    async def open(self) -> None:
        """Read the CA.

        Raises:
            ConfigError: it cannot be read, or holds no certificate.
        """
        self._tls = client_context(self.config.ca, self.context.base_dir) if self.config.tls else None
        self._link: _Link | None = None
        self.lost_lines = 0

    async def run(self, inlet: AsyncIterator[list[Any]], out: Outlet) -> None:
        """Send what arrives.

        Raises:
            FlowError: the peer has been away, or has taken nothing, for `give_up_after_s`.
        """
        async with anyio.create_task_group() as self._tasks:
            await super().run(inlet, out)
            self._tasks.cancel_scope.cancel()
        if self._link is not None:
            with anyio.move_on_after(_GOODBYE_S), suppress(*_CUT):
                await self._link.stream.aclose()

    async def process(self, records: list[Any], out: Outlet) -> None:
        lines = [dump_line(record) for record in records if not isinstance(record, TokenDelta)]
        while lines:
            link = await self._connected()
            before = link.acked
            try:
                await self._send(link, b"".join(lines))
                if self.config.acks:
                    while link.acked < before + len(lines) and not link.is_broken:
                        await self._wait_for(link)
            except _CUT:
                link.is_broken = True
            lines = self._left(lines, link, before)

    def _left(self, lines: list[bytes], link: _Link, before: int) -> list[bytes]:
        """What is to be sent again."""
        if self.config.acks:
            return lines[link.acked - before :]
        if link.is_broken:
            self.lost_lines += len(lines)
            log.warning("%s: the connection broke: up to %d results are lost", self.context.name, len(lines))
        return []

    async def _send(self, link: _Link, data: bytes) -> None:
        for start in range(0, len(data), 1 << 16):
            with anyio.move_on_after(self.config.give_up_after_s) as scope:
                await link.stream.send(data[start : start + (1 << 16)])
            if scope.cancelled_caught:
                raise self._gave_up("has taken nothing")

    async def _wait_for(self, link: _Link) -> None:
        link.changed = anyio.Event()
        with anyio.move_on_after(self.config.give_up_after_s) as scope:
            await link.changed.wait()
        if scope.cancelled_caught:
            raise self._gave_up("has acknowledged nothing")

    async def _connected(self) -> _Link:
        if self._link is not None and not self._link.is_broken:
            return self._link
        if self._link is not None:
            await anyio.aclose_forcefully(self._link.stream)
            self._link = None
        with anyio.move_on_after(self.config.give_up_after_s):
            pause = _FIRST_PAUSE_S
            while True:
                try:
                    self._link = _Link(await self._connect())
                except _CUT as error:
                    told = str(error) or "it was closed"
                    log.warning("%s: no connection to %s: %s", self.context.name, self._peer, told)
                    await anyio.sleep(pause)
                    pause = min(2 * pause, _LAST_PAUSE_S)
                else:
                    self._tasks.start_soon(self._link.read)
                    return self._link
        raise self._gave_up("could not be reached")

    async def _connect(self) -> ByteStream:
        stream = await anyio.connect_tcp(self.config.host, self.config.port)
        keep_alive(stream.extra(SocketAttribute.raw_socket), _KEEPALIVE_S)
        if self._tls is None:
            return stream
        try:
            return await TLSStream.wrap(stream, hostname=self.config.host, ssl_context=self._tls)
        except BaseException:
            await anyio.aclose_forcefully(stream)
            raise

    @property
    def _peer(self) -> str:
        return f"{self.config.host}:{self.config.port}"

    def _gave_up(self, what: str) -> FlowError:
        return FlowError(f"{self.context.name}: {self._peer} {what} for {self.config.give_up_after_s:g} s")

    async def close(self) -> None:
        if self._link is not None:
            await anyio.aclose_forcefully(self._link.stream)
