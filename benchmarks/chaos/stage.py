"""A run that a fault is done to: how it is started, which of its processes is which, and what is done to them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

import raydmd
from benchmarks.chaos.cells import CYCLES, EVERY, GROUP, TWICE, absent, recovery
from raydmd.errors import DONE
from raydmd.models.places import ZOO
from raydmd.models.untrained import write
from raydmd.training.events import read_lines
from tests.launch import Launch
from tests.sites import Nodes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.chaos.cells import Cell
    from tests.sites import Node

INJECT = Path(__file__).parent / "inject"
ROOT = Path(__file__).parents[2]
PROMPTS = ("a green bag moving right", "a yellow boot moving up", "a red sandal moving up", "a yellow coat moving left")
REACH, END = 240.0, 300.0
"""Seconds that a run may take to its moment, and from its fault to its end."""
CUT = 15.0
"""Seconds for which a node's cable is pulled: longer than a request waits before it is sent elsewhere."""
SETTLE = 60.0
"""Seconds that replicas have to be back before the next fault."""
MOST = 12
"""Times that a command may end before all faults of a run are done."""
REST = 30.0
"""Seconds after its end in which all processes of a run must be gone."""


class Fault(Exception):
    """What went otherwise than it should; the message says what."""


def settings(home: Path, patience: float) -> dict[str, Any]:
    """Of one run that has all parts: two phases, a teacher's and a reward's pool, two workers."""
    return {
        "data.sizes": "[]",
        "data.cache": home / "cache",
        "model.frames": 9,
        "method.decouple": "{schedule: coupled}",
        "method.adapt": json.dumps({"group": 2, "rewards": [{"path": str(ZOO / "wan22-tiny" / "reward.safetensors")}]}),
        "training.cycles": CYCLES,
        "training.fake_warmup": 1,
        "checkpoints.every": EVERY,
        "training.report_every": 1,
        "training.step_timeout": 60 * patience,
        "training.stall_timeout": 90 * patience,
        "placement.worker_cpus": 0.25,
        "placement.teacher_cpus": 0.25,
        "placement.reward_cpus": 0.25,
        "monitor.diversity": "null",
    }


def make_home(folder: Path) -> None:
    """What all runs share: a pipeline with random weights, prompts of the zoo's world, an empty MLflow database."""
    if (folder / "ready").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "prompts.txt").write_text("".join(f"{p}\n" for p in PROMPTS), encoding="utf-8")
    write("wan22", folder / "model", sorted({w for p in PROMPTS for w in p.split()}))
    from mlflow import MlflowClient

    MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").search_experiments()  # to set one up takes longer than a run
    (folder / "ready").touch()


class Stage:
    """One run in a folder of its own.

    Args:
        home: see :func:`make_home`.
        folder: of this run; must not be there.
        faults: that are done to it, all of one kind; none for an undisturbed run.
        patience: factor on deadlines.
    """

    def __init__(self, home: Path, folder: Path, faults: Sequence[Cell], patience: float = 1.0) -> None:
        self.folder, self.home, self.patience = folder, home, patience
        self.kind = faults[0].kind if faults else ""
        self.name = folder.name
        self.signs = folder / "signs"
        (self.signs / "pids").mkdir(parents=True)
        (folder / "runs").mkdir()
        for part in ("model", "prompts.txt"):
            (folder / part).symlink_to((home / part).absolute())
        shutil.copy(home / "mlflow.db", folder / "runs" / "mlflow.db")
        self.temporary = Path(tempfile.mkdtemp(prefix="rc", dir="/tmp"))  # short: there will be sockets in it
        moments = {fault.moment: {"cycle": fault.cycle, "rank": fault.rank} for fault in faults}
        plan = {"folder": str(self.signs.absolute()), "moments": moments}
        self.env = {
            "PYTHONPATH": os.pathsep.join((str(INJECT), str(ROOT))),
            "RAYDMD_CHAOS": json.dumps(plan),
            "RAY_TMPDIR": str(self.temporary),
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{60 * patience:g}",
        }
        self.launch: Launch
        self.nodes: list[Node] = []
        self.starts: list[float] = []
        self.ends: list[int] = []

    def start(self) -> None:
        """Give the command, for the first time or anew."""
        extra = settings(self.home, self.patience) | self._placement()
        at = self.nodes[0] if self.nodes else None
        # One is harder to do without, and cheaper to start.
        teachers = 2 if self.kind in ("teacher", "node", "pool network") else 1
        self.launch = Launch(self.folder, self.name, teachers=teachers, at=at, settings=extra, env=self._own(at))
        self.starts.append(time.time())

    def _own(self, at: Node | None) -> dict[str, str]:
        return {k: v for k, v in self.env.items() if k != "RAY_TMPDIR"} if at else self.env

    def _placement(self) -> dict[str, Any]:
        if self.kind not in ("node", "pool network"):
            return {}
        if self.kind == "node":
            return {"placement.worker_resources": "{trainer: 1}"}
        # A third of it is what a silent request gets before it is sent to the other replica.
        return {
            "placement.worker_resources": "{trainer: 1}",
            "placement.teacher_resources": "{teacher: 1}",
            "training.step_timeout": 30,
        }

    @contextlib.contextmanager
    def cluster(self) -> Iterator[None]:
        """The nodes that the faults need, the driver's first; none if the run starts a Ray of its own."""
        if self.kind not in ("node", "pool network"):
            yield
            return
        # Ray's own patience outlasts a cut, as it does unless it is told otherwise: the node is silent, and not dead.
        cut = {"RAY_health_check_failure_threshold": "60"} if self.kind == "pool network" else {}
        with Nodes(**{k: v for k, v in self.env.items() if k != "RAY_TMPDIR"}, **cut) as cluster:
            if self.kind == "node":
                first = cluster.start(cpus=0)
                self.nodes = [first, *(cluster.start(cpus=2, resources={"trainer": 2}) for _ in range(2))]
            else:
                if not cluster.apart:
                    raise Fault("the nodes share one address, and no cable can be pulled: this needs root")
                first = cluster.start(cpus=2, resources={"trainer": 2})
                self.nodes = [first, *(cluster.start(cpus=2, resources={"teacher": 1}) for _ in range(2))]
            yield

    def await_moment(self, fault: Cell) -> dict[str, Any]:
        """What the process that stands still says of itself; the command is given again if it has ended."""
        deadline, sign = time.monotonic() + REACH * self.patience, self.signs / f"{fault.moment}.at.json"
        while not sign.is_file():
            if (ended := self.launch.process.poll()) is not None:
                if ended == DONE:
                    raise Fault(f"the run was done before its {fault.moment}")
                self.ends.append(ended)
                if len(self.ends) > MOST:
                    raise Fault(f"the command ended {len(self.ends)} times, with {self.ends}")
                self.start()
            if time.monotonic() > deadline:
                raise Fault(f"the run did not come to its {fault.moment} within {REACH * self.patience:g} s")
            time.sleep(0.02)
        found: dict[str, Any] = json.loads(sign.read_text())
        return found

    def release(self, fault: Cell) -> None:
        """Let go what stands still; if the fault has cost it its run, no other moment is its."""
        if fault.kind in (*GROUP, *TWICE):
            (self.signs / "struck").touch()
        (self.signs / f"{fault.moment}.released").touch()

    def await_end(self) -> None:
        """Have the command end as it should, given once more if it does not."""
        for last in (False, True):
            try:
                ended = self.launch.end(END * self.patience)
            except subprocess.TimeoutExpired:
                raise Fault(f"the run did not end within {END * self.patience:g} s of its last fault") from None
            if ended == DONE:
                return
            self.ends.append(ended)
            if last:
                raise Fault(f"the run ended with {ended} for the second time")
            self.start()

    def events(self) -> list[dict[str, Any]]:
        """The run's log."""
        return list(read_lines(self.launch.folder / "events.jsonl"))

    def processes(self) -> list[psutil.Process]:
        """All that live, whoever their parents are now: each has the plan in its environment."""
        found, mark = [], str(self.signs.absolute())
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                own = process.pid != os.getpid() and mark in process.environ().get("RAYDMD_CHAOS", "")
                if own and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def victim(self, fault: Cell, at: dict[str, Any]) -> psutil.Process:
        """The process that is to die; it lives."""
        kind, moment, pid = fault.kind, fault.moment, None
        if kind == "worker":
            pid = at["pid"]
        elif kind == "driver":
            pid = self.launch.process.pid
        elif kind == "controller":
            pid = self._titled("ray::TrainController").pid
        elif kind == "teacher" and moment == "waiting for teacher":
            pid = json.loads((self.signs / "kept.json").read_text())["pid"]
        elif kind in ("teacher", "reward"):
            pid = self._replica(kind)
        if pid is None or not alive(pid):
            raise Fault(f"the {kind} (process {pid}) was dead before its {moment}")
        return psutil.Process(pid)

    def _titled(self, title: str) -> psutil.Process:
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if title in " ".join(process.cmdline()[:1]):
                    return process
        raise Fault(f"no process {title} was there")

    def _replica(self, kind: str) -> int:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for file in sorted((self.signs / "pids").glob("replica-*.json")):
                about = json.loads(file.read_text())
                if about["pool"].startswith(f"{kind}-") and alive(about["pid"]):
                    return int(about["pid"])
            time.sleep(0.1)
        raise Fault(f"the {kind}'s pool has no replica")

    def clear(self, *, wait: bool = True) -> list[str]:
        """Wait for what is left of the run, end what does not end by itself; returns that."""
        deadline = time.monotonic() + REST * self.patience * wait
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        names = []
        for process in left:
            with contextlib.suppress(psutil.Error):
                names.append(" ".join(process.cmdline())[:80])
                process.send_signal(signal.SIGKILL)
        shutil.rmtree(self.temporary, ignore_errors=True)
        return names


def alive(pid: int) -> bool:
    """Whether a process is there, and not only its number."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill(process: psutil.Process) -> None:
    """SIGKILL, until it is dead."""
    process.send_signal(signal.SIGKILL)
    until_gone(process.pid, 10)


def until_gone(pid: int, seconds: float = 60.0) -> None:
    """Wait for a process's end."""
    deadline = time.monotonic() + seconds
    while alive(pid):
        if time.monotonic() > deadline:
            raise Fault(f"process {pid} does not end within {seconds:g} s")
        time.sleep(0.01)


def strike(stage: Stage, fault: Cell, at: dict[str, Any]) -> float:
    """Do a fault, and let the run go on; returns when it was done, seconds since 1970."""
    if fault.kind == "node":
        for node in stage.nodes:
            if not node.processes():  # of the fault before
                node.start()
        [held] = [n for n in stage.nodes if at["pid"] in {p.pid for p in n.processes()}]
        if held is stage.nodes[0]:
            raise Fault(f"process {at['pid']} runs on the head")
        held.kill()
        done = time.time()
        if alive(at["pid"]):
            raise Fault(f"process {at['pid']} outlived its node")
        stage.release(fault)
    elif fault.kind == "pool network":
        far = stage.nodes[1]
        if fault.moment == "waiting for teacher":
            kept = json.loads((stage.signs / "kept.json").read_text())["pid"]
            [far] = [n for n in stage.nodes if kept in {p.pid for p in n.processes()}]
        far.cut()
        done = time.time()
        if fault.moment != "export":
            stage.release(fault)
        time.sleep(CUT)
        far.mend()
        stage.release(fault)
    else:
        kill(stage.victim(fault, at))
        done = time.time()
        if fault.kind == "driver" and fault.moment == "export":  # it could be done before Ray has noticed, and ends it
            until_gone(at["pid"])
        if fault.kind == "teacher" and fault.moment == "export":  # it asks for seconds only: let the driver notice
            settle(stage, fault, done, back=False)
        stage.release(fault)
    return done


def settle(stage: Stage, fault: Cell, killed: float, *, back: bool = True) -> None:
    """Wait until the log tells of a recovery, for a while: what it lacks is told in the end.

    Args:
        stage: the run.
        fault: what was done to it.
        killed: when, seconds since 1970.
        back: wait for lost replicas too.
    """
    deadline = time.monotonic() + SETTLE * stage.patience
    while time.monotonic() < deadline:
        events = stage.events()
        if not recovery(fault, events, killed)[1] and not (back and absent(events)):
            return
        time.sleep(0.1)


def code() -> str:
    """The state of what is tested, and of what tests it."""
    digest = hashlib.sha256()
    parts = [*Path(raydmd.__file__).parent.rglob("*.py"), *Path(__file__).parent.rglob("*.py")]
    others = ("tests/launch.py", "tests/sites.py", "experiments/phased_wan22.py", "constraints.txt")
    for file in sorted([*parts, *(ROOT / name for name in others)]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:10]


def machine(parallel: int) -> str:
    """What the times were taken on."""
    return f"{platform.machine()}, {os.cpu_count()} cores, {parallel} runs side by side"
