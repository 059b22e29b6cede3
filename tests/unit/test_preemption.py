"""Notices are asked for now and then, by all ranks together, and each node is told of once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from raydmd.training.preemption import EVERY, Notice, Notices
from raydmd.training.ranks import Ranks
from raydmd.training.session import FolderSession

pytestmark = pytest.mark.unit
NOTICE = Notice(("one",), (0, 1), 60.0)


class Told(FolderSession):
    """A session that counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__(Path("/nowhere"))
        self.asked = 0
        self.says: Notice | None = None

    def notice(self) -> Notice | None:
        self.asked += 1
        return self.says


def test_each_node_is_told_of_once_and_questions_are_rare() -> None:
    now, session = [0.0], Told()
    notices = Notices(session, Ranks(session), clock=lambda: now[0])
    assert notices.new() is None
    assert session.asked == 0, "it waits for all ranks: not in every cycle"
    now[0] += EVERY
    assert notices.new() is None
    assert session.asked == 1
    session.says = NOTICE
    assert notices.new() is None
    now[0] += EVERY
    assert notices.new() == NOTICE
    for _ in range(3):
        now[0] += EVERY
        assert notices.new() is None
    both = replace(NOTICE, nodes=("one", "two"))
    session.says = both
    now[0] += EVERY
    assert notices.new() == both
