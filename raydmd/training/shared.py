"""A group of ranks with the same samples asks a frozen model once."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from raydmd.errors import RaydmdError, RunFailed
from raydmd.methods.terms import Answer
from raydmd.serving.client import Client, Pending

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raydmd.models.tokens import TokenGroup
    from raydmd.serving.messages import Reply, Request


class SharedPending(Pending):
    """A request of the group's leader, whose answer goes to all.

    Args:
        asked: under way, on the leader.
        tokens: the group.
        device: where the answer goes.
    """

    def __init__(self, asked: Pending | None, tokens: TokenGroup, device: torch.device) -> None:
        self._asked, self._tokens, self._device = asked, tokens, device
        self._outcome: Reply | Exception | None = None
        self._waited = 0.0

    @property
    def waited(self) -> float:
        """See :class:`~raydmd.serving.client.Pending`."""
        return self._waited

    def result(self) -> Reply:
        """See :class:`~raydmd.serving.client.Pending`; all ranks of the group call it at the same place."""
        if self._outcome is None:
            start = time.perf_counter()
            self._outcome = self._share()
            self._waited = time.perf_counter() - start
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome

    def _share(self) -> Reply | Exception:
        reply: Reply | None = None
        said: list[tuple[Reply, list[torch.Size]] | Exception | None] = [None]
        if self._asked is not None:
            try:
                reply = self._asked.result()
            except RaydmdError as error:
                said = [error]
            except Exception as error:  # of a library, which need not survive the way
                said = [RuntimeError(f"{type(error).__name__}: {error}")]
            else:
                shapes = [v.shape for v in (reply.answer.value, reply.answer.uncond) if v is not None]
                said = [(replace(reply, answer=Answer(value=torch.empty(0))), shapes)]
        group, leader = self._tokens.group, self._tokens.leader
        dist.broadcast_object_list(said, src=leader, group=group, device=self._device)
        found = said[0]
        if isinstance(found, Exception):
            return found
        if found is None:
            return RunFailed(f"rank {leader} gave its group no answer")
        values = []
        for k, shape in enumerate(found[1]):
            if reply is None:
                value = torch.empty(shape, device=self._device)
            else:
                mine = reply.answer.uncond if k else reply.answer.value
                assert mine is not None
                value = mine.to(self._device).contiguous()
            dist.broadcast(value, src=leader, group=group)
            values.append(value)
        return replace(found[0], answer=Answer(value=values[0], uncond=values[1] if len(values) > 1 else None))


class SharedClient(Client):
    """Asks for a whole group.

    Args:
        inner: of the group's leader; the others have none.
        tokens: the group.
    """

    def __init__(self, inner: Client | None, tokens: TokenGroup) -> None:
        self._inner, self._tokens = inner, tokens

    @property
    def retries(self) -> int:
        """See :class:`~raydmd.serving.client.Client`; the leader's."""
        return self._inner.retries if self._inner else 0

    def expect(self, experts: Sequence[str]) -> None:
        """See :class:`~raydmd.serving.client.Client`."""
        if self._inner:
            self._inner.expect(experts)

    def submit(self, request: Request) -> SharedPending:
        """See :class:`~raydmd.serving.client.Client`."""
        asked = self._inner.submit(request) if self._inner else None
        return SharedPending(asked, self._tokens, request.x_t.device)
