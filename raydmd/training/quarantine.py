"""Samples that are poison: whose teacher's answer, reward or loss is not finite. Named, left out, and never looped on.

A prompt that is poison comes again in every epoch, so it is left out by its number (``data.quarantine``). A sample may
also be poison by its noise alone. That one is drawn anew: with other noise, and with the prompt that comes after its
own. Both are functions of the sample's position and of what is written down here, so a resumed run and another number
of workers make the same substitution, and all other samples stay as they were.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from raydmd.errors import NonFiniteError
from raydmd.training.events import read_lines

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    from raydmd.recipe import Recipe
    from raydmd.training.events import EventLog
    from raydmd.training.ranks import Ranks

FILE = "quarantine.jsonl"
"""Of a run's folder: a line for each sample that was drawn anew."""
SHOWN = 6
"""Samples that a message names."""


@dataclass(frozen=True, kw_only=True, order=True)
class Bad:
    """A sample that is poison.

    Attributes:
        position: in its stream.
        seed: of its stream: the run's, or that of its warm-up, or what it is after a rollback.
        prompt: its row in the table of conditions; the prompts' own count from 1.
        cycle: that it was met in.
        slot: of the cycle, e.g. ``student`` or ``fake.3``.
        why: what was not finite.
    """

    position: int
    seed: int
    prompt: int
    cycle: int
    slot: str
    why: str


class Poisoned(NonFiniteError):
    """Samples are poison; raised on all ranks alike, before any optimizer has moved."""

    def __init__(self, message: str, found: Iterable[Bad] = ()) -> None:
        """Say which.

        Args:
            message: in words.
            found: on whichever rank.
        """
        super().__init__(message)
        self.found = tuple(sorted(set(found)))


class Quarantine:
    """Which prompts are left out, and how often each sample was drawn anew.

    Args:
        prompts: rows that are left out.
        budget: samples that may be drawn anew in a run.
        before: what the run has written down so far, see :func:`read`.
    """

    def __init__(self, prompts: Collection[int] = (), budget: int = 0, before: Sequence[Bad] = ()) -> None:
        self.prompts, self._budget = frozenset(prompts), budget
        self.found: list[Bad] = list(before)
        self._levels: dict[tuple[int, int], int] = {}
        for bad in before:
            self._raise(bad)

    def level(self, seed: int, position: int) -> int:
        """How often a sample was drawn anew."""
        return self._levels.get((seed, position), 0)

    def add(self, found: Sequence[Bad], texts: Sequence[str] = ()) -> list[Bad]:
        """Have samples drawn anew.

        Args:
            found: of one update; two values of a sample may be bad.
            texts: the prompts, for the message.

        Returns:
            What to write down.

        Raises:
            NonFiniteError: if the budget is spent; with the list of all so far, and what to do.
        """
        new = list({(bad.seed, bad.position): bad for bad in found}.values())
        if len(self.found) + len(new) > self._budget:
            raise NonFiniteError(self._story(new, texts))
        for bad in new:
            self._raise(bad)
        self.found += new
        return new

    def _raise(self, bad: Bad) -> None:
        self._levels[bad.seed, bad.position] = self.level(bad.seed, bad.position) + 1

    def _story(self, new: Sequence[Bad], texts: Sequence[str]) -> str:
        prompts = sorted({bad.prompt for bad in new})
        spent = ""
        if self._budget:
            spent = (
                f"training.poison_budget={self._budget} is spent: {len(self.found)} samples were drawn anew before "
                f"({_names(self.found, texts)}). "
            )
        more = len(self.found) + max(10, 2 * len(new))
        return (
            f"{len(new)} sample(s) of one update are poison, and no parameter moved: {_names(new, texts)}. {spent}If "
            f"it is the prompts, leave them out: data.quarantine={sorted({*self.prompts, *prompts})}. If it is the "
            f"draw, have such samples drawn anew: training.poison_budget={more}. With either the same command goes "
            "on. If most samples are, the student has diverged: start anew under another --name with lower rates"
        )


class Ward:
    """The quarantine of a run that a worker is of: the same on all ranks, and on the disk before it is used.

    Args:
        recipe: the run.
        ranks: all of them make one, and isolate the same.
        events: the run's.
        prompts: texts, for messages.
        writes: whether this rank reads and writes the file: others may not see it yet.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks, events: EventLog, prompts: Sequence[str], *, writes: bool) -> None:
        self._folder, self._budget, self._writes = recipe.folder, recipe.training.poison_budget, writes
        self._ranks, self._events, self._prompts = ranks, events, prompts
        mine = list(read_lines(self._folder / FILE)) if writes else []
        rows = json.loads(ranks.everyone(json.dumps(mine))[0])
        self.quarantine = Quarantine(recipe.data.quarantine, self._budget, read(rows))

    def isolate(self, poison: Poisoned) -> None:
        """Have samples drawn anew from now on.

        Raises:
            NonFiniteError: if the budget is spent.
        """
        new = self.quarantine.add(poison.found, self._prompts)
        error: Exception | None = None
        try:
            if self._writes:
                write(self._folder, new, self._prompts)
        except OSError as e:
            error = e
        self._ranks.agree(error)
        spent = {"drawn_anew": len(self.quarantine.found), "budget": self._budget}
        for bad in new:
            self._events.write("quarantined", **asdict(bad), message=named(bad, self._prompts), **spent)


def named(bad: Bad, texts: Sequence[str] = ()) -> str:
    """A sample in words.

    Args:
        bad: the sample.
        texts: the prompts, the first one's row being 1.
    """
    text = f" {texts[bad.prompt - 1]!r}" if 0 < bad.prompt <= len(texts) else ""
    return f"cycle {bad.cycle}, {bad.slot}, position {bad.position}, prompt {bad.prompt}{text}: {bad.why}"


def write(folder: Path, new: Sequence[Bad], texts: Sequence[str] = ()) -> None:
    """Write samples down before they are drawn anew; on the disk, since a restart must know of them."""
    with (folder / FILE).open("a", encoding="utf-8") as file:
        for bad in new:
            text = texts[bad.prompt - 1] if 0 < bad.prompt <= len(texts) else ""
            file.write(json.dumps({**asdict(bad), "text": text}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(rows: Iterable[Mapping[str, Any]]) -> list[Bad]:
    """What was written down, of the file's lines."""
    return [Bad(**{key: row[key] for key in Bad.__dataclass_fields__}) for row in rows]


def _names(found: Sequence[Bad], texts: Sequence[str]) -> str:
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return "; ".join(named(bad, texts) for bad in found[:SHOWN]) + more
