"""A run as a user starts it, and what the tests of deaths ask of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from safetensors.torch import load_file

from raydmd.training.events import read_lines
from raydmd.training.folder import trained
from raydmd.training.manifest import damage
from raydmd.training.store import Store

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.sites import Node

ROOT = Path(__file__).parents[1]
CYCLES = 24


class Launch:
    """The experiment as a user starts it: a process of its own, on a Ray of its own or on a node of several.

    Args:
        home: a folder with ``model`` and ``prompts.txt``; its runs go there too.
        name: of the run.
        extra: further arguments.
        teachers: replicas of the teacher.
        at: a node to start it on; it joins that node's cluster.
        every: cycles between two checkpoints.
        settings: of the recipe.
        env: for the command, beside this process's own.
        training: keys of the recipe's section.
    """

    def __init__(
        self,
        home: Path,
        name: str,
        *extra: str,
        teachers: int = 1,
        at: Node | None = None,
        every: int = 4,
        settings: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        **training: float,
    ) -> None:
        self.folder = home / "runs" / name
        self.log = home / f"{name}.log"
        overrides = {
            # With random weights the equation's own weighting blows rounding up past FSDP's bar below, and AdamW's
            # usual eps makes whole steps of gradients of rounding's size.
            "method.normaliser": "distance",
            "data.sizes": "[{height: 32, width: 32}, {height: 32, width: 16}]",
            "model.frames": 5,
            "model.height": 32,
            "model.width": 32,
            "training.cycles": CYCLES,
            "training.batch": 4,
            "training.fake_updates": 2,
            "training.precision": "fp32",
            **({} if "--recipe" in extra else {"training.sharding": "ddp"}),
            "training.gradient_checkpointing": "false",
            "training.offload_activations": "false",
            "checkpoints.every": every,
            "training.report_every": 2,
            "training.step_timeout": 120,
            "training.student.lora": "null",
            "training.student.rate": 1e-4,
            "training.student.eps": 1e-5,
            "placement.worker_gpus": 0,
            "placement.teacher_gpus": 0,
            "placement.worker_cpus": 0.5,
            "placement.teacher_cpus": 0.5,
            "evaluation.samples": 2,
            "evaluation.grid": 2,
            "evaluation.teacher_steps": 2,
            **{f"training.{k}": v for k, v in training.items()},
            **(settings or {}),
        }
        command = [
            *(at.enter if at else ()),
            *(sys.executable, "experiments/phased_wan22.py", "--model", str(home / "model"), "--name", name),
            *("--prompts", str(home / "prompts.txt"), "--output", str(home / "runs"), "--deterministic"),
            *("--workers", "2", "--teachers", str(teachers), *(f"--{k}={v}" for k, v in overrides.items()), *extra),
        ]
        around = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"OMP_NUM_THREADS": "1"}
        around |= {**(at.env if at else {}), **(env or {})}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=around, stdout=log, stderr=subprocess.STDOUT)

    def events(self, kind: str) -> list[dict]:
        return [e for e in read_lines(self.folder / "events.jsonl") if e["event"] == kind]

    def wait_for(self, kind: str, *, cycle: int = 0, seconds: float = 600) -> dict:
        """The first event of a kind at or after a cycle."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = [e for e in self.events(kind) if e.get("cycle", 0) >= cycle]
            if found:
                return found[0]
            assert self.process.poll() is None, f"ended early:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.05)
        raise AssertionError(f"no {kind} at cycle {cycle} within {seconds} s:\n{self.log.read_text()[-3000:]}")

    def one(self, title: str) -> psutil.Process:
        """One of this run's own processes, by what Ray calls it."""
        ours = psutil.Process(self.process.pid).children(recursive=True)
        found = [p for p in ours if any(title in part for part in p.cmdline()[:1])]
        assert found, f"no {title} among {[p.cmdline()[:1] for p in ours]}"
        return found[0]

    def kill_one(self, title: str) -> int:
        """SIGKILL one of them; it must really die."""
        victim = self.one(title)
        victim.send_signal(signal.SIGKILL)
        victim.wait(10)
        return victim.pid

    def end(self, seconds: float = 900) -> int:
        return self.process.wait(seconds)

    def student(self, storage: str | None = None) -> dict:
        with Store.of(self.folder, storage).at(trained(self.folder)) as final:
            assert damage(final) == ""
            return {f.stem: load_file(f) for f in (final / "student").glob("*.safetensors")}


def same_bits(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for expert, weights in one.items():
        for name, value in weights.items():
            assert value.equal(other[expert][name]), f"{expert}.{name}"
