"""file_tail_source: requests from a file that grows, as they are appended."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from typing import TYPE_CHECKING, Annotated, Any, Literal

import anyio
from pydantic import Field

from ...errors import ConfigError
from ...runtime.flow.operator import ERROR_PORT, Operator, OperatorConfig, Port, RecordKind, operator
from ...runtime.flow.resume import LineSet, SentLines
from .lines import LineSplitter
from .read_lines import send_lines

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ...runtime.flow.operator import OperatorContext, Outlet
    from .lines import Line

log = logging.getLogger("sageLLM")

_CHUNK_BYTES = 1 << 18
_HEAD_BYTES = 4096  # of the first line, by which a file is known again


class FileTailSourceConfig(OperatorConfig):
    """`path` is relative to the current directory, and looked at every `poll_interval_s`. With `start_at: end` only
    what is appended from now on is read of the file that is there at the start."""

    path: Annotated[str, Field(min_length=1)]
    start_at: Literal["beginning", "end"] = "beginning"
    poll_interval_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.2
    max_line_bytes: Annotated[int, Field(gt=0)] = 4 * 1024 * 1024
    batch_size: Annotated[int, Field(gt=0)] = 64


@operator("file_tail_source")
class FileTailSource(Operator[FileTailSourceConfig]):
    """Follows a file of JSON lines as it grows, until the flow is drained; it may appear later.

    When the file is renamed or deleted and another takes its name, the old one is read to its end first; when it is
    cut off (truncated), reading begins at its start again. A line counts when its newline is there, or when its file
    has been replaced. Bad lines become dead letters, as in jsonl_source.

    With jsonl_sink a run goes on where the last one, even one that was killed, left off: a file is known again by its
    inode and its first line, so it is not noticed when later lines are changed, or when it is truncated while no run
    follows it and begins with the same line again. Of a file that was replaced meanwhile, what was left is not read.
    """

    config_model = FileTailSourceConfig
    outputs = (Port("out", frozenset({RecordKind.REQUEST})), ERROR_PORT)
    guarantee = (
        "with start_at: beginning and jsonl_sink exactly once for the file at the path, across kill -9; else at most "
        "once"
    )
    example = """\
operators:
  source: {type: file_tail_source, path: requests.jsonl}
  dead: {type: jsonl_sink, path: dead.jsonl}
edges:
  - source -> tokenize
  - source.error -> dead
"""

    def __init__(self, config: FileTailSourceConfig, context: OperatorContext) -> None:
        super().__init__(config, context)
        self.path = context.base_dir / config.path
        self._file: _Followed | None = None

    async def open(self) -> None:
        """Open the file, if it is there.

        Raises:
            ConfigError: it is not a regular file, or cannot be read.
        """
        self._file = self._open_file()
        if self._file is None:
            log.info("%s: %s is not there yet: it is read when it appears", self.context.name, self.config.path)
        elif self.config.start_at == "end" and self.context.name not in self.context.resume.sent:
            await anyio.to_thread.run_sync(self._file.skip_to_end)

    async def run(self, inlet: AsyncIterator[list[Any]], out: Outlet) -> None:
        """Send lines as they are appended.

        Raises:
            ConfigError: what takes the file's place cannot be read.
        """
        while True:
            file = self._file = self._file or self._open_file()
            if file is not None and await self._read_on(file, out):
                continue
            if file is not None and self._is_replaced(file):
                while await self._read_on(file, out):  # what was written just before
                    pass
                await self._send(file, file.splitter.finish(), out)
                await self.close()
            else:
                await anyio.sleep(self.config.poll_interval_s)

    async def close(self) -> None:
        if self._file is not None:
            os.close(self._file.fd)
            self._file = None

    def _open_file(self) -> _Followed | None:
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"{self.config.path}: cannot be read: {error.strerror} (at {self.path})") from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise ConfigError(f"{self.config.path}: is not a regular file; feed a pipe through stdin_source")
        return _Followed(fd, self.config.max_line_bytes)

    def _is_replaced(self, file: _Followed) -> bool:
        """Whether another file has the name; until one has, the old one may still be written to."""
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(file.fd))
        except FileNotFoundError:
            return False

    async def _read_on(self, file: _Followed, out: Outlet) -> bool:
        """Send what has been appended; False if that is nothing."""
        chunk = await anyio.to_thread.run_sync(file.read)
        if file.was_cut_off:
            log.warning("%s: %s was truncated: reading from its start", self.context.name, self.config.path)
            file.start_again()
            self.context.resume.sent.pop(self.context.name, None)
            return True
        if not chunk:
            return False
        await self._send(file, file.splitter.feed(chunk), out)
        return True

    async def _send(self, file: _Followed, lines: list[Line], out: Outlet) -> None:
        if not lines:
            return
        resume, path = self.context.resume, self.config.path
        if file.finished is None:
            names = resume.names_of(path, file.fingerprint, self.context.base_dir)
            file.finished = resume.lines_finished(self.context.name, names, file.fingerprint)
        sent = resume.sent.get(self.context.name)
        last = sent.last_line if sent is not None and sent.fingerprint == file.fingerprint else 0
        pending = [line for line in lines if line.number > last and line.number not in file.finished]

        def note(last_line: int) -> None:
            resume.sent[self.context.name] = SentLines(file.fingerprint, last_line)

        await send_lines(out, pending, path, file.fingerprint, self.config, note)


class _Followed:
    """An open file, and how far it has been read."""

    def __init__(self, fd: int, max_line_bytes: int) -> None:
        self.fd = fd
        self.splitter = LineSplitter(max_line_bytes)
        self.finished: LineSet | None = None  # by earlier runs; known once the first line is
        self.was_cut_off = False
        self._max_line_bytes = max_line_bytes
        self._offset = 0
        self._head = b""

    def start_again(self) -> None:
        """It has a new content, of which nothing is finished."""
        self.splitter, self.finished = LineSplitter(self._max_line_bytes), LineSet()
        self.was_cut_off = False
        self._offset, self._head = 0, b""

    @property
    def fingerprint(self) -> str:
        """Of the first line, once it is there."""
        first = self._head.partition(b"\n")[0]
        return f"{hashlib.sha256(first).hexdigest()[:24]}-tail-{os.fstat(self.fd).st_ino}"

    def read(self) -> bytes:
        """The next bytes, none at the end for now. Sets `was_cut_off` where what was read is no longer there."""
        size = os.fstat(self.fd).st_size
        if self._offset and (size < self._offset or self._has_new_head()):
            self.was_cut_off = True
            return b""
        chunk = os.pread(self.fd, _CHUNK_BYTES, self._offset)
        self._offset += len(chunk)
        if len(self._head) < _HEAD_BYTES and b"\n" not in self._head:
            self._head += chunk[: _HEAD_BYTES - len(self._head)]
        return chunk

    def skip_to_end(self) -> None:
        """Go on behind the last whole line; lines keep their numbers."""
        size = os.fstat(self.fd).st_size
        while self._offset < size and (chunk := self.read()):  # none if it is cut off meanwhile
            self.splitter.feed(chunk)

    def _has_new_head(self) -> bool:
        return os.pread(self.fd, len(self._head), 0) != self._head
