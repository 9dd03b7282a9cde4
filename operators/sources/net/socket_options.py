"""What is asked of the operating system for a connection."""

from __future__ import annotations

import socket


def keep_alive(raw: socket.socket, keepalive_s: float) -> None:
    """Let the operating system find out within two times `keepalive_s` that a peer's machine is gone."""
    if raw.family == socket.AF_UNIX:
        return
    idle = int(keepalive_s)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, idle // 4))
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 2000 * idle)  # ms, of what was written to it
