"""The Slurm batch file on two nodes: namespaces, with an ``srun`` and an ``scontrol`` that do as Slurm's do."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import yaml

from raydmd.training.events import read_lines
from tests.sites import ROOT, Namespace, Nodes, _clean

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(2400)]
JOB = "4242"

SRUN = '''#!{python}
"""Starts a command on some or all nodes of the job, waits for all of them, and hands signals on."""
import os, signal, subprocess, sys

words, asked = sys.argv[1:], {{}}
while words and words[0].startswith("--"):
    key, _, value = words.pop(0).partition("=")
    asked[key] = value
nodes = [line.split() for line in open({table!r})]
chosen = [n for n in nodes if n[0] == asked["--nodelist"]] if "--nodelist" in asked else nodes
assert int(asked["--nodes"]) == int(asked["--ntasks"]) == len(chosen), (asked, chosen)
assert "--nodelist" in asked or asked["--cpu-bind"] == "none", "Ray would have one CPU of a node"
tasks = []
for rank, (name, pid) in enumerate(chosen):
    env = {{**os.environ, "SLURM_NODEID": str(rank), "SLURM_PROCID": str(rank), "SLURMD_NODENAME": name}}
    tasks.append(subprocess.Popen(["nsenter", f"--net=/proc/{{pid}}/ns/net", *words], env=env))
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda n, _: [t.send_signal(n) for t in tasks])
sys.exit(max(task.wait() for task in tasks))
'''
SCONTROL = """#!/bin/sh
case "$1 $2" in
"show hostnames") cut -d' ' -f1 {table} ;;
"show job") echo "JobId=$3 JobName=raydmd UserId=a(1000) Priority=1 JobState=$(cat {state}) Reason=None Requeue=1" ;;
*) echo "$@" >> {log} ;;
esac
"""


class Slurm:
    """Two nodes, and a folder with the commands that a batch file finds on them."""

    def __init__(self, home: Path, spaces: list[Namespace], temporary: Path) -> None:
        self.home, self.spaces, self.log = home, spaces, home / "scontrol.log"
        self.state = home / "state"
        self.state.write_text("RUNNING")
        table, tools = home / "nodes", home / "tools"
        table.write_text("".join(f"n{i} {space.pid}\n" for i, space in enumerate(spaces)))
        tools.mkdir()
        (tools / "srun").write_text(SRUN.format(python=sys.executable, table=str(table)))
        (tools / "scontrol").write_text(SCONTROL.format(table=table, log=self.log, state=self.state))
        for tool in tools.iterdir():
            tool.chmod(0o755)
        self._env = _clean() | {
            "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HOME": str(home),
            "SLURM_JOB_ID": JOB,
            "SLURM_JOB_NUM_NODES": str(len(spaces)),
            "SLURM_JOB_NODELIST": "n[0-1]",
            "RAYDMD_TEMP": str(temporary),
            "RAYDMD_RAY_OPTIONS": "--num-cpus=2 --object-store-memory=100000000",
            "RAY_worker_niceness": "0",
        }

    def start(self, *words: str) -> subprocess.Popen[str]:
        """As slurmd does on the first node."""
        with (self.home / "slurm.log").open("a") as log:
            return subprocess.Popen(
                [*self.spaces[0].enter, "bash", str(ROOT / "cluster" / "slurm" / "raydmd.sbatch"), *words],
                cwd=ROOT,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def is_step(self, process: psutil.Process) -> bool:
        """Whether it is the ``srun`` that has Ray on all nodes."""
        words = process.cmdline()
        return str(self.home / "tools" / "srun") in words and f"--nodes={len(self.spaces)}" in words

    def said(self) -> str:
        return (self.home / "slurm.log").read_text()[-4000:]

    def titles(self, node: int) -> list[str]:
        found = []
        for process in self.spaces[node].processes():
            try:
                found.append(process.cmdline()[0])
            except (psutil.Error, IndexError):
                continue
        return found

    def left(self, seconds: float = 30.0) -> list[str]:
        """What is still there of Ray: the dashboard's parts look each second whether it lives, and end after it."""
        until = time.monotonic() + seconds
        while left := [title for node in range(len(self.spaces)) for title in self.titles(node) if "ray" in title]:
            if time.monotonic() > until:
                break
            time.sleep(0.2)
        return left

    def commands(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    with Nodes() as nodes:
        if not nodes.apart:
            pytest.skip("nodes with addresses of their own need root")
        found = Slurm(tmp_path, [nodes._wire(1), nodes._wire(2)], nodes.folder)
        yield found
        for process in (p for space in found.spaces for p in space.processes()):  # left by a test that failed
            with contextlib.suppress(psutil.Error):
                process.kill()


def wait(slurm: Slurm, job: subprocess.Popen[str], seconds: float = 600.0) -> int:
    try:
        return job.wait(seconds)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"the job does not end:\n{slurm.said()}") from None


def test_a_run_over_two_nodes_that_is_told_to_go_and_queued_again(slurm: Slurm, home: Path) -> None:
    recipe = {
        "name": "slurm",
        "output": str(slurm.home / "runs"),
        "model": {"path": str(home / "model"), "frames": 5, "height": 32, "width": 32},
        "data": {"prompts": str(home / "prompts.txt"), "sizes": []},
        "training": {
            "cycles": 80,
            "batch": 2,
            "fake_updates": 4,
            "precision": "fp32",
            "sharding": "ddp",
            "gradient_checkpointing": False,
            "offload_activations": False,
            "student": {"lora": None},
        },
        "checkpoints": {"every": 5},
        "placement": {
            **{"workers": 1, "worker_cpus": 1, "worker_gpus": 0, "worker_resources": {"trainer": 1}},
            **{"teachers": 1, "teacher_cpus": 1, "teacher_gpus": 0, "teacher_resources": {"teacher": 1}},
        },
        "evaluation": {"samples": 2, "teacher_steps": 2},
    }
    (slurm.home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = ("experiments/phased_wan22.py", "--recipe", str(slurm.home / "recipe.yaml"))
    folder = slurm.home / "runs" / "slurm"
    job = slurm.start(*words)

    def events(name: str) -> list[dict]:
        log = folder / "events.jsonl"
        return [e for e in read_lines(log) if e["event"] == name] if log.exists() else []

    def wait_for_checkpoint(more_than: int) -> None:
        deadline = time.monotonic() + 600
        while len(events("committed")) <= more_than:
            assert job.poll() is None, slurm.said()
            assert time.monotonic() < deadline, slurm.said()
            time.sleep(0.2)

    wait_for_checkpoint(0)
    assert any(t.startswith("ray::RayTrainWorker") for t in slurm.titles(0)), "the first node trains"
    assert any(t.startswith("ray::Replica") for t in slurm.titles(1)), "the last node teaches"
    assert not any(t.startswith("ray::Replica") for t in slurm.titles(0))
    assert "nothing bad" in (slurm.home / "slurm.log").read_text(), "the doctor looks before the run"
    job.send_signal(signal.SIGTERM)  # as --signal=B:TERM@600 has it
    assert wait(slurm, job) == 0, slurm.said()
    assert slurm.commands() == f"requeue {JOB}\n"
    assert "writes a checkpoint" in slurm.said()
    stopped = max(int(e["checkpoint"].rpartition("-")[2]) for e in events("committed"))
    assert stopped < 80
    assert not slurm.left(), "nothing of its Ray is left"
    assert not list((slurm.home / ".raydmd").iterdir()), "nor its token"
    job = slurm.start(*words)
    wait_for_checkpoint(len(events("committed")))
    [step] = [p for p in psutil.Process(job.pid).children(recursive=True) if slurm.is_step(p)]
    step.send_signal(signal.SIGTERM)  # as a preemption has it where Slurm has no 'send_user_signal'
    assert wait(slurm, job) == 0, slurm.said()
    assert slurm.commands() == 2 * f"requeue {JOB}\n"
    again = max(int(e["checkpoint"].rpartition("-")[2]) for e in events("committed"))
    assert stopped < again < 80
    job = slurm.start(*words)
    assert wait(slurm, job) == 0, slurm.said()
    assert slurm.commands() == 2 * f"requeue {JOB}\n", "done, so not once more"
    assert [e["cycle"] for e in events("resume")] == [stopped, again]
    assert (folder / "pipeline" / "model_index.json").is_file()


def test_a_script_that_fails_ends_the_job_with_its_code(slurm: Slurm) -> None:
    job = slurm.start("experiments/phased_wan22.py", "--training.cycles=0")
    assert wait(slurm, job) == 2, slurm.said()
    assert slurm.commands() == ""
    assert not slurm.left()


def test_it_ends_no_ray_but_its_own() -> None:
    text = (ROOT / "cluster" / "slurm" / "raydmd.sbatch").read_text()
    code = "\n".join(line.partition("#")[0] for line in text.splitlines())
    assert "ray stop" not in code
    assert "pkill" not in code
    assert "killall" not in code
