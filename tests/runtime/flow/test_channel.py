"""Channels are bounded in records, keep each sender's order, and are fair."""

from __future__ import annotations

import anyio
import pytest

from sageLLM.runtime.flow.channel import Channel

pytestmark = pytest.mark.anyio


async def read_all(channel):
    lists = []
    while records := await channel.receive():
        lists.append(records)
    return lists


async def test_a_list_larger_than_the_room_is_split_and_never_more_than_the_capacity_waits():
    channel = Channel(senders=1, capacity=4)
    largest = 0

    async def send():
        await channel.send(list(range(11)))
        channel.close_sender()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(send)
        got = []
        while records := await channel.receive():
            largest = max(largest, len(records) + len(channel))
            got += records
    assert got == list(range(11)) and largest <= 4


async def test_offer_takes_what_fits_and_returns_the_rest():
    channel = Channel(senders=1, capacity=3)
    assert channel.offer([1, 2]) == []
    assert channel.offer([3, 4, 5]) == [4, 5]
    assert channel.offer([6]) == [6]
    assert len(channel) == 3
    assert await channel.receive() == [1, 2, 3]


async def test_it_ends_with_its_last_sender():
    channel = Channel(senders=2)
    channel.offer([1])
    channel.close_sender()
    channel.offer([2])
    channel.close_sender()
    assert await read_all(channel) == [[1, 2]]
    assert await channel.receive() == []


async def test_without_senders_it_has_ended():
    assert await Channel(senders=0).receive() == []


async def test_closing_wakes_a_receiver_that_waits():
    channel = Channel(senders=1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read_all, channel)
        await anyio.wait_all_tasks_blocked()
        channel.close_sender()


async def test_senders_that_wait_take_turns_in_the_order_they_came():
    channel = Channel(senders=4, capacity=1)

    async def send(name):
        for index in range(3):
            records = [(name, index)]
            if rest := channel.offer(records):
                await channel.send(rest)
        channel.close_sender()

    async with anyio.create_task_group() as tasks:
        for name in "abcd":
            tasks.start_soon(send, name)
        await anyio.wait_all_tasks_blocked()
        got = [record for records in await read_all(channel) for record in records]
    assert len(got) == 12
    for name in "abcd":
        assert [index for sender, index in got if sender == name] == [0, 1, 2]
    # the first found room and is in the line for its second like the others: from then on each has one turn in four
    senders = [sender for sender, _ in got]
    assert set(senders[1:5]) == set("abcd") and senders[5:9] == senders[1:5]


async def test_an_offer_does_not_overtake_a_sender_that_waits():
    channel = Channel(senders=2, capacity=1)
    channel.offer(["full"])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(channel.send, ["first"])
        await anyio.wait_all_tasks_blocked()
        assert await channel.receive() == ["full"]
        assert channel.offer(["second"]) == ["second"]
    assert await channel.receive() == ["first"]


async def test_a_cancelled_send_leaves_what_was_not_queued_and_lets_the_next_one_go():
    channel = Channel(senders=2, capacity=2)
    records = [1, 2, 3, 4]
    with anyio.move_on_after(0.01):
        await channel.send(records)
    assert records == [3, 4]
    assert await channel.receive() == [1, 2]
    await channel.send([5])
    assert await channel.receive() == [5]


async def test_a_receiver_that_never_waits_still_lets_others_run():
    channel = Channel(senders=1, capacity=10_000)
    for index in range(100):
        channel.offer([index] * 64)
    ran = []

    async def other():
        ran.append(len(channel))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(other)
        while len(channel):
            await channel.receive()
    assert ran and ran[0] > 0
