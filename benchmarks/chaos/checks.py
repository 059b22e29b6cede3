"""What a run has left, and whether it is what the undisturbed run left."""

from __future__ import annotations

import contextlib
import hashlib
import math
import sqlite3
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from benchmarks.chaos.cells import GROUP, TWICE
from raydmd.training.checkpoint import STUDENT
from raydmd.training.events import read_lines
from raydmd.training.folder import trained
from raydmd.training.manifest import damage
from raydmd.training.store import Store

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from benchmarks.chaos.cells import Cell

CURVES = ("fake/loss", "fake/gradient", "student/gradient", "student/reward", "teacher/x0_mean")
"""Metrics that are a matter of bits too."""


@dataclass(frozen=True)
class Left:
    """What a run has left.

    Attributes:
        tensors: of its last checkpoint: student and fake score, their optimizers and averages.
        files: SHA-256 of the student's weights, in the checkpoint and in the exported pipeline.
        steps: in MLflow, for each curve the cycles and values.
        status: of its run in MLflow, for each that is there.
        events: its log.
        rows: its metrics.
        ended: when its results were written.
        wrong: what speaks for itself.
    """

    tensors: dict[str, Tensor]
    files: dict[str, str]
    steps: dict[str, list[tuple[int, float]]]
    status: list[str]
    events: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    ended: float
    wrong: list[str]


def look(folder: Path, database: Path, curves: Sequence[str] = CURVES) -> Left:
    """Read what a finished run has left.

    Args:
        folder: of the run.
        database: MLflow's.
        curves: metrics to read there.
    """
    wrong, tensors, files = list[str](), dict[str, Any](), dict[str, str]()
    name = trained(folder)
    if name is None:
        wrong.append("its training has not finished")
    else:
        with Store.of(folder, None).at(name) as final, tempfile.TemporaryDirectory() as temporary:
            if why := damage(final):
                wrong.append(f"the final checkpoint is damaged: {why}")
            dcp_to_torch_save(str(final), f"{temporary}/all.pt")
            tensors = torch.load(f"{temporary}/all.pt", weights_only=True)
            files = {f"{STUDENT}/{f.name}": digest(f) for f in (final / STUDENT).glob("*.safetensors")}
    exported = (folder / "pipeline").rglob("*.safetensors")
    files |= {str(f.relative_to(folder)): digest(f) for f in exported}
    result = folder / "result.json"
    if not result.is_file():
        wrong.append("it has no result.json")
    wrong += ["it has no report"] * (not (folder / "report.html").is_file())
    with contextlib.closing(sqlite3.connect(database)) as store:
        status = [row[0] for row in store.execute("SELECT status FROM runs")]
        steps = {
            key: list(store.execute("SELECT step, value FROM metrics WHERE key = ? ORDER BY step", (key,)))
            for key in curves
        }
    return Left(
        tensors=tensors,
        files=files,
        steps=steps,
        status=status,
        events=list(read_lines(folder / "events.jsonl")),
        rows=list(read_lines(folder / "metrics.jsonl")),
        ended=result.stat().st_mtime if result.is_file() else 0.0,
        wrong=wrong,
    )


def compare(left: Left, undisturbed: Left) -> list[str]:
    """Where a run's results are not the undisturbed run's, to the last bit."""
    wrong = list(left.wrong)
    if not undisturbed.tensors or not any(k.startswith("fake") for k in undisturbed.tensors):
        wrong.append("the undisturbed run has left no fake score to compare with")
    if left.tensors.keys() != undisturbed.tensors.keys():
        wrong.append("its last checkpoint holds other tensors")
    else:
        differ = [k for k, v in left.tensors.items() if not same(v, undisturbed.tensors[k])]
        wrong += [f"{len(differ)} of {len(left.tensors)} tensors differ, e.g. {differ[0]}"] if differ else []
    names = sorted(left.files.keys() | undisturbed.files.keys())
    differ = [name for name in names if left.files.get(name) != undisturbed.files.get(name)]
    wrong += [f"files differ: {', '.join(differ)}"] if differ else []
    wrong += tracked(left.status, left.steps, int(undisturbed.rows[-1]["cycles"]))
    if not wrong and left.steps != undisturbed.steps:
        wrong.append("MLflow has other figures")
    return wrong


def tracked(status: list[str], steps: dict[str, list[tuple[int, float]]], cycles: int) -> list[str]:
    """What is wrong with MLflow's account of a run: every step must be there once, in one run that is finished."""
    wrong = [] if status == ["FINISHED"] else [f"MLflow has runs {status}"]
    for key, rows in steps.items():
        found, wanted = [step for step, _ in rows], list(range(1, cycles + 1))
        if found != wanted:
            wrong.append(f"MLflow has steps {found} of {key}")
    return wrong


def same(one: Any, other: Any) -> bool:
    """Whether two entries of a checkpoint are equal bit for bit; a NaN equals itself."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return bool(one == other)
    bits = [t.contiguous().view(-1).view(torch.uint8) for t in (one, other)]
    return one.shape == other.shape and one.dtype == other.dtype and bool(bits[0].equal(bits[1]))


def recovered(left: Left, cell: Cell, killed: float, until: float) -> float:
    """Seconds from the fault until the cycle that it hit was reported; after training, until the results were there.

    Where workers were started anew, by the last of them before the next fault: a killed driver's go on for a while.
    """
    if cell.cycle is None:
        return left.ended - killed
    since = killed
    if cell.kind in (*GROUP, *TWICE):
        starts = (e["time"] for e in left.events if e["event"] in ("start", "resume") and killed < e["time"] < until)
        since = max(starts, default=math.inf)
    return min((r["time"] - killed for r in left.rows if r["time"] > since and r["cycle"] > cell.cycle), default=-1.0)


def digest(file: Path) -> str:
    """A file's SHA-256."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
