"""uvicorn's server, run on the flow's own event loop: no signal handlers, no process of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import uvicorn

from .connection import Connection, Limits, ServerConfig

if TYPE_CHECKING:
    import socket
    from ssl import SSLContext

_IDLE_TIMEOUT_S = 60
_TICK_S = 1.0


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
            proxy_headers=False,
            timeout_keep_alive=_IDLE_TIMEOUT_S,
        )
        config.limits, config.on_lost = limits, lambda: self._lost.set()
        config.load()
        config.ssl = ssl
        self._server = uvicorn.Server(config)
        self._lost = anyio.Event()

    async def start(self, sockets: list[socket.socket]) -> None:
        """Accept connections."""
        server = self._server
        server.lifespan = server.config.lifespan_class(server.config)
        await server.startup(sockets)
        await server.on_tick(0)

    async def keep_time(self) -> None:
        """Keep the Date header right, until cancelled."""
        while True:
            await anyio.sleep(_TICK_S)
            await self._server.on_tick(0)

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
