"""http_source: requests over OpenAI's HTTP API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio

from ...errors import ConfigError
from ...runtime.flow.operator import Operator, Port, RecordKind, operator
from .net.intake import Intake
from .net.keys import KeyRing
from .net.listen import bind_again, tell_address
from .net.tls import server_context
from .openai.settings import HTTPConfig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ...runtime.flow.operator import OperatorContext, Outlet
    from .openai.server import HTTPServer

_KEEP_ALIVE_S = 3.0
_LAST_ANSWERS_S = 1.0


@operator("http_source")
class HttpSource(Operator[HTTPConfig]):
    """Answers OpenAI's API over HTTP: chats, texts, responses, embeddings, models; streams as server-sent events.

    The answers come from a reply_sink. A client that goes away cancels its request. What there is no room for is
    answered 429 with the depth of the queue and when to try again; nothing is answered with silence. When the flow is
    drained, new requests get 503 and those in flight `drain_timeout_s` to end.

    Guarantee: at most once; each call gets exactly one answer, or one end of its stream, while its connection lasts.
    """

    config_model = HTTPConfig
    outputs = (Port("out", frozenset({RecordKind.REQUEST})),)
    answered_by = "reply_sink"
    guarantee = "at most once; each call gets exactly one answer, or one end of its stream, while its connection lasts"
    example = """\
operators:
  source: {type: http_source, port: 8000}
  reply: {type: reply_sink}
edges:
  - source -> tokenize
  - detokenize -> reply
  - "*.error -> reply"
"""

    def __init__(self, config: HTTPConfig, context: OperatorContext) -> None:
        super().__init__(config, context)
        self.intake: Intake | None = None
        self.server: HTTPServer | None = None

    async def claim(self) -> None:
        """Listen. While the model loads /health is answered, and everything else with 503.

        Raises:
            ConfigError: the address cannot be had, the keys or the certificate cannot be read, or the event loop is
                trio's.
        """
        from .openai.app import App, allow_origins
        from .openai.connection import Limits
        from .openai.server import HTTPServer
        from .openai.service import Service

        name, config, base_dir = self.context.name, self.config, self.context.base_dir
        if not _runs_on_asyncio():
            raise ConfigError(f"{name}: http_source needs asyncio's event loop: run the flow with backend='asyncio'")
        keys = KeyRing.load(config, base_dir, self.context.engine.clock)
        tls = None if config.tls is None else server_context(config.tls, base_dir)
        self.service = Service(config, self.context.engine, keys)
        limits = Limits(config.max_connections, config.read_timeout_s)
        scheme = "http" if tls is None else "https"
        sockets = await bind_again(self.context, config, scheme)
        self.server = HTTPServer(allow_origins(App(self.service), config.cors_origins), limits, tls)
        await self.server.start(sockets)
        self.address = tell_address(name, scheme, config, sockets, keys.is_required, tls is not None)

    async def disclaim(self) -> None:
        await self.close()

    async def open(self) -> None:
        """As `claim`, if nobody has called it."""
        if self.server is None:
            await self.claim()

    async def run(self, inlet: AsyncIterator[list[Any]], out: Outlet) -> None:
        assert self.server is not None
        self.intake = self.service.intake = Intake(self.context, self.config)
        if self.service.is_draining:
            self.intake.drain()
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._keep_alive)
                await self.intake.run(out)
                self.server.stop_accepting()
                with anyio.move_on_after(self.config.write_timeout_s):
                    await self.server.wait_closed()
                tasks.cancel_scope.cancel()
        finally:
            self.service.is_draining = True
            self.server.stop_accepting()
            with anyio.move_on_after(_LAST_ANSWERS_S, shield=True):  # everybody has been told an error: let it out
                await self.server.wait_closed()

    async def _keep_alive(self) -> None:
        while True:
            await anyio.sleep(_KEEP_ALIVE_S)
            self.service.keep_alive()

    def drain(self) -> bool:
        self.service.is_draining = True
        if self.intake is not None:
            self.intake.drain()
        return True

    async def close(self) -> None:
        if self.server is not None:
            self.server.abort()
            self.server = None


def _runs_on_asyncio() -> bool:
    loop: Any = anyio.lowlevel.current_token().native_token
    return hasattr(loop, "call_soon_threadsafe")
