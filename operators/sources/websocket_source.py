"""websocket_source: requests as WebSocket messages, answered on the same connection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from ...runtime.flow.operator import operator
from .net.tcp import TcpConfig, TcpSocketSource

if TYPE_CHECKING:
    from collections.abc import Callable

    from .net.framing import Framing


class WebSocketSourceConfig(TcpConfig):
    """`origins` are the web pages that may connect, as `https://example.com`; who sends no Origin is no browser, and
    may. A message above `max_message_bytes` closes the connection, as WebSocket knows no other way."""

    origins: list[str] = Field(default_factory=list)


@operator("websocket_source")
class WebSocketSource(TcpSocketSource[WebSocketSourceConfig]):
    """Takes requests from WebSocket messages, text (JSON) or binary (MessagePack), and answers in kind.

    Otherwise as tcp_source. A key comes in the header `Authorization: Bearer ...` of the handshake, never in the URL,
    which logs would show.
    """

    config_model = WebSocketSourceConfig
    guarantee = TcpSocketSource.guarantee
    schemes = ("ws", "wss")
    example = """\
operators:
  source: {type: websocket_source, port: 7001, origins: ["https://chat.example.com"]}
  reply: {type: reply_sink}
edges:
  - source -> tokenize
  - detokenize -> reply
  - "*.error -> reply"
"""

    def make_framing(self, authenticate: Callable[[str | None], bool]) -> Framing:
        from .net.websocket import WebSocketServer

        return WebSocketServer(self.config.max_message_bytes, self.config.origins, authenticate)
