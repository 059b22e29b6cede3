"""Every command that cluster/ names is one that runs."""

from __future__ import annotations

import functools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raydmd.recipe import Recipe, combine

pytestmark = pytest.mark.local

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"


def dry_run(words: list[str]) -> str:
    """What a command that is written down says, started as ``--dry-run``; the doctor, which has none, as ``--help``."""
    words = [w.replace("/etc/raydmd/recipe.yaml", "cluster/recipe.yaml").replace("/opt/raydmd/", "") for w in words]
    if "--" in words:  # what is behind 'ray job submit'
        words = words[words.index("--") + 1 :]
    if ">" in words:
        words = words[: words.index(">")]
    return started(tuple(word for word in words if word != "--dry-run"))


@functools.cache
def started(words: tuple[str, ...]) -> str:
    """Many of them are the same command."""
    doctor = words[:2] == ("raydmd", "doctor")
    assert doctor or words[0] == "python"
    start = ["-m", "raydmd"] if doctor else []
    done = subprocess.run(
        [sys.executable, *start, *words[1:], "--help" if doctor else "--dry-run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    if doctor:  # its keys are those of a recipe
        keys = [w for w in words if "=" in w and not w.startswith("-")]
        combine(Recipe(), overrides=keys)
        assert set(words[2:]) - set(keys) <= {"amd-sdxl.yaml", "--address", "HEAD:6379"}, (
            "the file that the command before it writes"
        )
    return done.stdout


def commands() -> dict[str, list[str]]:
    """Every command of raydmd that is written down in cluster/, by where."""
    found: dict[str, list[str]] = {}
    for file in sorted(f for f in CLUSTER.rglob("*") if f.is_file() and f.suffix != ".json"):
        text = file.read_text(encoding="utf-8")
        for line in re.findall(r"^# *(?:runs|Its figures): (.+)$", text, re.M):
            found[f"{file.relative_to(CLUSTER)}: {line}"] = shlex.split(line)
        for line in re.findall(r"^ *entrypoint: (.+)$", text, re.M):
            found[f"{file.relative_to(CLUSTER)}: {line}"] = shlex.split(line)
        if file.suffix == ".md":
            for block in re.findall(r"```bash\n(.*?)```", text, re.S):
                for line in block.replace("\\\n", " ").splitlines():
                    command = line.partition(" #")[0].strip()
                    if re.search(r"(^|-- )(raydmd|python experiments)", command):
                        found[f"{file.relative_to(CLUSTER)}: {command}"] = shlex.split(command)
    return found


def test_every_manifest_names_what_it_runs() -> None:
    named = {where.partition(":")[0] for where in commands()}
    runs = {"kuberay/raycluster.yaml", "kuberay/rayjob.yaml", "launcher/aws.yaml", "launcher/gcp.yaml"}
    assert named >= {*runs, "slurm/raydmd.sbatch", "services/compose.yaml", "README.md"}


@pytest.mark.parametrize("where", commands())
def test_commands_that_are_written_down_run(where: str) -> None:
    dry_run(commands()[where])


TOOLS = {
    # Starts what it is asked on "all nodes": an address, or Ray until it is told to end.
    "srun": """
echo "$*" >> srun.log
case "$*" in
*"hostname -I") echo 10.0.0.1 ;;
*) trap 'exit 0' USR1; while :; do sleep 0.05; done ;;
esac
""",
    "scontrol": """
case "$1 $2" in
"show hostnames") echo n0 ;;
"show job") echo "JobId=$3 JobName=raydmd Priority=1 JobState=$(cat state) Reason=None Requeue=1" ;;
*) echo "$@" >> scontrol.log ;;
esac
""",
    # The run, which ends with its checkpoint when it is told to; the batch file's own snippets need no answer.
    "python": """
[ "$1" = run.py ] || exit 0
trap 'exit 3' TERM
touch running
while :; do sleep 0.05; done
""",
    "raydmd": "",
}


@pytest.mark.parametrize(
    ("state", "queued"), [("RUNNING", "requeue 4242\n"), ("COMPLETING", ""), ("CANCELLED", ""), ("PENDING", "")]
)
def test_a_slurm_job_that_is_cancelled_does_not_come_back(state: str, queued: str, tmp_path: Path) -> None:
    """Time that is up, a preemption and ``scancel`` are one signal: what Slurm calls the job tells them apart."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in TOOLS.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}")
        (tools / name).chmod(0o755)
    (tmp_path / "state").write_text(state)
    slurm = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n0"}
    job = subprocess.Popen(
        ["bash", CLUSTER / "slurm" / "raydmd.sbatch", "run.py"],
        cwd=tmp_path,
        env={"PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(tmp_path), **slurm},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "running").exists():
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    said, _ = job.communicate(timeout=60)
    log = tmp_path / "scontrol.log"
    assert (log.read_text() if log.exists() else "") == queued, said
    assert job.returncode == (0 if queued else 3), said
    assert ("queued again; it goes on" in said) == bool(queued)
    assert "--cpu-bind=none" in (tmp_path / "srun.log").read_text(), "Ray would have one CPU of a node"


def test_a_slurm_job_has_its_nodes_whole() -> None:
    text = (CLUSTER / "slurm" / "raydmd.sbatch").read_text(encoding="utf-8")
    assert {"--exclusive", "--mem=0"} <= set(re.findall(r"^#SBATCH (\S+)$", text, re.M))
