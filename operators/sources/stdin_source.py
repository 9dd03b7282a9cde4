"""Requests from standard input."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import anyio
from pydantic import Field

from ...runtime.flow.operator import ERROR_PORT, Operator, OperatorConfig, Port, RecordKind, operator
from .lines import LineSplitter
from .read_lines import send_lines

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ...runtime.flow.operator import Outlet

_CHUNK_BYTES = 1 << 16


class StdinSourceConfig(OperatorConfig):
    """`batch_size` is the most requests sent on at once."""

    max_line_bytes: Annotated[int, Field(gt=0)] = 4 * 1024 * 1024
    batch_size: Annotated[int, Field(gt=0)] = 64


@operator("stdin_source")
class StdinSource(Operator[StdinSourceConfig]):
    """Reads requests from standard input, one JSON object a line, until it ends.

    At most once: a line that was read is gone if the process dies. Lines are sent on as they come, and read only as
    fast as the pipeline takes them. Bad lines become dead letters, as in jsonl_source; `src.file` is `<stdin>`.
    """

    config_model = StdinSourceConfig
    outputs = (Port("out", frozenset({RecordKind.REQUEST})), ERROR_PORT)
    guarantee = "at most once: what was read is lost if the process dies"
    example = """\
operators:
  source: {type: stdin_source}
  dead: {type: jsonl_sink, path: dead.jsonl}
edges:
  - source -> tokenize
  - source.error -> dead
"""
    fd = 0

    async def run(self, inlet: AsyncIterator[list[Any]], out: Outlet) -> None:
        splitter = LineSplitter(self.config.max_line_bytes)
        while chunk := await self._read():
            await self._send(splitter.feed(chunk), out)
        await self._send(splitter.finish(), out)

    async def _read(self) -> bytes:
        """The next bytes, empty at the end. Only waits where it can be cancelled: no thread blocks in read."""
        try:
            await anyio.wait_readable(self.fd)
        except PermissionError:  # a regular file or /dev/null: not pollable, and never blocks for long
            return await anyio.to_thread.run_sync(os.read, self.fd, _CHUNK_BYTES)
        return os.read(self.fd, _CHUNK_BYTES)

    async def _send(self, lines: list[Any], out: Outlet) -> None:
        await send_lines(out, lines, "<stdin>", "", self.config)
