"""From SubmitRequests to Completions: what is being computed, and what has been."""

from __future__ import annotations

import threading
from collections import deque
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from ...operators.sage_items import failed_item, has_failed, parse_item
from .function import output_item

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...records import Completion, DeadLetter
    from .engines import EngineHandle

POLL_S = 0.2
"""How long Completions waits on a thread of its own, before SAGE may look whether it was stopped."""


class Marker(Enum):
    """Items that mean something to SubmitRequests."""

    END = "end"


END: Final = Marker.END
"""The last item of a flow: no request comes after it, so Completions ends when all that came have been answered."""


class Channel:
    """Requests in, their outputs out in the order in which they end. Any thread may call.

    While something is in it, it uses the engine.
    """

    def __init__(self, key: tuple[int, str], handle: EngineHandle) -> None:
        self._key = key
        self._handle = handle
        self._outputs: deque[dict[str, Any]] = deque()
        self._in_flight = 0
        self._waiting = 0  # to be in flight
        self._has_ended = False
        self._is_closed = False
        self._submitter: int | None = None  # the last thread that submitted
        self._changed = threading.Condition()

    def submit(self, item: Any, options: Mapping[str, Any], max_in_flight: int) -> bool:
        """Have an item computed; waits while that many are. What cannot be computed is an output with an `error`.

        Returns:
            False where the channel has closed: the item is another one's.
        """
        with self._changed:
            if self._is_closed:
                return False
            self._submitter, self._has_ended = threading.get_ident(), False
            self._waiting += 1
            self._changed.wait_for(lambda: self._in_flight < max_in_flight)
            self._waiting -= 1
            self._in_flight += 1
        if has_failed(item):
            self._put(item)
            return True
        try:
            request = parse_item(item, options)
            self._handle.engine_for(self).submit([(request, partial(self._finish, item))])
        except Exception as error:
            self._put(failed_item(error, item))
        return True

    def _finish(self, item: Any, record: Completion | DeadLetter) -> None:
        self._put(output_item(record, item))

    def _put(self, output: dict[str, Any]) -> None:
        with self._changed:
            self._outputs.append(output)
            self._in_flight -= 1
            self._changed.notify_all()

    def end(self) -> None:
        """No more is submitted."""
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def take(self) -> dict[str, Any] | Marker | None:
        """The next output; None if there is none yet; END, once, when all is out after `end`.

        On the thread that also submits it waits only after `end`, else it would keep itself from submitting; on another
        one for a fifth of a second.
        """
        with self._changed:
            alone = self._submitter != threading.get_ident()
            wait_s = POLL_S if alone else None if self._has_ended else 0.0
            self._changed.wait_for(lambda: self._outputs or self._is_drained, wait_s)
            if self._outputs:
                return self._outputs.popleft()
        return END if self.close_if_drained() else None

    @property
    def _is_drained(self) -> bool:
        return self._has_ended and not (self._waiting or self._in_flight or self._outputs)

    def close_if_drained(self) -> bool:
        """Forget the channel if it has ended and all is out; the next flow with its name then gets another.

        Returns:
            Whether that is so.
        """
        with _LOCK, self._changed:  # nobody submits to it meanwhile
            if not self._is_drained:
                return False
            self._is_closed = True
            if _CHANNELS.get(self._key) is self:
                del _CHANNELS[self._key]
        self._handle.release(self)
        return True


_CHANNELS: dict[tuple[int, str], Channel] = {}
_LOCK = threading.Lock()


def find_channel(handle: EngineHandle, name: str) -> Channel:
    """The channel of that name to an engine, until it has ended; then a new one."""
    key = (id(handle), name)
    with _LOCK:
        return _CHANNELS.setdefault(key, Channel(key, handle))
