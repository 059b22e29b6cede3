"""What a trainer sees of a frozen model, wherever it runs: submit now, ask later."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from raydmd.errors import PoolError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raydmd.serving.messages import Reply, Request


class ReplicaBusy(PoolError):
    """A replica's queue is full; the same request may be sent again later or elsewhere."""


class ReplicaFailed(PoolError):
    """A forward raised for this one request (out of memory, a broken device); retried elsewhere."""


class TransferFailed(PoolError):
    """A tensor did not come, or could not be lent; nothing is wrong with the request, which is sent again."""


class Pending(ABC):
    """A request under way."""

    @property
    @abstractmethod
    def waited(self) -> float:
        """Seconds for which :meth:`result` has blocked."""

    @abstractmethod
    def result(self) -> Reply:
        """Wait for the answer; later calls return it, or raise the same error, again.

        Returns:
            The reply; its tensors are on the device of the request's ``x_t``.

        Raises:
            NonFiniteError: the answer has a non-finite value.
            InputError: the request fits no expert, condition or shape of the model.
            ScoreTimeout: the deadline passed.
            PoolExhausted: retries are used up, or no replica is left alive.
            ReplicaFailed: a model in this process raised; there is no other to ask.
        """


class Client(ABC):
    """Asks a frozen model. For use by one thread."""

    @property
    @abstractmethod
    def retries(self) -> int:
        """Requests sent again so far, after a failure or a silence."""

    @abstractmethod
    def submit(self, request: Request) -> Pending:
        """Send a request; errors come from :meth:`Pending.result`.

        The request's tensors may be changed once this returns.
        """

    def expect(self, experts: Sequence[str]) -> None:
        """Say which experts are asked from now on, so that they can be made ready; of no use where all are here."""
        del experts
