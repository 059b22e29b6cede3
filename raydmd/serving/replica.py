"""One replica of a frozen model: an async Ray actor around the batcher and one forward thread.

It answers and nothing else: no optimizer, no gradient, no retries. The class is plain; the pool
wraps it with ``ray.remote``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import psutil
import torch

from raydmd.errors import InputError, RaydmdError
from raydmd.serving.batcher import Batcher, Entry, Refused
from raydmd.serving.client import ReplicaBusy, ReplicaFailed, TransferFailed
from raydmd.serving.codec import ReplyWire, RequestWire, decode_request, encode_reply
from raydmd.serving.engine import answer_each
from raydmd.serving.forward import ForwardThread
from raydmd.serving.messages import Reply, trial

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from raydmd.methods.terms import Answer
    from raydmd.serving.codec import Fetch
    from raydmd.serving.direct import Wire
    from raydmd.serving.engine import Build
    from raydmd.serving.messages import Request
    from raydmd.serving.metrics import Metrics


SILENT = 30.0
"""Seconds for which a client that did not hand over a tensor is refused at once: all others wait for each try."""


@dataclass(frozen=True, kw_only=True)
class ReplicaSettings:
    """How a replica runs.

    Attributes:
        name: e.g. ``teacher/0``; in replies and messages.
        device: where the model is put, ``cpu`` or ``cuda``.
        threads: CPU threads of the forward.
        batch_items: samples in one forward, before guidance doubles them.
        batch_wait: seconds a request waits for company.
        queue_limit: requests that may wait; more are refused.
        deterministic: deterministic kernels, and no batching across requests.
        experts: to hold at the start, of a model whose replicas hold some each; empty for all.
        pool: that it belongs to, for metrics.
        wire: how large tensors come and go.
    """

    name: str
    device: str = "cpu"
    threads: int = 1
    batch_items: int = 64
    batch_wait: float = 0.003
    queue_limit: int = 256
    deterministic: bool = False
    experts: tuple[str, ...] = ()
    pool: str = ""
    wire: Wire = "plasma"


class ReplicaStats(TypedDict):
    """What a replica says of itself; counters start with its process.

    Attributes:
        name: of the replica.
        incarnation: names the process, so that a restart shows.
        pid: its process id.
        node: its host name.
        experts: that it holds; empty for all.
        queue: requests waiting now.
        open: requests that have come and are not answered.
        batches: forwards run.
        items: samples answered.
        requests: requests answered.
        failed: requests that ended in an error.
        refused: requests refused because the queue was full.
        busy: fraction of its uptime spent in forwards.
        busy_seconds: seconds spent in forwards.
        uptime: seconds since it was loaded.
        histogram: forwards by samples in them.
        clients: samples answered by run.
        rss: resident memory, bytes.
    """

    name: str
    incarnation: str
    pid: int
    node: str
    experts: tuple[str, ...]
    queue: int
    open: int
    batches: int
    items: int
    requests: int
    failed: int
    refused: int
    busy: float
    busy_seconds: float
    uptime: float
    histogram: dict[int, int]
    clients: dict[str, int]
    rss: int


@dataclass(frozen=True)
class _Job:
    request: Request
    future: asyncio.Future[Reply]
    came: float


class Replica:
    """Serves a frozen model to many clients; pure, so a request may be sent twice."""

    def __init__(
        self,
        build: Build,
        settings: ReplicaSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        metrics: Metrics | None = None,
    ) -> None:
        """Load the model and run it once.

        Args:
            build: loads the engine onto a device, with some experts or all; run in this process after every restart
                too.
            settings: how to run.
            clock: seconds.
            metrics: where figures go, if anywhere.

        Raises:
            InputError: if the model cannot be loaded.
            NonFiniteError: if the warm-up's answer is not finite.
        """
        # cuBLAS reads this when CUDA starts, so it must be set before anything is loaded.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self._settings = settings
        self._clock = clock
        batcher: Batcher[_Job] = Batcher(
            max_items=settings.batch_items,
            max_wait=settings.batch_wait,
            max_queue=settings.queue_limit,
            exact=settings.deterministic,
        )
        self._forward = ForwardThread(batcher, self._serve, self._prepare_thread, clock)
        self._engine = self._forward.run(lambda: build(settings.device, settings.experts)).result()
        self._experts = settings.experts
        self._forward.run(self._engine.warm_up).result()
        self._transfers = ThreadPoolExecutor(1, "transfers") if settings.wire == "nixl" else None
        self._silent: dict[str, float] = {}
        self._histogram: Counter[int] = Counter()
        self._clients: Counter[str] = Counter()
        self._metrics = metrics
        self._moving, self._open, self._hold = False, 0, asyncio.Lock()
        self._answered = self._failed = self._refused = 0
        self._busy = 0.0
        self._busy_since: float | None = None
        self._loaded = clock()

    async def score(self, payload: RequestWire) -> ReplyWire:
        """Answer one request, batched with others.

        Args:
            payload: see :mod:`raydmd.serving.codec`.

        Returns:
            The encoded reply.

        Raises:
            ReplicaBusy: the queue is full, or the expert is not here.
            ReplicaFailed: the forward raised for this request alone.
            InputError: the request does not fit this model.
            NonFiniteError: an answer is not finite.
        """
        self._open += 1
        try:
            if self._transfers is None:
                return encode_reply(await self._queued(decode_request(payload), payload["client"]))
            return await self._lending(payload)
        finally:
            self._open -= 1

    async def _lending(self, payload: RequestWire) -> ReplyWire:
        """As :meth:`score`, of tensors that are fetched, and lent, by a thread of their own."""
        from raydmd.serving import direct  # brings Ray in, which this module does without

        run, client = asyncio.get_running_loop().run_in_executor, payload["client"]
        request = await run(self._transfers, self._fetched, payload, direct.fetch)
        reply = await self._queued(request, client)
        try:
            return await run(self._transfers, encode_reply, reply, direct.lend)
        except TransferFailed:  # the object store will do
            return encode_reply(reply)

    def _fetched(self, payload: RequestWire, fetch: Fetch) -> Request:
        """A request whose tensors were lent. One who does not hand them over is not waited for again for a while."""
        client = payload["client"]
        if self._clock() < self._silent.get(client, 0.0):
            raise TransferFailed(f"client {client!r} did not hand over its tensors just now")
        try:
            return decode_request(payload, fetch)
        except TransferFailed:
            self._silent[client] = self._clock() + SILENT
            raise

    async def walk_on(self, payload: RequestWire, before: ReplyWire) -> ReplyWire:
        """Answer a walk that begins where another one ended, elsewhere; see :meth:`score`."""
        return await self.score(RequestWire(**{**payload, "x_t": before["value"]}))

    async def hold(self, experts: tuple[str, ...]) -> None:
        """Answer what is here, then hold other experts; what comes meanwhile is turned away, not lost.

        Raises:
            InputError: if the experts cannot be loaded; nothing may be answered then until others have been.
        """
        async with self._hold:  # one after the other, if a second is asked for meanwhile
            self._moving = True
            while self._open:
                await asyncio.sleep(0.01)
            await asyncio.wrap_future(self._forward.run(lambda: self._engine.hold(experts)))
            self._experts, self._moving = experts, False

    async def _queued(self, request: Request, client: str) -> Reply:
        size = request.x_t.shape[0]
        if size < 1:
            raise InputError(f"request {request.name!r} has no samples")
        if self._moving or (self._experts and not self._engine.experts(request) <= {*self._experts}):
            raise ReplicaBusy(
                f"replica {self._settings.name!r} has no expert for request {request.name!r}: it holds "
                f"{', '.join(self._experts)}{' and moves to others' if self._moving else ''}"
            )
        job = _Job(request, asyncio.get_running_loop().create_future(), self._clock())
        key = self._engine.key(request)
        # Runs take turns, however many ranks they have.
        verdict = self._forward.offer(key, trial(client), size, job)
        if isinstance(verdict, Refused):
            self._refused += 1
            if self._metrics:
                self._metrics.refused(trial(client), verdict.queued)
            raise ReplicaBusy(
                f"replica {self._settings.name!r} refused request {request.name!r}: "
                f"{verdict.queued} requests are waiting"
            )
        return await job.future

    async def ping(self) -> ReplicaStats:
        """How it is doing; answered while a forward runs."""
        now = self._clock()
        busy = self._busy + (now - self._busy_since if self._busy_since is not None else 0.0)
        uptime = now - self._loaded
        process = psutil.Process()
        return ReplicaStats(
            name=self._settings.name,
            incarnation=f"{os.uname().nodename}:{process.pid}:{process.create_time()}",
            pid=process.pid,
            node=os.uname().nodename,
            experts=self._experts,
            open=self._open,
            queue=self._forward.queued(),
            batches=self._histogram.total(),
            items=self._clients.total(),
            requests=self._answered,
            failed=self._failed,
            refused=self._refused,
            busy=busy / uptime if uptime > 0 else 0.0,
            busy_seconds=busy,
            uptime=uptime,
            histogram=dict(self._histogram),
            clients=dict(self._clients),
            rss=process.memory_info().rss,
        )

    def _serve(self, batch: list[Entry[_Job]]) -> None:
        """Run a batch, in the forward thread."""
        start = self._busy_since = self._clock()
        requests = [entry.payload.request for entry in batch]
        outcomes: Sequence[Answer | RaydmdError]
        try:
            outcomes = answer_each(self._engine, requests, who=self._settings.name)
        except BaseException as error:  # nothing may end the thread, or every later request would hang
            text = f"replica {self._settings.name!r}: {type(error).__name__}: {error}"
            outcomes = [ReplicaFailed(text) for _ in batch]
        seconds = self._clock() - start
        self._busy, self._busy_since = self._busy + seconds, None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            batch[0].payload.future.get_loop().call_soon_threadsafe(self._deliver, batch, outcomes, seconds)

    def _deliver(self, batch: list[Entry[_Job]], outcomes: Sequence[Answer | RaydmdError], seconds: float) -> None:
        items = sum(entry.items for entry in batch)
        self._histogram[items] += 1
        now, served = self._clock(), dict[str, tuple[int, float]]()
        for entry, outcome in zip(batch, outcomes, strict=True):
            future = entry.payload.future
            good = not isinstance(outcome, RaydmdError)
            before, longest = served.get(entry.client, (0, 0.0))
            served[entry.client] = before + good * entry.items, max(longest, now - entry.payload.came)
            if isinstance(outcome, RaydmdError):
                self._failed += 1
                if self._metrics:
                    self._metrics.failed(entry.client)
                if not future.done():
                    future.set_exception(outcome)
                continue
            self._answered += 1
            self._clients[entry.client] += entry.items
            if not future.done():
                future.set_result(
                    Reply(answer=outcome, replica=self._settings.name, seconds=seconds, batch_items=items)
                )
        if self._metrics:
            self._metrics.ran(served, seconds, self._forward.queued(), self._busy)

    def _prepare_thread(self) -> None:
        # The thread count is a property of the thread that runs the forward.
        torch.set_num_threads(self._settings.threads)
        if self._settings.deterministic:
            torch.use_deterministic_algorithms(True)
