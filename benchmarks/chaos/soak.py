"""Faults at random moments, as many as four hours with one every ten minutes have, in half an hour; then the quality.

    python -m benchmarks.chaos.soak
    python -m benchmarks.chaos.soak --seed 7

The demo's run, with more updates, is made twice: undisturbed, and with faults whose kinds and gaps are drawn from
``--seed``; how long a gap is on average follows from the undisturbed run, so that all faults come while it trains, on
a quick machine and on a slow one. A command that ends is given again, whatever it ended with. Then both students'
figures stand side by side, with whether the final checkpoints have the same bits. Ends with 1 if they have not, if
training was over before the last fault, if one left no word in the event log, or if MLflow lacks a step. What it did
and found goes to the terminal and to ``--output``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from benchmarks.chaos import checks
from benchmarks.chaos.stage import ROOT, code, machine
from raydmd.errors import DONE
from raydmd.training.events import read_lines
from raydmd.training.folder import finished
from raydmd.training.manifest import damage
from raydmd.training.store import experiment

if TYPE_CHECKING:
    from collections.abc import Iterator

RESTART, AGAIN = ("restart",), ("start", "resume")
CUT_OFF = "checkpoint cut off, driver killed"
KINDS: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "worker killed": (4, "ray::RayTrainWorker", RESTART),
    "worker stopped for good": (1, "ray::RayTrainWorker", RESTART),
    "worker stopped for a while": (2, "ray::RayTrainWorker", ()),
    "controller killed": (2, "ray::TrainController", RESTART),
    "teacher killed": (4, "ray::Replica", ("replica",)),
    "teacher stopped for a while": (2, "ray::Replica", ()),
    "head killed": (2, "gcs_server", AGAIN),
    "driver killed": (3, "", AGAIN),
    "driver asked to stop": (2, "", AGAIN),
    CUT_OFF: (2, "", ("fallback",)),
}
"""How often each is drawn, whom it befalls (the driver, if nobody is named), and what of it the log must tell."""
HOURS, FAULTS = 4.0, 24
"""What is compressed: so many hours with so many faults."""
COST = 30.0
"""Seconds that a fault takes of a run, about."""
HASTE = 0.85
"""Of the mean gap with which the last fault would come as training ends: it shall come before."""
WHILE = 15.0
"""Seconds that a process stands still for a while."""
LEAST = 20.0
"""Seconds between two faults, at least."""
VICTIM = 120.0
"""Seconds that a fault waits for somebody to befall."""
END = 1800.0
"""Seconds that the run may take after its last fault."""
CURVES = ("fake/loss", "fake/gradient", "student/gradient", "teacher/x0_mean")
FIGURES = ("frechet", "joint", "flow", "dynamic_degree", "diversity", "coverage_entropy")


class Soaked:
    """The demo's run in a folder of its own.

    Args:
        folder: of it.
        cycles: student updates.
    """

    def __init__(self, folder: Path, cycles: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.output, self.folder, self.log = folder / "runs", folder / "runs" / "soak", folder / "log.txt"
        self.temporary = Path(tempfile.mkdtemp(prefix="rs", dir="/tmp"))  # short: there will be sockets in it
        self._mark = str(folder.absolute())
        self._command = [
            *(
                sys.executable,
                "experiments/phased_wan22.py",
                "--name=soak",
                f"--output={self.output}",
                "--deterministic",
            ),
            *(f"--training.cycles={cycles}", "--training.report_every=1", "--checkpoints.every=10"),
            *("--training.step_timeout=60", "--training.stall_timeout=90"),
        ]
        self.starts, self.ends = 0, list[int]()
        self.process: subprocess.Popen[bytes]

    def start(self) -> None:
        """Give the command, for the first time or anew."""
        around = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        around |= {"RAYDMD_SOAK": self._mark, "RAY_TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._command, cwd=ROOT, env=around, stdout=log, stderr=subprocess.STDOUT)
        self.starts += 1

    def ended(self) -> bool:
        """Whether the run is done; a command that ended otherwise is given again."""
        if (code := self.process.poll()) is None:
            return False
        self.ends.append(code)
        if code == DONE:
            if not finished(self.folder):
                raise SystemExit(f"the command ended with {code} and has left no result; see {self.log}")
            return True
        self.start()
        return False

    def ends_within(self, seconds: float) -> bool:
        """Wait so long, or until the run is done."""
        end = time.monotonic() + seconds
        while not (done := self.ended()) and time.monotonic() < end:
            time.sleep(0.2)
        return done

    def events(self) -> list[dict[str, Any]]:
        """The run's log."""
        return list(read_lines(self.folder / "events.jsonl"))

    def processes(self) -> Iterator[psutil.Process]:
        """All that live, whoever their parents are now."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.pid != os.getpid() and process.environ().get("RAYDMD_SOAK") == self._mark:
                    yield process

    def victims(self, title: str) -> list[psutil.Process]:
        """The processes of that title, or the driver; those of a run that has died already are none."""
        if not title:
            return [psutil.Process(self.process.pid)] if self.process.poll() is None else []
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if title in " ".join(process.cmdline()[:1]) and process.status() != psutil.STATUS_STOPPED:
                    found.append(process)
        return found

    def clear(self) -> None:
        """End what is left."""
        for process in list(self.processes()):
            with contextlib.suppress(psutil.Error):
                process.kill()
        shutil.rmtree(self.temporary, ignore_errors=True)


def befall(run: Soaked, kind: str, draw: random.Random) -> dict[str, Any] | None:
    """Do a fault.

    Returns:
        What was done when and to whom; ``None`` if training was over, of which nobody goes on from a checkpoint.
    """
    _, title, _ = KINDS[kind]
    if checks.trained(run.folder):
        return None
    deadline = time.monotonic() + VICTIM
    while not (found := run.victims(title)) or (kind == CUT_OFF and newest(run.folder) is None):
        if run.ended():
            return None
        if time.monotonic() > deadline:
            raise SystemExit(f"{kind}: within {VICTIM:g} s there was no {title or 'driver'} in {run.folder}")
        time.sleep(0.2)
    victim, extra = draw.choice(found), dict[str, Any]()
    if not title and kind != "driver asked to stop":
        run.process.kill()
        run.process.wait(30)  # not by psutil, which would take its exit code
    if kind == CUT_OFF:
        extra = {"file": str(cut_off(newest(run.folder), draw))}
    elif kind == "driver asked to stop":
        victim.send_signal(signal.SIGTERM)
    elif "stopped" in kind:
        victim.send_signal(signal.SIGSTOP)
    elif title:
        victim.kill()
    fault = {"kind": kind, "pid": victim.pid, "time": time.time(), **extra}
    if "for a while" in kind:
        time.sleep(WHILE)
        with contextlib.suppress(psutil.Error):
            victim.send_signal(signal.SIGCONT)
    return fault


def newest(folder: Path) -> Path | None:
    """The newest committed checkpoint of a run, if there is another one before it."""
    events = list(read_lines(folder / "events.jsonl"))
    committed = [e["checkpoint"] for e in events if e["event"] == "committed"]
    at = experiment(folder)
    whole = [p for name in committed if (p := folder / at / name).is_dir() and not damage(p)]
    return whole[-1] if len(whole) > 1 else None


def cut_off(checkpoint: Path | None, draw: random.Random) -> Path:
    """Take the second half of one file of a checkpoint."""
    assert checkpoint is not None
    file = draw.choice(sorted(p for p in checkpoint.rglob("*.distcp") if p.stat().st_size))
    os.truncate(file, file.stat().st_size // 2)
    return file


def disturbed(run: Soaked, seed: int, mean: float) -> list[dict[str, Any]]:
    """Make the run with all its faults, or those that come before training is over; returns them.

    Args:
        run: not started yet.
        seed: draws kinds and gaps.
        mean: seconds between two faults.
    """
    draw, faults = random.Random(seed), list[dict[str, Any]]()
    kinds, weights = list(KINDS), [weight for weight, _, _ in KINDS.values()]
    begun = time.monotonic()
    run.start()
    for _ in range(FAULTS):
        if run.ends_within(LEAST + draw.expovariate(1 / (mean - LEAST))):
            return faults
        [kind] = draw.choices(kinds, weights)
        if fault := befall(run, kind, draw):
            faults.append(fault)
            rows = list(read_lines(run.folder / "metrics.jsonl"))
            at_cycle = int(rows[-1]["cycle"]) if rows else 0
            fault |= {"after": time.monotonic() - begun, "cycle": at_cycle}
            print(f"{fault['after'] / 60:5.1f} min  cycle {at_cycle:4d}  {kind}", flush=True)
    if not run.ends_within(END):
        raise SystemExit(f"the run did not end within {END:g} s of its last fault; see {run.log}")
    return faults


def tell(faults: list[dict[str, Any]], events: list[dict[str, Any]], ends: list[int]) -> list[str]:
    """Add to each fault what the log tells between it and the next; returns what it does not tell.

    Args:
        faults: in their order.
        events: of the run.
        ends: what the command ended with, each time.
    """
    wrong = [] if len(faults) == FAULTS else [f"training was over after {len(faults)} faults of {FAULTS}"]
    told = ("restart", "replica", "start", "resume", "fallback", "damaged", "stopped", "stalled")
    until = [*(f["time"] for f in faults[1:]), float("inf")]
    for fault, end in zip(faults, until, strict=True):
        after = [e for e in events if e["time"] > fault["time"] and e["event"] in told]
        fault["told"] = sorted({e["event"] for e in after if e["time"] < end})
        expected = KINDS[fault["kind"]][2]
        # Whoever has just begun anew may be hit again before it says so; and what was ending anyway, by anything.
        if expected and not {*expected, *AGAIN} & {e["event"] for e in after}:
            wrong.append(f"nothing is told of '{fault['kind']}' after {fault['after'] / 60:.1f} min")
    drivers = sum(not KINDS[f["kind"]][1] for f in faults)
    if drivers > sum(end != DONE for end in ends):
        wrong.append(f"the driver was hit {drivers} times, and the command ended with {ends}")
    hits = [f["time"] for f in faults if KINDS[f["kind"]][2] == RESTART]
    # Whoever is hit once more before anything was committed was no other group: one that stood still, say.
    groups = sum(n == 0 or committed(events, hits[n - 1], hit) for n, hit in enumerate(hits))
    if (back := sum(e["event"] == "restart" for e in events)) < groups:
        wrong.append(f"workers or controllers were hit {groups} times, and the log tells of {back} restarts")
    # What outlives a driver for a second may commit another checkpoint: then nobody needs the one that was cut off.
    begun = [e["time"] for e in events if e["event"] in (*AGAIN, "damaged", "fallback")]
    cuts = [f["time"] for f in faults if f["kind"] == CUT_OFF]
    cut = sum(not committed(events, t, min((b for b in begun if b > t), default=t)) for t in cuts)
    if (back := sum(e["event"] == "fallback" for e in events)) < cut:
        wrong.append(f"{cut} checkpoints were cut off, and the log tells of {back} falls back")
    return wrong


def committed(events: list[dict[str, Any]], since: float, until: float) -> bool:
    """Whether a checkpoint was committed between two times."""
    return any(e["event"] == "committed" and since < e["time"] < until for e in events)


def rendered(found: dict[str, Any]) -> str:
    """What came of it, in Markdown."""
    counts = {kind: sum(f["kind"] == kind for f in found["faults"]) for kind in KINDS}
    first, second = found["undisturbed"], found["disturbed"]
    lines = [
        "# Soak",
        "    make soak",
        f"The demo's run with {found['cycles']} student updates, once undisturbed and once with {len(found['faults'])} "
        f"faults of kinds and at moments drawn at random (seed {found['seed']}), one in {found['mean']:.0f} s: as many "
        f"as {HOURS:g} hours with one every {HOURS * 60 / FAULTS:g} minutes have. The command was given "
        f"{found['starts']} times; it ended with {', '.join(map(str, found['ends']))}. "
        f"{'Same' if found['same_bits'] else 'OTHER'} bits "
        "in the final checkpoints: students, fake scores, their optimizers and averages, and the exported pipelines.",
        "\n".join(["| fault | times |", "|---|---|", *(f"| {k} | {n} |" for k, n in counts.items())]),
        "\n".join(
            [
                "| student | minutes | " + " | ".join(FIGURES) + " |",
                "|---|---|" + "---|" * len(FIGURES),
                *(
                    f"| {name} | {run['minutes']:.1f} | "
                    + " | ".join(f"{run['student'][k]:.4f}" for k in FIGURES)
                    + " |"
                    for name, run in (("undisturbed", first), ("with faults", second))
                ),
            ]
        ),
        *(f"WRONG: {w}" for w in found["wrong"]),
        f"{found['machine']}.",
    ]
    return "\n\n".join(lines) + "\n"


def figures(run: Soaked) -> dict[str, float]:
    """The student's row of the run's result."""
    rows = json.loads((run.folder / "result.json").read_text())["rows"]
    [row] = [r for r in rows if r["name"] == "student"]
    return {k: row[k] for k in FIGURES}


def main() -> None:
    """Make both runs and hold them against each other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="draws kinds and moments")
    parser.add_argument("--cycles", type=int, default=1080, help="student updates")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "soak", help="for both runs; made anew")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what it has started is ended
    folder = args.folder.absolute() / code()
    runs, times = dict[str, Soaked](), dict[str, float]()
    faults, mean = list[dict[str, Any]](), LEAST
    for name in ("undisturbed", "disturbed"):
        ready = folder / name / f"{args.cycles}-updates-undisturbed"
        if ready.is_file():  # of an earlier try with the same code
            runs[name], times[name] = Soaked(folder / name, args.cycles), float(ready.read_text())
            continue
        shutil.rmtree(folder / name, ignore_errors=True)
        run, begun = Soaked(folder / name, args.cycles), time.monotonic()
        runs[name] = run
        try:
            if name == "disturbed":
                mean = max(1.5 * LEAST, HASTE * (times["undisturbed"] * 60 / FAULTS + COST))
                faults = disturbed(run, args.seed, mean)
            else:
                run.start()
                if run.process.wait(END) != DONE:
                    raise SystemExit(f"the undisturbed run failed; see {run.log}")
        finally:
            run.clear()
        times[name] = (time.monotonic() - begun) / 60
        if name == "undisturbed":
            ready.write_text(f"{times[name]}")
        print(f"{name}: {times[name]:.1f} minutes", flush=True)
    left = {name: checks.look(run.folder, run.output / "mlflow.db", CURVES) for name, run in runs.items()}
    differ = checks.compare(left["disturbed"], left["undisturbed"])
    wrong = [*differ, *tell(faults, left["disturbed"].events, runs["disturbed"].ends)]
    found = {
        **{"seed": args.seed, "cycles": args.cycles, "mean": mean, "machine": machine(1), "code": code()},
        **{"starts": runs["disturbed"].starts, "ends": runs["disturbed"].ends, "faults": faults},
        **{"same_bits": not differ, "wrong": wrong},
        **{name: {"minutes": times[name], "student": figures(run)} for name, run in runs.items()},
    }
    table = rendered(found)
    print(f"\n{table}")
    (args.output / "chaos-soak.md").write_text(table, encoding="utf-8")
    (args.output / "chaos-soak.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
