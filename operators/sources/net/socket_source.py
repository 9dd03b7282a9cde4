"""The base of the sources that listen on sockets: accepts connections, and ends them with the run."""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import anyio
from anyio.abc import SocketAttribute, SocketListener
from pydantic import Field

from ....runtime.flow.operator import Operator, OperatorConfig, Port, RecordKind
from .connection import Connection, ConnectionConfig, Service
from .framing import FRAMINGS, Framing
from .intake import Intake, IntakeConfig
from .keys import KeyRing, KeysConfig
from .socket_options import keep_alive

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import AsyncIterator, Callable

    from anyio.abc import SocketStream, TaskGroup

    from ....runtime.flow.operator import OperatorContext, Outlet

log = logging.getLogger("sageLLM")

_SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_SCARCE_PAUSE_S = 0.2
_REFUSED_AT_ONCE = 64  # are told why; to more than that the closed connection says it
_FLUSH_S = 5.0  # for the last words of each connection when the run is over


class SocketSourceConfig(ConnectionConfig, IntakeConfig, KeysConfig, OperatorConfig):
    """`max_connections` are served at once; one more is told so and closed, and in a flood of them only closed."""

    max_connections: Annotated[int, Field(gt=0)] = 1024


class StreamSourceConfig(SocketSourceConfig):
    """`framing` is how messages stand in the stream, both ways."""

    framing: Literal["json_lines", "msgpack"] = "json_lines"


SocketConfigT = TypeVar("SocketConfigT", bound=SocketSourceConfig)


class SocketSource(Operator[SocketConfigT]):
    """What tcp_source, unix_source and websocket_source have in common. `bind` makes the sockets to listen on."""

    outputs = (Port("out", frozenset({RecordKind.REQUEST})),)
    guarantee = (
        "at most once: requests are in memory only; "
        "each has exactly one terminal event on its connection, if that lives"
    )

    def __init__(self, config: SocketConfigT, context: OperatorContext) -> None:
        super().__init__(config, context)
        self._sockets: list[socket.socket] = []

    async def claim(self) -> None:
        """Read keys and certificates, and listen; whoever connects waits until the flow runs.

        Raises:
            ConfigError: the address is in use or cannot be had; a file of keys or certificates is wrong.
        """
        self.keys = KeyRing.load(self.config, self.context.base_dir, self.context.engine.clock)
        self.tls = self.make_tls()
        self._sockets = await self.bind()

    async def disclaim(self) -> None:
        await self.close()

    async def open(self) -> None:
        """As `claim`, if nobody has called it."""
        if not self._sockets:
            await self.claim()
        self.intake = Intake(self.context, self.config)
        self._service = Service(self.config, self.intake, self.keys, self.tls, self.make_framing)
        self._connections: set[Connection] = set()
        self._being_refused = 0
        self._gone = anyio.Event()
        self._accepting = anyio.CancelScope()

    async def bind(self) -> list[socket.socket]:
        """Sockets that listen; `address` says where.

        Raises:
            ConfigError: they cannot be had.
        """
        raise NotImplementedError

    def make_tls(self) -> ssl.SSLContext | None:
        """TLS for every connection, if it is configured."""
        return None

    def make_framing(self, authenticate: Callable[[str | None], bool]) -> Framing:
        """How the messages of a new connection are framed; `authenticate` takes an Authorization header, or None."""
        assert isinstance(self.config, StreamSourceConfig)
        return FRAMINGS[self.config.framing](self.config.max_message_bytes)

    def drain(self) -> bool:
        """Accept nobody and take no requests; `run` stays until everybody has been answered."""
        self.intake.drain()
        self._accepting.cancel()
        return True

    async def run(self, inlet: AsyncIterator[list[Any]], out: Outlet) -> None:
        listeners = [await SocketListener.from_socket(each) for each in self._sockets]
        async with anyio.create_task_group() as connections:
            try:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._listen, listeners, connections)
                    await self.intake.run(out)
                    self._accepting.cancel()
            finally:
                await self._end_connections()
                connections.cancel_scope.cancel()  # those that are being refused

    async def close(self) -> None:
        for each in self._sockets:
            each.close()
        self._sockets = []

    # -- connections ---------------------------------------------------------------------------------------------------

    async def _listen(self, listeners: list[SocketListener], connections: TaskGroup) -> None:
        try:
            with self._accepting:
                async with anyio.create_task_group() as tasks:
                    for listener in listeners:
                        tasks.start_soon(self._accept, listener, connections)
        finally:
            with anyio.CancelScope(shield=True):
                for listener in listeners:
                    await listener.aclose()

    async def _accept(self, listener: SocketListener, connections: TaskGroup) -> None:
        while True:
            try:
                stream = await listener.accept()
                peer = _name_of(stream)
                keep_alive(stream.extra(SocketAttribute.raw_socket), self.config.keepalive_s)
            except (OSError, anyio.BrokenResourceError) as error:  # of a peer that has gone, or our own limits
                log.warning("%s could not accept a connection: %s", self.context.name, error)
                if getattr(error, "errno", None) in _SCARCE:
                    await anyio.sleep(_SCARCE_PAUSE_S)
                continue
            connection = Connection(self._service, stream, f"{self.context.name}: {peer}")
            if len(self._connections) < self.config.max_connections:
                self._connections.add(connection)
                connections.start_soon(self._serve, connection)
            elif self._being_refused < _REFUSED_AT_ONCE:
                self._being_refused += 1
                connections.start_soon(self._refuse, connection)
            else:
                await anyio.aclose_forcefully(stream)

    async def _refuse(self, connection: Connection) -> None:
        try:
            await connection.refuse(f"{self.config.max_connections} connections are open, as many as are served")
        finally:
            self._being_refused -= 1

    async def _serve(self, connection: Connection) -> None:
        try:
            await connection.serve()
        finally:
            self._connections.discard(connection)
            self._gone.set()

    async def _end_connections(self) -> None:
        """Everybody has been told an end, so write that, and close; for who does not take it, close."""
        with anyio.CancelScope(shield=True):
            for connection in self._connections:
                connection.finish("the server is shutting down")
            with anyio.move_on_after(_FLUSH_S):
                while self._connections:
                    self._gone = anyio.Event()
                    await self._gone.wait()
            for connection in self._connections:
                connection.cut()


def _name_of(stream: SocketStream) -> str:
    address = stream.extra(SocketAttribute.remote_address, None)
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "a local peer"
