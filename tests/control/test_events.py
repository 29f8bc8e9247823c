"""The event hub: order, bounds, threads."""

import threading

import trio
import trio.testing

from fleecefs.control.events import DROPPED, QUEUE_MAX, Events


def started():
    events = Events()
    events.start(trio.lowlevel.current_trio_token())
    return events


async def all_of(events, subscription):
    await events.close()
    return [event async for event in subscription]


def counts(found):
    return [event["data"]["count"] for event in found if event["event"] == DROPPED]


async def test_every_subscriber_gets_every_event_in_order():
    events = started()
    first, second = events.subscribe(), events.subscribe()

    events.emit("A", {"x": 1})
    events.emit("B", {})

    assert [e["event"] for e in await all_of(events, first)] == ["A", "B"]
    assert [e["event"] for e in await all_of(events, second)] == ["A", "B"]


async def test_events_come_from_any_thread_in_its_order():
    events = started()
    subscription = events.subscribe()

    def emit_three():
        for i in range(3):
            events.emit("A", {"i": i})

    await trio.to_thread.run_sync(emit_three)

    found = await all_of(events, subscription)
    assert [event["data"]["i"] for event in found] == [0, 1, 2]


async def test_a_waiting_subscriber_is_woken(autojump_clock):
    events = started()
    subscription = events.subscribe()
    found = []

    async def listen():
        found.extend([event["event"] async for event in subscription])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        await trio.testing.wait_all_tasks_blocked()
        events.emit("A", {})
        await trio.testing.wait_all_tasks_blocked()
        assert found == []
        await events.close()

    assert found == ["A"]


async def test_a_subscriber_hears_nothing_from_before_and_after():
    events = started()
    events.emit("BEFORE", {})
    await trio.testing.wait_all_tasks_blocked()
    subscription = events.subscribe()
    events.emit("DURING", {})
    await trio.testing.wait_all_tasks_blocked()
    events.unsubscribe(subscription)

    events.emit("AFTER", {})

    assert [e["event"] for e in await all_of(events, subscription)] == ["DURING"]


async def test_a_full_queue_drops_and_the_next_event_says_how_many():
    events = started()
    subscription = events.subscribe()
    for _ in range(QUEUE_MAX + 5):
        events.emit("A", {})
    await trio.testing.wait_all_tasks_blocked()

    await anext(subscription)
    events.emit("LAST", {})

    found = await all_of(events, subscription)
    assert [e["event"] for e in found] == ["A"] * (QUEUE_MAX - 1) + [DROPPED, "LAST"]
    assert counts(found) == [5]


async def test_dropped_events_are_told_although_no_other_follows():
    events = started()
    subscription = events.subscribe()
    for _ in range(QUEUE_MAX + 5):
        events.emit("A", {})

    found = await all_of(events, subscription)

    assert [event["event"] for event in found] == ["A"] * QUEUE_MAX + [DROPPED]
    assert counts(found) == [5]


async def test_a_slow_subscriber_costs_the_others_nothing():
    events = started()
    events.subscribe()
    quick = events.subscribe()
    for _ in range(2 * QUEUE_MAX):
        events.emit("A", {})
        await trio.testing.wait_all_tasks_blocked()
        await anext(quick)

    assert await all_of(events, quick) == []


def test_emitting_before_trio_and_after_it_is_harmless():
    events = Events()
    events.emit("A", {})

    async def start():
        events.start(trio.lowlevel.current_trio_token())

    trio.run(start)

    thread = threading.Thread(target=events.emit, args=("A", {}))
    thread.start()
    thread.join()
