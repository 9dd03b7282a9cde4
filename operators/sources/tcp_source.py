"""tcp_source: requests from TCP connections, answered on the same connection."""

from __future__ import annotations

from ...runtime.flow.operator import operator
from .net.socket_source import StreamSourceConfig
from .net.tcp import TcpConfig, TcpSocketSource


class TcpSourceConfig(TcpConfig, StreamSourceConfig):
    """Where it listens; docs/sockets.md has the protocol."""


@operator("tcp_source")
class TcpSource(TcpSocketSource[TcpSourceConfig]):
    """Takes requests from TCP connections, JSON lines or MessagePack, and answers on the same connection.

    Many requests may be in flight on a connection; their answers come as they end, and the deltas of those that say
    `stream: true` as they are decoded. The results must reach a reply_sink. A connection that is cut off has its
    requests cancelled; one whose peer reads slowly makes nobody else wait.
    """

    config_model = TcpSourceConfig
    guarantee = TcpSocketSource.guarantee
    schemes = ("tcp", "tcps")
    example = """\
operators:
  source: {type: tcp_source, port: 7000}
  reply: {type: reply_sink}
edges:
  - source -> tokenize
  - detokenize -> reply
  - "*.error -> reply"
"""
