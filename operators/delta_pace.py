"""How often deltas of streams leave the worker's door: as often as what is downstream can pass them on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel

from ..records import TokenDelta
from ..runtime.worker.driver import TURNS_TO_A_CALLER

if TYPE_CHECKING:
    from collections.abc import Callable

_REST_PER_PASS = 3.0  # passing deltas on takes a quarter of the event loop's time at most
_LONGEST_REST_S = 0.03


class DeltaPace:
    """Joins the deltas of a choice that come while the last ones are being passed on, and for a rest after that.

    The first delta of a choice and the last ones of a sequence do not wait. Where steps take longer than passing their
    deltas on, as with models of any size, none does.
    """

    def __init__(self, on_rested: Callable[[], None]) -> None:
        self._on_rested = on_rested
        self._held: dict[int, dict[int, TokenDelta | None]] = {}  # by id of the sequence, and choice
        self._waits = self._resting = False

    @property
    def is_due(self) -> bool:
        """Whether something is held, and its rest is over."""
        return self._waits and not self._resting

    def take(self, records: list[Any]) -> list[Any]:
        """Those that go on at once; sequences, which have ended, with the deltas of theirs before them."""
        going: list[Any] = []
        for record in records:
            if type(record) is not TokenDelta:
                going += filter(None, self._held.pop(id(record), {}).values())
                going.append(record)
                continue
            choices = self._held.setdefault(id(record.sequence), {})
            if record.choice not in choices:
                choices[record.choice] = None
                going.append(record)
            elif (held := choices[record.choice]) is not None:
                held.tokens += record.tokens
            else:
                choices[record.choice] = record
                self._waits = True
        return going

    def release(self) -> list[TokenDelta]:
        """What is held; `rest` is to begin when it is sent."""
        self._waits, self._resting = False, True
        released = []
        for choices in self._held.values():
            for choice, held in choices.items():
                if held is not None:
                    released.append(held)
                    choices[choice] = None
        return released

    async def rest(self) -> None:
        """Let the event loop pass on what was released, and rest three times as long as that took."""
        begun = anyio.current_time()
        for _ in range(TURNS_TO_A_CALLER):
            await anyio.lowlevel.checkpoint()
        await anyio.sleep(min(_LONGEST_REST_S, _REST_PER_PASS * (anyio.current_time() - begun)))
        self._resting = False
        self._on_rested()
