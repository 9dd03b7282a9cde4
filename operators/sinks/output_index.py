"""Learn from an output file which lines of which inputs are finished, and where its last whole line ends."""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from ...errors import ConfigError
from ...runtime.flow.resume import ResumeIndex

if TYPE_CHECKING:
    from collections.abc import Callable

_CHECK_EVERY = 4096  # lines
_KV_EVENT = b'{"kv_event":'
_OPENINGS = (b'{"request_id":', b'{"src":', _KV_EVENT)


class _Position(TypedDict):
    file: str
    line: int
    fingerprint: str


class _OutputLine(TypedDict):
    src: _Position | None


@cache
def _adapter() -> TypeAdapter[Any]:
    return TypeAdapter(_OutputLine)


def scan_output(fd: int, name: str, check: Callable[[], None] = lambda: None) -> tuple[ResumeIndex, int]:
    """Return the finished lines that the output holds and the size of its whole lines, in bytes.

    Reads line by line; memory is one bit per finished line. What follows the last newline is a line that a killed
    process began: the caller cuts it off. `check` is called now and then and may raise to give up.

    Raises:
        ConfigError: the file holds something that jsonl_sink did not write; nothing of it is touched.
    """
    finished = ResumeIndex()
    end = 0
    validate = _adapter().validate_json
    with open(os.dup(fd), "rb") as output:
        output.seek(0)
        for number, line in enumerate(output, 1):
            if number % _CHECK_EVERY == 0:
                check()
            if not line.startswith(_OPENINGS) and not _is_torn(line):
                raise ConfigError(_explain_foreign(name, number))
            if not line.endswith(b"\n"):
                break
            if line.startswith(_KV_EVENT):
                end += len(line)
                continue
            try:
                src = validate(line)["src"]
            except ValidationError:
                raise ConfigError(_explain_foreign(name, number)) from None
            end += len(line)
            if src is not None and src["fingerprint"] and src["line"] > 0:
                entry = finished.entry(src["file"], src["fingerprint"])
                entry.lines.add(src["line"])
                entry.outputs.add(name)
    return finished, end


def _is_torn(line: bytes) -> bool:
    """Whether this is the begin of a line of ours: shorter than its opening, or zeroes that a power loss left."""
    written = line.rstrip(b"\0")
    return not line.endswith(b"\n") and any(opening.startswith(written) for opening in _OPENINGS)


def _explain_foreign(name: str, number: int) -> str:
    return (
        f"{name}:{number}: this line was not written by jsonl_sink: name another output file, or move this one away "
        f"(if a power loss damaged it, keep the lines before with `head -n {number - 1}`; the rest is computed again)"
    )
