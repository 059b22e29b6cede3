"""Kill everything at every moment, and see that a run ends the same.

    python -m benchmarks.chaos
    python -m benchmarks.chaos --kinds worker,teacher --moments rollout

One undisturbed run, then one run for each kind of fault in the table of ``cells.py``, to which it is done at one moment
after the other; two runs side by side. The same command goes on after the last one of the same code. Ends with 1 if
anything was not as it should be; what failed is kept. The table goes to the terminal and, once it is whole, to
``--output``.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.chaos import checks
from benchmarks.chaos.cells import KINDS, MOMENTS, Cell, cells, recovery, runs
from benchmarks.chaos.stage import CUT, ROOT, Fault, Stage, code, machine, make_home, settle, strike
from benchmarks.chaos.table import line, rendered

CLEANER = "PlacementGroupCleaner"
"""Ray's own, which stays behind a killed driver where a second Ray runs on the machine (docs/log.md)."""


def main() -> None:
    """Do every fault that is left to do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", type=_some(KINDS), default=KINDS, help=f"of {', '.join(KINDS)}; comma between")
    parser.add_argument("--moments", type=_some(MOMENTS), default=MOMENTS, help=f"of {', '.join(MOMENTS)}")
    parser.add_argument("--apart", action="store_true", help="each fault to a run of its own, not all of a kind to one")
    parser.add_argument("--parallel", type=int, default=2, help="runs side by side")
    parser.add_argument("--patience", type=float, default=1.0, help="factor on deadlines, for a machine that is busy")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "chaos", help="for runs, and what was done")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--again", action="store_true", help="do faults that failed before once more")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what it has started is ended
    play = Play(args.folder.absolute() / code(), args.patience)
    asked = cells(args.kinds, args.moments)
    left = [c for c in asked if (row := play.row(c)) is None or (args.again and not row["ok"])]
    chains = runs(left, apart=args.apart)
    before = len(asked) - len(left)
    print(f"{len(asked)} faults, {before} of them done before; {len(chains)} runs in {play.folder}", flush=True)
    begun = time.monotonic()
    play.undisturbed()
    print(f"the undisturbed run is there after {time.monotonic() - begun:.0f} s", flush=True)
    pool = ThreadPoolExecutor(args.parallel)
    try:
        done = before
        for ended in as_completed([pool.submit(play.faults, chain) for chain in chains]):
            for row in ended.result():
                done += 1
                print(line(row, done, len(asked), time.monotonic() - begun), flush=True)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        play.end()
        raise
    rows = [row for c in asked if (row := play.row(c))]
    table = rendered(rows, cut=CUT, machine=machine(args.parallel), took=sum(r["took"] for r in rows) / args.parallel)
    print(f"\n{table}")
    if asked == cells():
        about = {"machine": machine(args.parallel), "code": code(), "cut_seconds": CUT}
        (args.output / "chaos.md").write_text(table, encoding="utf-8")
        (args.output / "chaos.json").write_text(json.dumps(about | {"faults": rows}, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(0 if all(row["ok"] for row in rows) else 1)


class Play:
    """All runs of one state of the code.

    Args:
        folder: for them, and for what came of them.
        patience: factor on deadlines.
    """

    def __init__(self, folder: Path, patience: float) -> None:
        self.folder, self._patience = folder, patience
        self._home, self._file = folder / "home", folder / "faults.json"
        self._lock = threading.Lock()
        self._rows: dict[str, dict[str, Any]] = json.loads(self._file.read_text()) if self._file.is_file() else {}
        self._stages: dict[str, Stage] = {}
        self._base: checks.Left
        folder.mkdir(parents=True, exist_ok=True)

    def row(self, cell: Cell) -> dict[str, Any] | None:
        """What came of a fault, if it was done."""
        return self._rows.get(cell.name)

    def undisturbed(self) -> None:
        """Have the run that all others are held against."""
        make_home(self._home)
        folder = self.folder / "undisturbed"
        if not (folder / "ready").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            stage = self._staged(folder, [])
            stage.start()
            stage.await_end()
            stage.clear()
            (folder / "ready").touch()
        self._base = checks.look(folder / "runs" / "undisturbed", folder / "runs" / "mlflow.db")
        wrong = checks.compare(self._base, self._base)
        wrong += [e["event"] for e in self._base.events if e["event"] in ("resume", "restart", "replica")]
        if wrong:
            raise SystemExit(f"the undisturbed run was not undisturbed: {'; '.join(wrong)}; see {folder}")

    def faults(self, chain: list[Cell]) -> list[dict[str, Any]]:
        """Do the faults of one run, and keep what came of them."""
        folder = self.folder / (chain[0].name if len(chain) == 1 else chain[0].kind.replace(" ", "-"))
        shutil.rmtree(folder, ignore_errors=True)
        begun, killed = time.monotonic(), dict[str, float]()
        stage = self._staged(folder, chain)
        ended, wrong = False, list[str]()
        try:
            with stage.cluster():
                self._through(stage, chain, killed)
                ended = True
        except Exception as error:
            wrong = [str(error) if isinstance(error, Fault | AssertionError) else f"{type(error).__name__}: {error}"]
        for fault in chain:
            stage.release(fault)
        over = [name for name in stage.clear(wait=ended) if ended and CLEANER not in name]
        wrong += [f"processes outlived the run: {over}"] if over else []
        rows = self._rows_of(stage, chain, killed, wrong)
        for row in rows:
            row["took"] = (time.monotonic() - begun) / len(chain)
        if all(row["ok"] for row in rows):
            shutil.rmtree(folder, ignore_errors=True)
        with self._lock:
            self._rows |= {cell.name: row for cell, row in zip(chain, rows, strict=True)}
            partial = self._file.with_suffix(".partial")
            partial.write_text(json.dumps(self._rows, indent=1), encoding="utf-8")
            partial.replace(self._file)
        return rows

    def end(self) -> None:
        """End all that runs."""
        for stage in list(self._stages.values()):
            stage.clear(wait=False)

    def _staged(self, folder: Path, chain: list[Cell]) -> Stage:
        stage = Stage(self._home, folder, chain, self._patience)
        self._stages[stage.name] = stage
        return stage

    def _through(self, stage: Stage, chain: list[Cell], killed: dict[str, float]) -> None:
        """From the start to the results; notes when each fault was done."""
        stage.start()
        last: Cell | None = None
        for fault in chain:
            at = stage.await_moment(fault)
            if last:
                settle(stage, last, killed[last.name])
            killed[fault.name] = strike(stage, fault, at)
            print(f"{'':>14}{fault.kind:<12} x {fault.moment:<20} done to process {at['pid']}", flush=True)
            last = fault
        stage.await_end()

    def _rows_of(
        self, stage: Stage, chain: list[Cell], killed: dict[str, float], wrong: list[str]
    ) -> list[dict[str, Any]]:
        """What came of each fault; what is wrong with the run is wrong with all of them."""
        left: checks.Left | None = None
        if not wrong:
            left = checks.look(stage.launch.folder, stage.folder / "runs" / "mlflow.db")
            wrong = checks.compare(left, self._base)
        rows = []
        for number, fault in enumerate(chain):
            since = killed.get(fault.name, math.inf)
            until = killed.get(chain[number + 1].name, math.inf) if number + 1 < len(chain) else math.inf
            told, own = "", list[str]()
            starts = 1 + sum(since < begun < until for begun in stage.starts)
            seconds = checks.recovered(left, fault, since, until) if left else -1.0
            if since == math.inf:
                own.append("it was not done")
            else:
                told, own = recovery(fault, stage.events(), since, until)
                if starts != fault.starts:
                    own.append(f"the command was given {starts} times, not {fault.starts}; it ended with {stage.ends}")
            if left and seconds <= 0:
                own.append("the cycle that was hit was never reported after the fault")
            found = [*own, *wrong]
            rows.append(
                {
                    **{"kind": fault.kind, "moment": fault.moment, "ok": not found, "wrong": found, "recovery": told},
                    **{"starts": starts, "seconds": seconds, "faults_of_its_run": len(chain)},
                    **{"done_at": None if since == math.inf else since, "kept": str(stage.folder) if found else ""},
                }
            )
        return rows


def _some(of: tuple[str, ...]) -> Any:
    def read(text: str) -> tuple[str, ...]:
        given = tuple(part.strip() for part in text.split(","))
        if wrong := [part for part in given if part not in of]:
            raise argparse.ArgumentTypeError(f"there is no {', '.join(wrong)}; there are {', '.join(of)}")
        return tuple(part for part in of if part in given)

    return read


if __name__ == "__main__":
    main()
