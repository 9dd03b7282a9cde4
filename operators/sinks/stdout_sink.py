"""Results to standard output."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, Literal

import anyio

from ...graph.operator_spec import ANY_KIND
from ...records import Completion, DeadLetter, KVEvent, TokenDelta
from ...runtime.flow.operator import Operator, OperatorConfig, Port, RecordKind, operator
from .result_format import dump_line

if TYPE_CHECKING:
    from ...runtime.flow.operator import OperatorContext, Outlet

_SLICE = 4096  # a pipe that is writable takes this much without blocking


class StdoutSinkConfig(OperatorConfig):
    """`json` prints the lines that jsonl_sink writes, `text` only what the model said: no embeddings, no KV events."""

    format: Literal["json", "text"] = "json"


@operator("stdout_sink")
class StdoutSink(Operator[StdoutSinkConfig]):
    """Prints results, as JSON lines or as plain text.

    At most once: nothing is remembered. With `format: text` the tokens of a streaming request appear as they come;
    while one request streams, others are printed whole when they end. A reader that closes the pipe (`| head`) ends
    the flow cleanly, and what it does not read is dropped. A slow reader slows the pipeline down, nothing else.
    """

    config_model = StdoutSinkConfig
    inputs = (Port("in", ANY_KIND - {RecordKind.REQUEST, RecordKind.SEQUENCE}),)
    guarantee = "at most once in a run; the next run of a jsonl_source begins at the file's beginning"
    example = """\
operators:
  show: {type: stdout_sink, format: text}
edges:
  - detokenize -> show
"""

    def __init__(self, config: StdoutSinkConfig, context: OperatorContext) -> None:
        super().__init__(config, context)
        self._fd: int | None = None
        self._closed_by_reader = False
        self._live: str | None = None  # the request whose deltas are being printed
        self._shown = 0  # characters of it
        self._not_live: set[str] = set()  # streaming requests that began while another was live

    async def open(self) -> None:
        sys.stdout.flush()
        try:
            self._fd = sys.stdout.fileno()
        except OSError:  # something in memory stands in for stdout
            self._fd = None

    async def process(self, records: list[Any], out: Outlet) -> None:
        as_bytes = self._as_text if self.config.format == "text" else _as_json
        data = b"".join(as_bytes(record) for record in records)
        if not data or self._closed_by_reader:
            return
        try:
            await self._write(data)
        except BrokenPipeError:
            self._closed_by_reader = True
            self.context.request_drain("standard output was closed by its reader")

    async def _write(self, data: bytes) -> None:
        if self._fd is None:
            sys.stdout.write(data.decode())
            return
        rest = memoryview(data)
        while rest:
            try:
                await anyio.wait_writable(self._fd)
                part = rest[:_SLICE]
            except PermissionError:  # a regular file or /dev/null: not pollable, and never blocks for long
                part = rest
            rest = rest[os.write(self._fd, part) :]

    def _as_text(self, record: Any) -> bytes:
        if isinstance(record, TokenDelta):
            return self._show_delta(record).encode("utf-8", "replace")
        if isinstance(record, DeadLetter):
            return f"error: {record.error}\n".encode()
        if isinstance(record, KVEvent):
            return b""
        assert isinstance(record, Completion)
        if record.request.pooling is not None:
            return b""
        request_id = record.request_id
        self._not_live.discard(request_id)
        shown = 0
        if request_id == self._live:
            shown, self._live, self._shown = self._shown, None, 0
        return "".join(f"{choice.text[shown:]}\n" for choice in record.choices).encode("utf-8", "replace")

    def _show_delta(self, delta: TokenDelta) -> str:
        request_id = delta.request_id
        if delta.sequence.request.sampling.n > 1 or request_id in self._not_live:
            return ""
        if self._live is None:
            self._live = request_id
        elif self._live != request_id:
            self._not_live.add(request_id)
            return ""
        self._shown += len(delta.text)
        return delta.text


def _as_json(record: Any) -> bytes:
    return b"" if isinstance(record, TokenDelta) else dump_line(record)
