"""The step loop as a task: woken from its own thread and from any other."""

from __future__ import annotations

import anyio
import pytest

from sageLLM.runtime.worker.driver import TaskDriver
from sageLLM.runtime.worker.worker import Worker


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


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_preempted_prompt_is_woken_when_the_decode_worker_has_blocks_again(bench, backend, monkeypatch):
    """Its worker is idle by then, and would not look again on its own account."""
    monkeypatch.setattr(Worker, "idle_limit_s", None)
    b = bench(policy="fair_share", mode="strict", blocks=48, max_step_tokens=16, commit=False)
    flood = [b.sequence([n] * 64, 4, tenant="noisy") for n in range(3)]
    quiet = b.sequence([77] * 16, 60, tenant="quiet")
    prefill, decode = b.worker.workers

    def grant():
        if granted := b.waiting.take_granted():
            b.worker.submit_prefill(granted)

    b.worker.on_leases_returned = grant
    b.offer(*flood)
    grant()
    prefill.step()
    b.offer(quiet)
    grant()
    while prefill.step():
        pass
    assert prefill.blocks.has_preempted

    async def main():
        async with anyio.create_task_group() as tasks:
            drivers = [TaskDriver(worker) for worker in (prefill, decode)]
            for driver in drivers:
                driver.start(tasks)
            await anyio.wait_all_tasks_blocked()
            assert len(b.finished) == 4
            for driver in drivers:
                driver.stop()

    anyio.run(main, backend=backend)
    b.check_nothing_leaks()
