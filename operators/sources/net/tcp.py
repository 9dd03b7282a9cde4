"""What sources on TCP have in common: an address, and TLS if it is configured."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, TypeVar

from .listen import ListenConfig, bind_tcp, tell_address
from .socket_source import SocketSource, SocketSourceConfig
from .tls import TLSConfig, server_context

if TYPE_CHECKING:
    import socket
    import ssl


class TcpConfig(ListenConfig, SocketSourceConfig):
    """An address, and how to encrypt what goes over it."""

    tls: TLSConfig | None = None


TcpConfigT = TypeVar("TcpConfigT", bound=TcpConfig)


class TcpSocketSource(SocketSource[TcpConfigT]):
    """Listens on a port; a source that was restarted is found where it was."""

    schemes: ClassVar[tuple[str, str]]  # of the address, in plain and with TLS

    async def bind(self) -> list[socket.socket]:
        name, config, kept = self.context.name, self.config, self.context.kept
        has_tls = config.tls is not None
        scheme = self.schemes[has_tls]
        sockets = await bind_tcp(name, config.model_copy(update={"port": kept.get("port", config.port)}), scheme)
        kept["port"] = sockets[0].getsockname()[1]
        self.address = tell_address(name, scheme, config, sockets, self.keys.is_required, has_tls)
        return sockets

    def make_tls(self) -> ssl.SSLContext | None:
        return None if self.config.tls is None else server_context(self.config.tls, self.context.base_dir)
