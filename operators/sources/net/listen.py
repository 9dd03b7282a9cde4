"""Addresses to listen on: bound before anything runs, so that what is in use is one clear error."""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import socket
import stat
from typing import TYPE_CHECKING, Annotated

import anyio
from pydantic import Field

from ....config import Config
from ....errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from ....runtime.flow.operator import OperatorContext

log = logging.getLogger("sageLLM")

_BACKLOG = 4096
_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


class ListenConfig(Config):
    """`port: 0` takes a free one, which the log tells."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)]


async def bind_tcp(name: str, config: ListenConfig, scheme: str = "tcp") -> list[socket.socket]:
    """Listening sockets, one for each address that the host has, all on one port. `name` is the operator's, `scheme`
    that of its addresses.

    Nothing is accepted yet: who connects waits. A port is free again as soon as its process is gone.

    Raises:
        ConfigError: the host is unknown, the address is in use, or this user may not have it.
    """
    host, port = config.host, config.port
    try:
        found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{name}: host {host!r} is no address: {getattr(error, 'strerror', error)}") from None
    sockets: list[socket.socket] = []
    try:
        for family, _, _, _, address in dict.fromkeys(found):
            try:
                sockets.append(_listen(family, (address[0], port, *address[2:])))
            except OSError as error:
                if error.errno not in _ABSENT or len(found) == 1:
                    raise
            else:
                port = sockets[0].getsockname()[1]
        if not sockets:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    except OSError as error:
        for bound in sockets:
            bound.close()
        raise ConfigError(_explain(name, error, f"{scheme}://{_bracketed(host)}:{port}")) from None
    return sockets


async def bind_again(context: OperatorContext, config: ListenConfig, scheme: str) -> list[socket.socket]:
    """As `bind_tcp`; an operator that was restarted is found where it was.

    Raises:
        ConfigError: as `bind_tcp`.
    """
    port = context.kept.get("port", config.port)
    sockets = await bind_tcp(context.name, config.model_copy(update={"port": port}), scheme)
    context.kept["port"] = sockets[0].getsockname()[1]
    return sockets


def _listen(family: int, address: tuple[str | int, ...]) -> socket.socket:
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named: asyncio sets TCP_NODELAY by it
    try:
        listening.setblocking(False)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except BaseException:
        listening.close()
        raise
    return listening


def _explain(name: str, error: OSError, address: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"{name}: {address} is in use: stop the program that listens there, or write another port "
            "(port: 0 takes a free one)"
        )
    if error.errno == errno.EACCES:
        return f"{name}: this user may not listen on {address}: write a port from 1024 on"
    if error.errno in _ABSENT:
        return f"{name}: {address} is no address of this machine: write 127.0.0.1, or one that it has"
    return f"{name}: cannot listen on {address}: {error.strerror}"


def bind_unix(name: str, path: Path, mode: int) -> socket.socket:
    """A listening socket at `path`, with these permissions. What a crashed server has left there is replaced.

    Raises:
        ConfigError: another server listens there, something that is no socket is there, or it cannot be made.
    """
    address = f"unix://{path}"
    try:
        if _is_stale(name, path, address):
            path.unlink()
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listening.setblocking(False)
            before = os.umask(0o777 & ~mode)  # never wider than asked for, not even for a moment
            try:
                listening.bind(str(path))
            finally:
                os.umask(before)
            path.chmod(mode)
            listening.listen(_BACKLOG)
        except BaseException:
            listening.close()
            raise
    except OSError as error:
        reason = error.strerror or str(error)  # "AF_UNIX path too long" has no errno
        raise ConfigError(f"{name}: cannot listen on {address}: {reason}") from None
    return listening


def _is_stale(name: str, path: Path, address: str) -> bool:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(found.st_mode):
        raise ConfigError(f"{name}: {path} is there and is no socket: write another path, or move it away")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except BlockingIOError:  # its backlog is full
            pass
    raise ConfigError(f"{name}: {address} is in use by another server: stop that one, or write another path")


def tell_address(
    name: str, scheme: str, config: ListenConfig, sockets: list[socket.socket], has_keys: bool, has_tls: bool
) -> str:
    """Log where the operator listens, and warn where others may read along or come in. Returns the address."""
    host, port = sockets[0].getsockname()[:2]
    address = f"{scheme}://{_bracketed(config.host)}:{port}"
    log.info("%s listens on %s", name, address)
    if not ipaddress.ip_address(host).is_loopback and not (has_keys and has_tls):
        lacking = " and ".join(word for word, has in (("keys", has_keys), ("tls", has_tls)) if not has)
        log.warning(
            "%s listens beyond this machine (%s) without %s: set host: 127.0.0.1, or give them", name, host, lacking
        )
    return address


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
