"""What came of every fault, for people and for programs. Pure."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.chaos.cells import KINDS, LEFT_OUT, MOMENTS, TWICE

if TYPE_CHECKING:
    from collections.abc import Sequence

ABOUT = """# Faults

    make chaos

Each cell is a fault: what the row names dies (SIGKILL; a node with all of its processes; of the pool's network the
cable of a teacher's node is pulled for {cut:g} s) at the moment that the column names, at which one process stands
still until it has happened. {grouping} After each the run went on by itself, or after {twice} by the same
command once more; in the end student, fake score, their optimizers and averages are bit for bit those of an undisturbed
run, MLflow has every step once with the same figures, and the event log tells of each recovery. Seconds are from the
fault until the cycle that it hit was reported; after training until the results were there.
"""
TOGETHER = "The faults of a row are done to one run, one after the other, a new checkpoint between any two."
APART = "Each is done to a run of its own."


def entry(row: dict[str, Any] | None, reason: str | None) -> str:
    """A cell of the table."""
    if reason is not None:
        return "-"
    if row is None:
        return ""
    return f"1, {row['seconds']:.0f} s" if row["ok"] else "FAILED"


def rendered(rows: Sequence[dict[str, Any]], *, cut: float, machine: str, took: float) -> str:
    """The table of kind by moment with what it says, in Markdown."""
    found = {(row["kind"], row["moment"]): row for row in rows}
    lines = [f"| | {' | '.join(MOMENTS)} | faults | median |", "|---|" + "---|" * (len(MOMENTS) + 2)]
    for kind in KINDS:
        own = [row for row in rows if row["kind"] == kind]
        entries = [entry(found.get((kind, m)), LEFT_OUT.get((kind, m))) for m in MOMENTS]
        good = [row["seconds"] for row in own if row["ok"]]
        lines.append(f"| {kind} | {' | '.join(entries)} | {len(own)} | {f'{median(good):.0f} s' if good else ''} |")
    counts = [str(sum(row["moment"] == m for row in rows)) for m in MOMENTS]
    good = [row["seconds"] for row in rows if row["ok"]]
    last = f"{median(good):.0f} s" if good else ""
    lines.append(f"| faults | {' | '.join(counts)} | **{len(rows)}** | {last} |")
    failed = [row for row in rows if not row["ok"]]
    twice = f"the death of the {' and the '.join(TWICE)}"
    alone = all(row["faults_of_its_run"] == 1 for row in rows)
    parts = [ABOUT.format(cut=cut, twice=twice, grouping=APART if alone else TOGETHER), "\n".join(lines)]
    parts.append("\n".join(f"- {kind} x {moment}: {why}" for (kind, moment), why in LEFT_OUT.items()))
    if failed:
        parts.append("\n".join(f"FAILED {row['kind']} x {row['moment']}: {'; '.join(row['wrong'])}" for row in failed))
    each = ["| fault | recovery | starts | seconds |", "|---|---|---|---|"]
    each += [
        f"| {row['kind']} x {row['moment']} | {row['recovery']} | {row['starts']} | {row['seconds']:.1f} |"
        for row in rows
        if row["ok"]
    ]
    parts.append("\n".join(each))
    parts.append(f"{machine}; {took / 60:.0f} minutes in all.")
    return "\n\n".join(parts) + "\n"


def line(row: dict[str, Any], done: int, of: int, since: float) -> str:
    """Of a fault that is over, for the terminal."""
    what = row["recovery"] if row["ok"] else f"FAILED: {'; '.join(row['wrong'])}  (kept: {row['kept']})"
    times = f"{row['seconds']:6.1f} s back, {row['took']:5.0f} s in all"
    return f"[{done:2d}/{of} {since / 60:5.1f} min] {row['kind']:<12} x {row['moment']:<20} {times}  {what}"
