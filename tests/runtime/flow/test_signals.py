"""The first SIGTERM or SIGINT drains, the second aborts."""

from __future__ import annotations

import os
import signal

import anyio
import pytest

from sageLLM.errors import FlowError
from sageLLM.runtime.flow.signals import drain_on_signals

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request):
    """Real time on both: signals do not know of a virtual clock."""
    return request.param


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT], [signal.SIGTERM, signal.SIGINT]])
async def test_signals(lab, signals):
    begun = anyio.Event()

    class Sink(lab.Sink):
        async def process(self, records, out):
            await super().process(records, out)
            begun.set()
            if len(signals) > 1:
                await anyio.sleep_forever()

    flow = lab.flow({"source": (lab.Source, {"count": None}), "sink": (Sink, {"buffer": 4})}, ["source -> sink"])

    async def send_signals():
        await begun.wait()
        for number in signals:
            os.kill(os.getpid(), number)
            for _ in range(1000):
                await anyio.lowlevel.checkpoint()
                if flow.report().drained is not None:
                    break

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(drain_on_signals, flow)
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(send_signals)
        if len(signals) == 1:
            assert (await flow.run()).drained == signals[0].name
        else:
            with pytest.raises(FlowError, match="aborted: second signal, SIGINT"):
                await flow.run()
        tasks.cancel_scope.cancel()
    counts = lab.counts()
    assert counts["accepted"] == counts.get("done", 0) + counts.get("cancelled", 0)
