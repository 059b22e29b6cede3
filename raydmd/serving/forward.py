"""The thread that runs a replica's forwards and takes its batches itself.

A device runs one forward at a time. The event loop only brings requests and carries answers away: while it does, the
next forward is under way, instead of waiting for the loop to start it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from raydmd.serving.batcher import Accepted, Batcher, Entry, Key, Refused

T = TypeVar("T")
R = TypeVar("R")


class ForwardThread(Generic[T]):
    """Runs errands at once, and batches as they are ready.

    Args:
        batcher: of what is asked.
        serve: runs a batch; must not raise.
        prepare: run first, in the thread: some of torch's settings are a thread's own.
        clock: seconds.
    """

    def __init__(
        self,
        batcher: Batcher[T],
        serve: Callable[[list[Entry[T]]], None],
        prepare: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._batcher, self._serve, self._prepare, self._clock = batcher, serve, prepare, clock
        self._news = threading.Condition()
        self._errands: deque[Callable[[], None]] = deque()
        # A daemon: it waits for requests for as long as the process lives.
        threading.Thread(target=self._work, name="forward", daemon=True).start()

    def run(self, errand: Callable[[], R]) -> Future[R]:
        """Run something in the thread, before any batch."""
        future: Future[R] = Future()

        def work() -> None:
            try:
                future.set_result(errand())
            except BaseException as error:  # whoever waits for it gets it
                future.set_exception(error)

        with self._news:
            self._errands.append(work)
            self._news.notify()
        return future

    def offer(self, key: Key, client: str, items: int, payload: T) -> Accepted | Refused:
        """Queue a request; see :meth:`raydmd.serving.batcher.Batcher.offer`."""
        with self._news:
            verdict = self._batcher.offer(key, client, items, payload, self._clock())
            self._news.notify()
        return verdict

    def queued(self) -> int:
        """Requests that wait."""
        with self._news:
            return len(self._batcher)

    def _work(self) -> None:
        self._prepare()
        while True:
            errand, batch = self._next()
            if errand is not None:
                errand()
            if batch is not None:
                self._serve(batch)

    def _next(self) -> tuple[Callable[[], None] | None, list[Entry[T]] | None]:
        with self._news:
            while True:
                if self._errands:
                    return self._errands.popleft(), None
                now = self._clock()
                batch = self._batcher.take(now)
                if batch is not None:
                    return None, batch
                due = self._batcher.next_due()
                self._news.wait(None if due is None else max(due - now, 0.0))
