"""From lines to requests and dead letters: what every source of JSON lines does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import RequestError
from ...records import DeadLetter, Request, SourcePosition
from .request_format import parse_request

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .lines import Line

_BOM = b"\xef\xbb\xbf"


def read_requests(
    lines: Iterable[Line], file: str, fingerprint: str, max_line_bytes: int
) -> tuple[list[Request], list[DeadLetter]]:
    """Parse lines, blank ones left out. A line that is no request becomes a dead letter with its position."""
    requests: list[Request] = []
    letters: list[DeadLetter] = []
    for line in lines:
        src = SourcePosition(file, line.number, line.offset, fingerprint)
        if line.oversize:
            error = f"the line has {line.size} bytes, max_line_bytes is {max_line_bytes}"
            letters.append(DeadLetter(error, line.raw(), src))
            continue
        data = line.data.removeprefix(_BOM) if line.number == 1 else line.data
        if not data.strip():
            continue
        try:
            request = parse_request(data, f"line-{line.number}", src)
        except RequestError as failure:
            letters.append(DeadLetter(str(failure), line.raw(), src))
        else:
            request.raw = line.raw()
            requests.append(request)
    return requests, letters
