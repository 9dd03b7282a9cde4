"""Requests from a file of JSON lines, exactly once."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Annotated, Any

import anyio
from pydantic import Field

from ...errors import ConfigError, SourceChangedError
from ...runtime.flow.operator import ERROR_PORT, Operator, OperatorConfig, Port, RecordKind, operator
from ...runtime.flow.resume import LineSet, SentLines, is_same_file
from .fingerprint import fingerprint_file, fingerprinted_size
from .lines import LineSplitter
from .read_lines import send_lines

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ...runtime.flow.operator import OperatorContext, Outlet
    from ...runtime.flow.resume import FinishedLines
    from .lines import Line

_CHUNK_BYTES = 1 << 18


class JsonlSourceConfig(OperatorConfig):
    """`path` is relative to the current directory. `batch_size` is the most requests sent on at once."""

    path: Annotated[str, Field(min_length=1)]
    max_line_bytes: Annotated[int, Field(gt=0)] = 4 * 1024 * 1024
    batch_size: Annotated[int, Field(gt=0)] = 64


@operator("jsonl_source")
class JsonlSource(Operator[JsonlSourceConfig]):
    """Reads requests from a file, one JSON object a line.

    Exactly once together with jsonl_sink, across kill -9: every request carries its position and the file's
    fingerprint, the sink writes them with the result, and lines that stand in the output of any jsonl_sink of this
    flow are not read again. A file that is not, byte for byte, the one that the output was begun from is refused.
    The file is read in chunks on a worker thread, at the pace of the pipeline; memory does not grow with it.

    A line that is no request (see request_format.py), is not UTF-8 or is longer than `max_line_bytes` becomes a dead
    letter, and the stream goes on. Blank lines are skipped. A request without an id is called `line-<number>`.
    """

    config_model = JsonlSourceConfig
    outputs = (Port("out", frozenset({RecordKind.REQUEST})), ERROR_PORT)
    guarantee = (
        "exactly once with jsonl_sink, across kill -9; with any other sink at most once in a run, and each run reads "
        "the file from its beginning"
    )
    reads = "path"
    example = """\
operators:
  source: {type: jsonl_source, path: questions.jsonl, max_line_bytes: 1048576}
  dead: {type: jsonl_sink, path: dead.jsonl}
edges:
  - source -> tokenize
  - source.error -> dead
"""

    def __init__(self, config: JsonlSourceConfig, context: OperatorContext) -> None:
        super().__init__(config, context)
        self.path = context.base_dir / config.path
        self.size_bytes = 0
        self.read_bytes = 0  # for a progress display: reaches size_bytes at the end
        self.skipped_lines = 0  # finished by earlier runs
        self._fd = -1
        self._fingerprint = ""
        self._finished = LineSet()

    async def open(self) -> None:
        """Open the file and learn what of it is finished; sinks are open by now.

        Raises:
            ConfigError: there is no such file, it is not a regular file, or it cannot be read.
            SourceChangedError: the output was begun from another content, or a restarted source finds another.
        """
        path = self.config.path
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror} (looked for {self.path})") from error
        try:
            self._begun = os.fstat(self._fd)
            if not stat.S_ISREG(self._begun.st_mode):
                raise ConfigError(f"{path}: is not a regular file; feed a pipe or a terminal through stdin_source")
            self.size_bytes = self._begun.st_size
            self._fingerprint = await anyio.to_thread.run_sync(
                fingerprint_file, self._fd, self.size_bytes, anyio.from_thread.check_cancelled
            )
            self._finished = self._find_finished()
        except BaseException:
            await self.close()
            raise

    async def run(self, inlet: AsyncIterator[list[Any]], out: Outlet) -> None:
        """Send every line that is not finished yet.

        Raises:
            SourceChangedError: the file changes while it is read.
        """
        splitter = LineSplitter(self.config.max_line_bytes)
        while self.read_bytes < self.size_bytes:
            chunk = await anyio.to_thread.run_sync(os.pread, self._fd, _CHUNK_BYTES, self.read_bytes)
            self._check_unchanged()
            self.read_bytes += len(chunk)
            await self._send(splitter.feed(chunk), out)
        await self._send(splitter.finish(), out)

    async def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    async def _send(self, lines: list[Line], out: Outlet) -> None:
        pending = [line for line in lines if line.number not in self._finished]
        self.skipped_lines += len(lines) - len(pending)
        sent = self.context.resume.sent
        already = sent.get(self.context.name)
        if already is not None:
            pending = [line for line in pending if line.number > already.last_line]

        def note(last_line: int) -> None:
            sent[self.context.name] = SentLines(self._fingerprint, last_line)

        await send_lines(out, pending, self.config.path, self._fingerprint, self.config, note)

    def _find_finished(self) -> LineSet:
        """The finished lines of this file, under every name that it had in earlier runs."""
        already = self.context.resume.sent.get(self.context.name)
        if already is not None and already.fingerprint != self._fingerprint:
            raise SourceChangedError(self._explain_change_while_read())
        resume, base_dir, path = self.context.resume, self.context.base_dir, self.config.path
        for entry in resume:
            if entry.fingerprint != self._fingerprint and is_same_file(base_dir, entry.file, path):
                raise SourceChangedError(self._explain_change(entry))
        names = resume.names_of(path, self._fingerprint, base_dir)
        return resume.lines_finished(self.context.name, names, self._fingerprint)

    def _explain_change(self, entry: FinishedLines) -> str:
        outputs = " and ".join(sorted(entry.outputs))
        size = fingerprinted_size(entry.fingerprint)
        what = "has changed"
        if size < self.size_bytes and fingerprint_file(self._fd, size) == entry.fingerprint:
            what = f"has grown from {size} to {self.size_bytes} bytes"
        return (
            f"{self.config.path}: {what} since {outputs} was begun from it: restore it to finish that output, "
            "put new lines in a file of their own, or write to another output"
        )

    def _check_unchanged(self) -> None:
        now = os.fstat(self._fd)
        if (now.st_size, now.st_mtime_ns) != (self._begun.st_size, self._begun.st_mtime_ns):
            raise SourceChangedError(self._explain_change_while_read())

    def _explain_change_while_read(self) -> str:
        return (
            f"{self.config.path}: was changed while it was read; its results so far belong to the old content: "
            "restore it, or start again with another output"
        )
