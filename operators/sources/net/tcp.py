"""What sources on TCP have in common: an address, and TLS if it is configured."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, TypeVar

from .listen import ListenConfig, bind_again, tell_address
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
        config, has_tls = self.config, self.config.tls is not None
        scheme = self.schemes[has_tls]
        sockets = await bind_again(self.context, config, scheme)
        self.address = tell_address(self.context.name, scheme, config, sockets, self.keys.is_required, has_tls)
        return sockets

    def make_tls(self) -> ssl.SSLContext | None:
        return None if self.config.tls is None else server_context(self.config.tls, self.context.base_dir)
