"""SIGTERM and SIGINT: the first one drains a flow, the second one aborts it."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    from .flow import Flow


async def drain_on_signals(flow: Flow) -> None:
    """Obey signals until cancelled. Main thread only."""
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        draining = False
        async for received in signals:
            name = signal.Signals(received).name
            if draining:
                flow.abort(f"second signal, {name}")
                return
            flow.drain(name)
            draining = True
