"""From whoever has news, in any thread, to whoever listens, in trio.

The queues belong to the trio thread: `emit` only asks it to fill them. So there is
no lock, and events from one thread keep their order. A listener that does not keep
up loses events beyond a bound and is told how many; it never holds up the others.
"""

import contextlib
from collections import deque

import trio

from fleecefs.control import qmp
from fleecefs.control.qmp import Message

# Snapshots come by the minute: a client that is 100 events behind is not reading.
QUEUE_MAX = 100

DROPPED = "FLEECEFS_EVENTS_DROPPED"


class Events:
    """The hub between those who emit and those who subscribe."""

    def __init__(self) -> None:
        self._token: trio.lowlevel.TrioToken | None = None
        self._subscriptions: set[Subscription] = set()

    def start(self, token: trio.lowlevel.TrioToken) -> None:
        """Deliver from now on; before, nobody can have subscribed."""
        self._token = token

    def emit(self, name: str, data: Message) -> None:
        """Tell every subscriber, soon. From any thread; never waits or fails."""
        if self._token is None:
            return
        event = qmp.event(name, data)
        # RunFinishedError: trio has ended, and with it the last subscriber.
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._deliver, event)

    def subscribe(self) -> "Subscription":
        """Return a queue of the events emitted from now on, until `unsubscribe`."""
        subscription = Subscription()
        self._subscriptions.add(subscription)
        return subscription

    def unsubscribe(self, subscription: "Subscription") -> None:
        """Put nothing more into the queue; what is in it can still be read."""
        self._subscriptions.discard(subscription)
        subscription.close()

    async def close(self) -> None:
        """End every subscription, after all that has been emitted until now."""
        delivered = trio.Event()
        trio.lowlevel.current_trio_token().run_sync_soon(delivered.set)
        await delivered.wait()
        for subscription in list(self._subscriptions):
            self.unsubscribe(subscription)

    def _deliver(self, event: Message) -> None:
        for subscription in self._subscriptions:
            subscription.put(event)


class Subscription:
    """The events one listener has yet to read: `async for event in subscription`."""

    def __init__(self) -> None:
        self._queue: deque[Message] = deque()
        self._dropped = 0
        self._closed = False
        self._changed = trio.Event()

    def put(self, event: Message) -> None:
        """Queue an event, or count it as dropped."""
        if len(self._queue) >= QUEUE_MAX:
            self._dropped += 1
            return
        self._tell_dropped()
        self._queue.append(event)
        self._changed.set()

    def close(self) -> None:
        """End the iteration when the queue has been read."""
        self._closed = True
        self._changed.set()

    def __aiter__(self) -> "Subscription":
        return self

    async def __anext__(self) -> Message:
        while not self._queue:
            self._tell_dropped()
            if self._queue:
                break
            if self._closed:
                raise StopAsyncIteration
            self._changed = trio.Event()
            await self._changed.wait()
        return self._queue.popleft()

    def _tell_dropped(self) -> None:
        """Queue the number of lost events at the place where they are missing."""
        if self._dropped:
            self._queue.append(qmp.event(DROPPED, {"count": self._dropped}))
            self._dropped = 0
