"""uvicorn's server, run on the flow's own event loop: no signal handlers, no process of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import uvicorn

from .connection import Connection, Limits, ServerConfig

if TYPE_CHECKING:
    import socket
    from ssl import SSLContext

_IDLE_TIMEOUT_S = 60


class HTTPServer:
    """Serves an ASGI application on sockets that are bound already, from `start` to `close`."""

    def __init__(self, app: Any, limits: Limits, ssl: SSLContext | None) -> None:
        config = ServerConfig(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            timeout_keep_alive=_IDLE_TIMEOUT_S,
        )
        config.limits, config.on_lost = limits, lambda: self._lost.set()
        config.load()
        config.ssl = ssl
        self._config = config
        self._server = uvicorn.Server(config)
        self._lost = anyio.Event()

    async def start(self, sockets: list[socket.socket]) -> None:
        """Accept connections, on asyncio's event loop. A TLS handshake has as long as a head."""
        config, state = self._config, self._server.server_state

        def connect() -> Connection:
            return Connection(config=config, server_state=state, app_state={})

        loop: Any = anyio.lowlevel.current_token().native_token
        tls = {} if config.ssl is None else {"ssl_handshake_timeout": config.limits.read_timeout_s}
        self._server.servers = [
            await loop.create_server(connect, sock=listening, ssl=config.ssl, backlog=config.backlog, **tls)
            for listening in sockets
        ]

    def stop_accepting(self) -> None:
        """Close the listening sockets and every connection that is idle; the others end with their answer."""
        for server in self._server.servers:
            server.close()
        for connection in [*self._server.server_state.connections]:
            connection.shutdown()

    async def wait_closed(self) -> None:
        """Wait until there is no connection left."""
        while self._server.server_state.connections:
            self._lost = anyio.Event()
            await self._lost.wait()

    def abort(self) -> None:
        """Cut every connection, and cancel what still answers."""
        self.stop_accepting()
        for connection in [*self._server.server_state.connections]:
            connection.transport.abort()
        for task in [*self._server.server_state.tasks]:
            task.cancel()
