"""Writing a comparison: ``compare.html``, and the same figures as JSON beside it."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from raydmd import __version__
from raydmd.comparing.document import as_text, compared, document
from raydmd.comparing.folders import read_sweep
from raydmd.comparing.page import page
from raydmd.comparing.samples import groups, sheet_of
from raydmd.errors import InputError
from raydmd.files import replace

if TYPE_CHECKING:
    from raydmd.comparing.document import Comparison
    from raydmd.comparing.gather import SweepFacts
    from raydmd.comparing.samples import Group, Sheet

GRIDS = 16
"""Runs whose samples a page shows."""
PAGE = "compare.html"


def samples_of(found: Comparison, *, most: int = GRIDS) -> tuple[list[Group], list[str]]:
    """The samples of the best runs, as far as their reports have some.

    Args:
        found: the comparison.
        most: runs.

    Returns:
        Groups of comparable samples, and notes on what is not there.
    """
    places = [i for i, run in enumerate(found.runs) if run.state == "finished"][:most]
    with ThreadPoolExecutor(8) as pool:
        pages = list(pool.map(lambda i: found.runs[i].report(), places))
    sheets: dict[int, Sheet] = {}
    for place, text in zip(places, pages, strict=True):
        if text and (sheet := sheet_of(text)):
            sheets[place] = sheet
    notes = []
    done = sum(run.state == "finished" for run in found.runs)
    if done > most:
        notes.append(f"samples are shown of the best {most} of {done} finished runs")
    if missing := len(places) - len(sheets):
        notes.append(f"{missing} of the finished runs shown have no samples that could be read")
    return groups(found.runs, sheets), notes


def write(found: Comparison, file: Path, *, most: int = GRIDS, seconds: float = 0.0) -> tuple[Path, Path]:
    """Write the page and the JSON.

    Args:
        found: the comparison.
        file: the page's; the JSON has the same name with another ending.
        most: runs whose samples are shown.
        seconds: that reading the runs took.

    Returns:
        Page and JSON.

    Raises:
        InputError: if they can't be written.
    """
    samples, notes = samples_of(found, most=most)
    whole = document(found, samples, notes, facts=facts(found, seconds))
    data = file.with_suffix(".json")
    linked = {**whole, "runs": [{**run, "link": _link(run["link"], file)} for run in whole["runs"]]}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace(data, as_text(plain(whole)) + "\n")
        replace(file, page(linked))
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror or error}") from None
    return file, data


def plain(whole: dict[str, Any]) -> dict[str, Any]:
    """The document without pictures."""
    kept = [
        {k: v for k, v in group.items() if k not in ("teachers", "students")}
        | {"runs": [student["run"] for student in group["students"]]}
        for group in whole["samples"]
    ]
    return {**whole, "samples": kept}


def facts(found: Comparison, seconds: float) -> dict[str, str]:
    """What a reader wants to know of the page itself."""
    return {
        "raydmd": __version__,
        "made": time.strftime("%Y-%m-%d %H:%M %Z"),
        "read": f"{len(found.runs)} runs in {seconds:.1f} s",
    }


def sweep_page(folder: Path, sweep: SweepFacts) -> Path:
    """Write a sweep's page into its folder, from its trials' folders and its study.

    Args:
        folder: of the sweep.
        sweep: what its study says.

    Returns:
        The page.

    Raises:
        InputError: if it can't be written.
    """
    begun = time.perf_counter()
    runs = read_sweep(folder, sweep.name, sweep.base, sweep.rows, sweep.searched)
    found = compared(
        runs, title=sweep.name, sweep_objectives=sweep.objectives, searched=sweep.searched, notes=sweep.notes
    )
    return write(found, folder / PAGE, seconds=time.perf_counter() - begun)[0]


def _link(link: str, file: Path) -> str:
    if not link or link.startswith(("http://", "https://")):
        return link
    return quote(Path(os.path.relpath(link, file.absolute().parent)).as_posix())
