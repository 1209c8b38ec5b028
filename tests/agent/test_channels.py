"""Channels are bounded, say what they drop, and drop what belongs to a past turn."""

import asyncio

import pytest

from agent.channels import Channel, ChannelClosed, Policy, Turns


def test_items_come_out_in_order_and_a_closed_channel_empties_first() -> None:
    async def scenario() -> list[int]:
        channel: Channel[int] = Channel("numbers", 4)
        for number in range(3):
            await channel.put(number)
        channel.close()
        return [number async for number in channel]

    assert asyncio.run(scenario()) == [0, 1, 2]


def test_a_full_blocking_channel_waits_and_never_holds_more_than_its_capacity() -> None:
    async def scenario() -> tuple[list[int], int]:
        channel: Channel[int] = Channel("numbers", 2)

        async def produce() -> None:
            for number in range(100):
                await channel.put(number)
                assert len(channel) <= 2
            channel.close()

        producer = asyncio.create_task(produce())
        got = [number async for number in channel]
        await producer
        return got, channel.counters.high_water

    got, high_water = asyncio.run(scenario())
    assert got == list(range(100))
    assert high_water == 2


@pytest.mark.parametrize(
    ("policy", "left"), [(Policy.DROP_OLDEST, [3, 4]), (Policy.DROP_NEWEST, [0, 1])]
)
def test_a_full_dropping_channel_counts_what_it_drops(policy: Policy, left: list[int]) -> None:
    async def scenario() -> tuple[list[int], int]:
        channel: Channel[int] = Channel("numbers", 2, policy)
        for number in range(5):
            await channel.put(number)
        channel.close()
        return [number async for number in channel], channel.counters.dropped

    assert asyncio.run(scenario()) == (left, 3)


def test_items_of_a_cancelled_turn_are_dropped_on_both_sides_and_counted() -> None:
    async def scenario() -> tuple[list[str], int, bool]:
        turns = Turns()
        channel: Channel[str] = Channel("words", 8, turns=turns)
        old = turns.begin()
        await channel.put("old, already inside", old)
        turns.cancel(old)
        late = await channel.put("old, too late", old)
        await channel.put("new", turns.begin())
        channel.close()
        return [word async for word in channel], channel.counters.stale, late

    assert asyncio.run(scenario()) == (["new"], 2, False)


def test_cancelling_frees_a_producer_that_waits_with_an_item_of_that_turn() -> None:
    async def scenario() -> bool:
        turns = Turns()
        channel: Channel[str] = Channel("words", 1, turns=turns)
        turn = turns.begin()
        await channel.put("first", turn)
        waiting = asyncio.create_task(channel.put("second", turn))
        await asyncio.sleep(0)
        turns.cancel(turn)
        channel.wake()
        return await asyncio.wait_for(waiting, 1)

    assert asyncio.run(scenario()) is False


def test_closing_frees_everybody_who_waits() -> None:
    async def scenario() -> None:
        full: Channel[int] = Channel("full", 1)
        await full.put(1)
        empty: Channel[int] = Channel("empty", 1)
        producer = asyncio.create_task(full.put(2))
        consumer = asyncio.create_task(empty.get())
        await asyncio.sleep(0)
        full.close()
        empty.close()
        for task in (producer, consumer):
            with pytest.raises(ChannelClosed):
                await asyncio.wait_for(task, 1)

    asyncio.run(scenario())


def test_no_channel_is_without_a_bound() -> None:
    with pytest.raises(ValueError, match="capacity 0"):
        Channel("none", 0)
