"""How often deltas of streams leave the worker: as often as what is downstream can pass them on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel

from ..runtime.worker.driver import TURNS_TO_A_CALLER

if TYPE_CHECKING:
    from collections.abc import Callable

_REST_PER_PASS = 3.0  # passing deltas on takes a quarter of the event loop's time at most
_LONGEST_REST_S = 0.03


class DeltaPace:
    """Lets deltas rest while the last ones are being passed on, and for a while after that.

    Where steps take longer than passing their deltas on, as with models of any size, none rests when it comes.
    `rest_deltas` is the worker's.
    """

    def __init__(self, rest_deltas: Callable[[bool], None]) -> None:
        self._rest_deltas = rest_deltas
        self.rests = False
        rest_deltas(False)

    def begin_rest(self) -> None:
        """`rest` is about to run."""
        self.rests = True
        self._rest_deltas(True)

    async def rest(self) -> None:
        """Let the event loop pass on what has come, and rest three times as long as that took."""
        begun = anyio.current_time()
        for _ in range(TURNS_TO_A_CALLER):
            await anyio.lowlevel.checkpoint()
        await anyio.sleep(min(_LONGEST_REST_S, _REST_PER_PASS * (anyio.current_time() - begun)))
        self.rests = False
        self._rest_deltas(False)
