"""unix_source: requests from connections to a Unix socket, answered on the same connection."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ...runtime.flow.operator import operator
from .net.listen import bind_unix
from .net.socket_source import SocketSource, StreamSourceConfig

if TYPE_CHECKING:
    import socket

log = logging.getLogger("sageLLM")


class UnixSourceConfig(StreamSourceConfig):
    """`path` is relative to the current directory; `mode` are the permissions of the socket, in octal digits."""

    path: Annotated[str, Field(min_length=1)]
    mode: Annotated[str, Field(pattern=r"^0?[0-7]{3}$")] = "600"


@operator("unix_source")
class UnixSource(SocketSource[UnixSourceConfig]):
    """Takes requests from connections to a Unix socket, and answers on the same connection, as tcp_source does.

    Who may write to the socket's file may connect: by default only the user who runs the pipeline. A file that a
    crashed server has left is replaced.
    """

    config_model = UnixSourceConfig
    guarantee = SocketSource.guarantee
    example = """\
operators:
  source: {type: unix_source, path: sagellm.sock}
  reply: {type: reply_sink}
edges:
  - source -> tokenize
  - detokenize -> reply
  - "*.error -> reply"
"""

    async def bind(self) -> list[socket.socket]:
        self.path = self.context.base_dir / self.config.path
        listening = bind_unix(self.context.name, self.path, int(self.config.mode, 8))
        self._inode = self.path.lstat().st_ino
        self.address = f"unix://{self.path}"
        log.info("%s listens on %s", self.context.name, self.address)
        return [listening]

    async def close(self) -> None:
        await super().close()
        try:
            if self.path.lstat().st_ino == self._inode:  # else it is another server's by now
                self.path.unlink()
        except (AttributeError, FileNotFoundError):
            pass
