"""Results to a file of JSON lines, exactly once."""

from __future__ import annotations

import fcntl
import os
import stat
from typing import TYPE_CHECKING, Annotated, Any, Literal

import anyio
from pydantic import Field

from ...errors import ConfigError, OutputLockedError
from ...graph.operator_spec import ANY_KIND
from ...records import Completion, DeadLetter, FinishReason, KVEvent
from ...runtime.flow.operator import Operator, OperatorConfig, Port, RecordKind, operator
from .interval_sync import IntervalSync
from .output_index import scan_output
from .result_format import dump_line

if TYPE_CHECKING:
    from ...runtime.flow.operator import OperatorContext, Outlet
    from ...runtime.flow.resume import LineSet, ResumeIndex


class JsonlSinkConfig(OperatorConfig):
    """`path` is relative to the current directory. `fsync` is when what was written is forced to the disk."""

    path: Annotated[str, Field(min_length=1)]
    fsync: Literal["never", "interval", "always"] = "interval"


@operator("jsonl_sink")
class JsonlSink(Operator[JsonlSinkConfig]):
    """Writes completions, dead letters and KV events to a file, one JSON object a line (result_format.py shows them).

    Exactly once together with jsonl_source. When it opens, it locks the file against other processes, drops a last
    line that was torn by a kill, and publishes which input lines stand in it; sources do not send those again.
    Records of one list are written in one piece. To compute a line again, delete its line from the output. Behind a
    tee a line is computed again until it stands in every file that its copies go to, and written where it is missing.

    What can be lost, and is then computed again by the next run:
    - kill -9: what was not written yet; `fsync` makes no difference.
    - power loss: with `fsync: never` what the system had not yet written by itself (about 30 s), with `interval` the
      last second, with `always` nothing that was written: each list of records is on the disk before the next is taken.

    A cancelled request that came from a file is not written, so that the next run computes it. TokenDeltas are ignored.
    """

    config_model = JsonlSinkConfig
    inputs = (Port("in", ANY_KIND - {RecordKind.REQUEST, RecordKind.SEQUENCE}),)
    guarantee = "exactly once with jsonl_source, across kill -9; at most once with stdin_source"
    writes = "path"
    example = """\
operators:
  done: {type: jsonl_sink, path: answers.jsonl, fsync: always}
edges:
  - detokenize -> done
"""

    def __init__(self, config: JsonlSinkConfig, context: OperatorContext) -> None:
        super().__init__(config, context)
        self.path = context.base_dir / config.path
        self._fd = -1
        self._size = 0
        self._syncer: IntervalSync | None = None
        self._before: ResumeIndex | None = None  # what earlier runs wrote, not failed instances of this one
        self._lines_before: dict[tuple[str, str], LineSet] = {}  # of it, by input

    async def open(self) -> None:
        """Lock the file, drop a torn last line, publish the finished lines.

        Raises:
            OutputLockedError: another process, or another sink of this flow, writes this file.
            ConfigError: the file cannot be written, or holds something that no jsonl_sink wrote.
        """
        path = self.config.path
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error.strerror} ({self.path})") from error
        try:
            await self._take_over()
        except BaseException:
            self._release()
            raise

    async def process(self, records: list[Any], out: Outlet) -> None:
        """Write the terminal records.

        Raises:
            OSError: the write failed (no space, a file system error), and nothing of the list stays in the file; or
                an earlier fsync did.
        """
        lines = [dump_line(record) for record in records if _is_written(record) and not self._stands_already(record)]
        if not lines:
            return
        self._write(b"".join(lines))
        if self.config.fsync == "always":
            await anyio.to_thread.run_sync(os.fsync, self._fd)
        elif self._syncer is not None:
            self._syncer.written()

    async def close(self) -> None:
        if self._fd < 0:
            return
        try:
            if self._syncer is not None:
                self._syncer.stop()
            if self.config.fsync != "never":
                os.fsync(self._fd)
        finally:
            self._release()

    async def _take_over(self) -> None:
        path = self.config.path
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            raise ConfigError(f"{path}: is not a regular file; use stdout_sink and redirect it")
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputLockedError(
                f"{path}: another sink or another run writes this file: wait for it, or name another output"
            ) from None
        finished, self._size = await anyio.to_thread.run_sync(
            scan_output, self._fd, path, anyio.from_thread.check_cancelled
        )
        os.ftruncate(self._fd, self._size)
        if self.config.fsync != "never":
            self._sync_folder()
        if self.config.fsync == "interval":
            self._syncer = IntervalSync(self._fd)
        self.context.resume.publish(finished, self.context.name)
        self._before = self.context.kept.setdefault("before", finished)

    def _stands_already(self, record: Completion | DeadLetter | KVEvent) -> bool:
        """Whether an earlier run wrote that line here, but not everywhere, so that it was computed again."""
        if isinstance(record, KVEvent):
            return False
        src = record.src if isinstance(record, DeadLetter) else record.request.src
        if src is None or self._before is None:
            return False
        key = (src.file, src.fingerprint)
        if key not in self._lines_before:
            names = self._before.names_of(src.file, src.fingerprint, self.context.base_dir)
            self._lines_before[key] = self._before.lines_of(names, src.fingerprint)
        return src.line in self._lines_before[key]

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError:
            os.ftruncate(self._fd, self._size)
            raise
        self._size += len(data)

    def _sync_folder(self) -> None:
        """Make a new file's name itself survive a power loss."""
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _release(self) -> None:
        os.close(self._fd)  # and with it the lock
        self._fd = -1


def _is_written(record: Any) -> bool:
    if isinstance(record, Completion):
        cancelled = any(choice.finish_reason is FinishReason.CANCELLED for choice in record.choices)
    elif isinstance(record, DeadLetter):
        cancelled = record.request is not None and record.request.cancelled
    else:
        return isinstance(record, KVEvent)
    request = record.request
    computed_again = request is not None and request.src is not None and request.src.fingerprint
    return not (cancelled and computed_again)
