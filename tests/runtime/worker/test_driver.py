"""The step loop as a task: woken from its own thread and from any other."""

from __future__ import annotations

import anyio
import pytest

from sageLLM.runtime.worker.driver import TaskDriver


@pytest.mark.parametrize(
    ("backend", "options"),
    # asyncio tells of calls from a foreign thread only in its debug mode
    [("asyncio", {"debug": True}), ("trio", {})],
)
def test_a_request_is_cancelled_from_another_thread(bench, backend, options):
    b = bench()
    request = b.sequence([1, 2, 3]).request

    async def main():
        driver = TaskDriver(b.worker)
        with anyio.fail_after(10):
            async with anyio.create_task_group() as tasks:
                driver.start(tasks)
                await anyio.wait_all_tasks_blocked()
                await anyio.to_thread.run_sync(b.worker.cancel, [request])
                await anyio.wait_all_tasks_blocked()
                assert not b.worker._inbox
                driver.stop()

    anyio.run(main, backend=backend, backend_options=options)
    assert request.cancelled
