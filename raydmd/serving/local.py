"""A frozen model in this process, behind the same interface as a pool."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from raydmd.errors import RaydmdError
from raydmd.serving.client import Client, Pending
from raydmd.serving.engine import answer_each
from raydmd.serving.messages import Reply

if TYPE_CHECKING:
    from collections.abc import Callable

    from raydmd.methods.terms import Answer
    from raydmd.serving.engine import Engine
    from raydmd.serving.messages import Request


class LocalPending(Pending):
    """An answer that is already there."""

    def __init__(self, outcome: Reply | RaydmdError) -> None:
        """Keep what came out.

        Args:
            outcome: the reply, or the error that :meth:`result` raises.
        """
        self._outcome = outcome

    @property
    def waited(self) -> float:
        """Always 0: the time was spent in ``submit``."""
        return 0.0

    def result(self) -> Reply:
        """See :class:`~raydmd.serving.client.Pending`."""
        if isinstance(self._outcome, RaydmdError):
            raise self._outcome
        return self._outcome


class LocalClient(Client):
    """A frozen model in this process. Eager: the forward runs inside :meth:`submit`.

    The caller owns threads and determinism settings.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        name: str = "local",
        alone: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Serve from this process.

        Args:
            engine: the frozen model.
            name: what replies call it.
            alone: the model is this process's own. Else an error that may have come between two collectives is raised
                at once: a rank that went on would exchange other tensors than its peers.
            clock: seconds.
        """
        self._alone = alone
        self._engine = engine
        self._name = name
        self._clock = clock

    @property
    def retries(self) -> int:
        """Always 0: there is nobody else to ask."""
        return 0

    def submit(self, request: Request) -> LocalPending:
        """Answer at once; errors come from ``result``, as with a pool."""
        start = self._clock()
        outcome: Answer | RaydmdError
        if self._alone:
            outcome = answer_each(self._engine, [request], who=self._name)[0]
        else:
            try:
                outcome = self._engine.answer([request])[0]
            except RaydmdError as error:  # of what was asked or came out, not of the forward pass between
                outcome = error
        if isinstance(outcome, RaydmdError):
            return LocalPending(outcome)
        seconds = self._clock() - start
        items = request.x_t.shape[0]
        return LocalPending(Reply(answer=outcome, replica=self._name, seconds=seconds, batch_items=items))
