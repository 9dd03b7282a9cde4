"""A mailbox takes items from any thread and never makes the producer wait."""

from __future__ import annotations

import threading

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from sageLLM.runtime.flow.mailbox import Mailbox

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request):
    """Real time on both: threads do not know of a virtual clock."""
    return request.param


async def test_everything_there_is_comes_as_one_list():
    mailbox: Mailbox[int] = Mailbox()
    mailbox.put([1, 2])
    mailbox.put([3])
    assert await mailbox.get() == [1, 2, 3]


async def test_an_empty_put_wakes_the_consumer():
    mailbox: Mailbox[int] = Mailbox()
    mailbox.put([])
    assert await mailbox.get() == []


async def test_a_put_on_the_own_thread_wakes_a_consumer_that_waits():
    mailbox: Mailbox[int] = Mailbox()
    got = []

    async def consume():
        got.append(await mailbox.get())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(consume)
        await anyio.wait_all_tasks_blocked()
        mailbox.put([7])
    assert got == [[7]]


async def test_threads_put_without_loss_or_reordering():
    mailbox: Mailbox[tuple[int, int]] = Mailbox()
    left = [4]
    lock = threading.Lock()

    def produce(name):
        for index in range(500):
            mailbox.put([(name, index)])
        with lock:
            left[0] -= 1
            if not left[0]:
                mailbox.close()

    got = []
    async with anyio.create_task_group() as tasks:
        for name in range(4):
            tasks.start_soon(anyio.to_thread.run_sync, produce, name)
        async for items in mailbox:
            got += items
    for name in range(4):
        assert [index for producer, index in got if producer == name] == list(range(500))


async def test_putting_never_waits_for_the_loop():
    mailbox: Mailbox[int] = Mailbox()
    done = threading.Event()

    def produce():
        for index in range(100):
            mailbox.put([index])
        done.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(mailbox.get)
        await anyio.wait_all_tasks_blocked()
        threading.Thread(target=produce).start()
        assert done.wait(timeout=10)  # the loop is blocked right here, and the producer ends all the same


async def test_a_cancelled_get_takes_nothing():
    mailbox: Mailbox[int] = Mailbox()
    with anyio.move_on_after(0.01) as scope:
        await mailbox.get()
    assert scope.cancelled_caught
    mailbox.put([1])
    assert await mailbox.get() == [1]


async def test_a_consumer_that_gets_something_in_every_turn_can_be_cancelled():
    mailbox: Mailbox[int] = Mailbox()
    scope = anyio.CancelScope()

    async def consume():
        with scope:
            async for _ in mailbox:
                pass
        tasks.cancel_scope.cancel()

    async def produce():
        for turn in range(100):
            mailbox.put([turn])
            await anyio.lowlevel.checkpoint()
        raise AssertionError("the consumer has not noticed")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(consume)
        tasks.start_soon(produce)
        await anyio.lowlevel.checkpoint()
        await anyio.lowlevel.checkpoint()
        scope.cancel()


async def test_close_ends_the_iteration_after_what_is_there():
    mailbox: Mailbox[int] = Mailbox()
    mailbox.put([1])
    mailbox.close()
    mailbox.close()
    mailbox.put([2])
    assert [items async for items in mailbox] == [[1]]
    assert await mailbox.get() == []


async def test_close_from_a_thread_wakes_a_consumer_that_waits():
    mailbox: Mailbox[int] = Mailbox()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, mailbox.close)
        assert [items async for items in mailbox] == []


def test_a_put_after_the_consumers_loop_has_ended_is_harmless():
    for backend in ("asyncio", "trio"):
        mailbox: Mailbox[int] = Mailbox()

        async def give_up(mailbox):
            with anyio.move_on_after(0.001):
                await mailbox.get()

        anyio.run(give_up, mailbox, backend=backend)
        mailbox.put([1])
