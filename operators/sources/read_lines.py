"""From lines to requests and dead letters: what every source of JSON lines does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ...errors import RequestError
from ...records import DeadLetter, Request, SourcePosition

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ...runtime.flow.operator import Outlet
    from .lines import Line


class LineLimits(Protocol):
    """What the configurations of sources of lines have in common."""

    @property
    def max_line_bytes(self) -> int: ...
    @property
    def batch_size(self) -> int: ...


_BOM = b"\xef\xbb\xbf"


def read_requests(
    lines: Iterable[Line], file: str, fingerprint: str, max_line_bytes: int
) -> tuple[list[Request], list[DeadLetter]]:
    """Parse lines, blank ones left out. A line that is no request becomes a dead letter with its position."""
    from .request_format import parse_request  # what only declares the operator does without

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


async def send_lines(
    out: Outlet,
    lines: Sequence[Line],
    file: str,
    fingerprint: str,
    limits: LineLimits,
    on_batch: Callable[[int], None] = lambda last_line: None,
) -> None:
    """Parse lines and send them on, `batch_size` at once; `on_batch` is told a batch's last line before it is sent."""
    for start in range(0, len(lines), limits.batch_size):
        batch = lines[start : start + limits.batch_size]
        requests, letters = read_requests(batch, file, fingerprint, limits.max_line_bytes)
        on_batch(batch[-1].number)
        if requests:  # first: the share of failed records is watched, and a batch is judged as a whole
            await out.send(requests)
        if letters:
            await out.reject(letters)
