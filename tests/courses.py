"""Whether two runs took the same course: the same samples in the same order, and the same losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raydmd.training.events import METRICS, read_lines
from raydmd.training.sample_log import FOLDER

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    Losses = dict[int, dict[str, float]]

CURVES = ("fake/loss", "fake/gradient", "student/gradient")
APART = 1e-4


def samples(folder: Path, slots: Mapping[str, int]) -> tuple[list[tuple], set[int]]:
    """Every sample of a run in its order, with what was drawn for it, and the numbers of workers it had.

    What was done again after a restart must be the same again, and is there once.
    """
    found: dict[tuple, tuple] = {}
    worlds = set()
    for file in sorted((folder / FOLDER).iterdir()):
        for line in read_lines(file):
            if line["slot"] not in slots:
                continue
            worlds.add(line["world"])
            for position, row, noise in zip(line["positions"], line["rows"], line["noise"], strict=True):
                place = (line["cycle"], slots[line["slot"]], position)
                what = (row, noise, line["shared"])
                assert found.setdefault(place, what) == what, f"{place} was another sample when it was done again"
    return [(*place, *found[place]) for place in sorted(found)], worlds


def reported(folder: Path) -> Losses:
    """The last row of each cycle of a run on Ray: after a restart one may be there twice."""
    return {int(m["cycle"]): m for m in read_lines(folder / METRICS) if "fake/loss" in m}


def same_course(
    run: tuple[Path, Losses], fixed: tuple[Path, Losses], cycles: int, batch: int, slots: Mapping[str, int]
) -> set[int]:
    """Compare samples and losses of two runs; returns the numbers of workers that the first one had.

    Args:
        run: its folder, and its losses by cycle.
        fixed: those of the run to compare with.
        cycles: of both.
        batch: samples per update.
        slots: the updates of a cycle, and their places in it.
    """
    seen, worlds = samples(run[0], slots)
    reference, _ = samples(fixed[0], slots)
    assert [s[2] for s in seen] == list(range(cycles * len(slots) * batch)), "samples were skipped or repeated"
    assert seen == reference
    assert len({s[4] for s in seen}) == len(seen), "two samples have the same noise"
    ours, theirs = run[1], fixed[1]
    assert ours.keys() == theirs.keys() == set(range(1, cycles + 1))
    apart = {key: max(abs(ours[c][key] - theirs[c][key]) for c in theirs) for key in CURVES}
    print(f"{run[0].name}: furthest apart {apart}")
    assert max(apart.values()) < APART, apart
    for key in CURVES:
        values = [theirs[c][key] for c in theirs]
        assert max(values) - min(values) > 10 * APART, f"{key} hardly moves: {values}"
    return worlds
