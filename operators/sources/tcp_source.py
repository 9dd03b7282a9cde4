"""tcp_source: requests from TCP connections, answered on the same connection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...runtime.flow.operator import operator
from .net.listen import ListenConfig, bind_tcp, tell_address
from .net.socket_source import SocketSource, StreamSourceConfig
from .net.tls import TLSConfig, server_context

if TYPE_CHECKING:
    import socket
    import ssl


class TcpSourceConfig(ListenConfig, StreamSourceConfig):
    """Where it listens; see docs/sockets.md for the protocol."""

    tls: TLSConfig | None = None


@operator("tcp_source")
class TcpSource(SocketSource[TcpSourceConfig]):
    """Takes requests from TCP connections, JSON lines or MessagePack, and answers on the same connection.

    Many requests may be in flight on a connection; their answers come as they end, and the deltas of those that say
    `stream: true` as they are decoded. The results must reach a reply_sink. A connection that is cut off has its
    requests cancelled; one whose peer reads slowly makes nobody else wait.
    """

    config_model = TcpSourceConfig
    guarantee = SocketSource.guarantee
    example = """\
operators:
  source: {type: tcp_source, port: 7000}
  reply: {type: reply_sink}
edges:
  - source -> tokenize
  - detokenize -> reply
  - "*.error -> reply"
"""

    async def bind(self) -> list[socket.socket]:
        sockets = await bind_tcp(self.context.name, self.config)
        has_tls = self.config.tls is not None
        scheme = "tcps" if has_tls else "tcp"
        self.address = tell_address(self.context.name, scheme, self.config, sockets, self.keys.is_required, has_tls)
        return sockets

    def make_tls(self) -> ssl.SSLContext | None:
        return None if self.config.tls is None else server_context(self.config.tls, self.context.base_dir)
