"""The other end: connects to a source that listens, whatever the way, and speaks its protocol."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import anyio
from anyio.abc import SocketAttribute
from anyio.streams.tls import TLSStream

from ....errors import ConfigError, FlowError
from .framing import FRAMINGS, Framing
from .socket_options import keep_alive
from .tls import client_context

if TYPE_CHECKING:
    import ssl

    from anyio.abc import ByteStream

SCHEMES = ("tcp", "tcps", "unix", "ws", "wss")
_KEEPALIVE_S = 30.0
_HANDSHAKE_S = 30.0
_LONGEST_ANSWER = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Address:
    """Where a source listens: a host and a port, or the path of a Unix socket."""

    url: str
    scheme: str
    host: str = ""
    port: int = 0
    path: str = ""

    @property
    def has_tls(self) -> bool:
        return self.scheme in ("tcps", "wss")

    @property
    def is_websocket(self) -> bool:
        return self.scheme in ("ws", "wss")


def parse_address(url: str) -> Address:
    """Read `tcp://host:port`, `tcps://`, `ws://`, `wss://` or `unix:///path`.

    Raises:
        ConfigError: it is none of these.
    """
    scheme, found, rest = url.partition("://")
    if not found or scheme not in SCHEMES or not rest:
        raise ConfigError(f"{url!r} is no address: write tcp://host:port, tcps://, ws://, wss:// or unix:///path")
    if scheme == "unix":
        return Address(url, scheme, path=rest)
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"{url!r} is no address: {error}") from None
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigError(f"{url!r}: a key is given by --key-env, not in the address")
    if not host or not port:
        raise ConfigError(f"{url!r} lacks a {'host' if not host else 'port'}: write {scheme}://host:port")
    return Address(url, scheme, host, port)


@dataclass(frozen=True, slots=True)
class Session:
    """A connection that is open, and how messages stand in it; `greeted` messages have been sent already."""

    stream: ByteStream
    framing: Framing
    greeted: int


async def connect(address: Address, framing: str, key: str | None, ca: str | None) -> Session:
    """Open a connection and show the key. `framing` is for what is no WebSocket.

    Raises:
        ConfigError: the file `ca` cannot be used.
        FlowError: nobody answers there, or who does turns us away.
    """
    authorization = None if key is None else f"Bearer {key}"
    context = client_context(ca, Path()) if address.has_tls else None
    try:
        with anyio.fail_after(_HANDSHAKE_S):
            return await _greet(await _open(address), address, framing, authorization, context)
    except TimeoutError:
        raise FlowError(f"{address.url} does not answer") from None
    except (OSError, anyio.EndOfStream, anyio.BrokenResourceError) as error:
        raise FlowError(f"no connection to {address.url}: {str(error) or 'it was closed'}") from None


async def _greet(
    stream: ByteStream, address: Address, framing: str, authorization: str | None, context: ssl.SSLContext | None
) -> Session:
    try:
        if context is not None:
            stream = await TLSStream.wrap(stream, hostname=address.host, ssl_context=context)
        if address.is_websocket:
            return Session(stream, await _shake_hands(stream, address, authorization), 0)
        codec = FRAMINGS[framing](_LONGEST_ANSWER)
        if authorization is not None:
            await stream.send(codec.encode({"authorization": authorization}, codec.writes_msgpack))
        return Session(stream, codec, 0 if authorization is None else 1)
    except BaseException:
        await anyio.aclose_forcefully(stream)
        raise


async def _open(address: Address) -> ByteStream:
    if address.scheme == "unix":
        return await anyio.connect_unix(address.path)
    stream = await anyio.connect_tcp(address.host, address.port)
    keep_alive(stream.extra(SocketAttribute.raw_socket), _KEEPALIVE_S)
    return stream


async def _shake_hands(stream: ByteStream, address: Address, authorization: str | None) -> Framing:
    from websockets.uri import parse_uri

    from .websocket import WebSocketClient

    framing = WebSocketClient(_LONGEST_ANSWER, parse_uri(address.url), authorization)
    await stream.send(framing.data_to_send())
    while not framing.is_ready:
        framing.receive(await stream.receive(1))  # no answer follows before a request
        if framing.is_closed:
            raise FlowError(f"{address.url}: {framing.rejection or 'is no WebSocket'}")
    return framing
