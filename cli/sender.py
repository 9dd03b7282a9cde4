"""What `sagellm send` does: a file's requests over one connection, so many at a time, and their ends."""

from __future__ import annotations

from collections import Counter, deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
import msgpack
from pydantic_core import from_json

from ..errors import FlowError
from ..operators.sinks.reply_format import TERMINAL, error_fields

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..operators.sources.net.client import Session

_CUT = (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError, OSError)
_ID_NAMES = ("request_id", "id", "custom_id")


class Sender:
    """Sends lines as requests and hands over each request's last event; one that is shed is sent again later.

    `on_end` is called with every last event; `on_change` whenever `counts` or `in_flight` have changed.
    """

    def __init__(
        self,
        session: Session,
        max_in_flight: int,
        on_end: Callable[[dict[str, Any]], None],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.counts: Counter[str] = Counter()  # of last events, by kind
        self.retried = 0
        self._session = session
        self._max_in_flight = max_in_flight
        self._on_end, self._on_change = on_end, on_change
        self._pending: dict[str, tuple[int, dict[str, Any]]] = {}  # message and request, by id: what is in flight
        self._ids: dict[int, str] = {}  # by message
        self._writing = anyio.Lock()
        self._sent = session.greeted
        self._again: deque[dict[str, Any]] = deque()
        self._not_before = 0.0
        self._all_sent = False  # but for what is sent again
        self._changed = anyio.Event()

    @property
    def in_flight(self) -> int:
        return len(self._pending)

    async def run(self, lines: Iterable[bytes]) -> None:
        """Send all, and wait for all ends. Blank lines are left out; one that is no JSON object ends as an error here.

        Raises:
            FlowError: the server has turned us away, or the connection has ended before every request had.
        """
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._read)
            for number, line in enumerate(lines, 1):
                if line.strip() and (request := self._parse(line, number)) is not None:
                    await self._send(request)
            self._all_sent = True
            while self._pending or self._again:
                if self._again and len(self._pending) < self._max_in_flight:
                    await self._send(self._again.popleft())
                else:
                    await self._change()
            tasks.cancel_scope.cancel()

    def _parse(self, line: bytes, number: int) -> dict[str, Any] | None:
        try:
            request = from_json(line)
        except ValueError as error:
            why = str(error).replace("at line 1 column", "at column")
            self._end(error_fields(f"line-{number}", f"line {number} is not JSON: {why}"))
            return None
        if not isinstance(request, dict):
            self._end(error_fields(f"line-{number}", f"line {number} is no JSON object"))
            return None
        if all(request.get(name) is None for name in _ID_NAMES):
            request["request_id"] = f"line-{number}"
        return request

    async def _send(self, request: dict[str, Any]) -> None:
        request_id = _id_of(request)
        while len(self._pending) >= self._max_in_flight or request_id in self._pending:
            await self._change()
        pause = self._not_before - anyio.current_time()
        if pause > 0:
            await anyio.sleep(pause)
        self._sent += 1
        self._pending[request_id] = self._sent, request
        self._ids[self._sent] = request_id
        framing = self._session.framing
        with suppress(*_CUT):  # `_read` meets it too, and says so
            await self._write(framing.encode(request, framing.writes_msgpack))
        self._on_change()

    async def _write(self, data: bytes) -> None:
        async with self._writing:
            await self._session.stream.send(data)

    async def _change(self) -> None:
        self._changed = anyio.Event()
        await self._changed.wait()

    async def _read(self) -> None:
        framing = self._session.framing
        while True:
            try:
                data = await self._session.stream.receive()
            except _CUT:
                break
            try:
                for frame in framing.receive(data):
                    self._take(msgpack.unpackb(frame.data) if frame.is_msgpack else from_json(frame.data))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise FlowError("what answers there does not speak this protocol") from error
            if answer := framing.data_to_send():
                await self._write(answer)
            self._changed.set()
            self._on_change()
            if framing.is_closed:
                break
        if self._all_sent and not (self._pending or self._again):
            return
        rest = "" if self._all_sent else ", before the whole file was sent"
        ended, waiting = sum(self.counts.values()), len(self._pending) + len(self._again)
        raise FlowError(f"the connection ended with {waiting} requests in flight and {ended} ended{rest}")

    def _take(self, event: dict[str, Any]) -> None:
        request_id = event["request_id"]
        if event["event"] not in TERMINAL:
            return
        if request_id is None:
            request_id = self._ids.get(event.get("message", 0))
            if request_id is None:
                raise FlowError(event["error"])
            event["request_id"] = request_id
        if request_id not in self._pending:
            return
        number, request = self._pending.pop(request_id)
        del self._ids[number]
        if event["event"] == "shed":
            self.retried += 1
            self._again.append(request)
            self._not_before = max(self._not_before, anyio.current_time() + event["retry_after_s"])
        else:
            self._end(event)

    def _end(self, event: dict[str, Any]) -> None:
        self.counts[event["event"]] += 1
        self._on_end(event)
        self._on_change()


def _id_of(request: dict[str, Any]) -> str:
    return str(next(request[name] for name in _ID_NAMES if request.get(name) is not None))
