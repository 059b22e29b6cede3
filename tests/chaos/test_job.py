"""The front door: `ray start --head`, token authentication on, `ray job submit`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.pipelines import wan_pipeline

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1500)]
ROOT = Path(__file__).parents[2]
PORT, DASHBOARD = 6391, 8391


@pytest.fixture
def cluster(tmp_path_factory):
    """A head node of our own, with its own token; ended by its own process ids."""
    ray = str(Path(sys.executable).parent / "ray")
    home = tmp_path_factory.mktemp("home")
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "token",
        "HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    subprocess.run([ray, "get-auth-token", "--generate"], env=env, check=True, capture_output=True, timeout=240)
    before = {p.pid for p in psutil.process_iter()}
    start = [ray, "start", "--head", f"--port={PORT}", f"--dashboard-port={DASHBOARD}", "--num-cpus=2"]
    # Ray's own port for the agent is the same for every cluster: one of another test beside would take it.
    start.append("--dashboard-agent-listen-port=52391")
    options = ["--disable-usage-stats", "--ray-client-server-port=24391", "--temp-dir=/tmp/raydmd-job"]
    subprocess.run([*start, *options], env=env, check=True, capture_output=True, timeout=240)
    yield ray, env
    for p in psutil.process_iter():
        if p.pid not in before and any("raydmd-job" in part for part in _command(p)):
            p.send_signal(signal.SIGKILL)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_submitted_job_runs_with_two_workers_and_two_replicas(cluster, tmp_path):
    ray, env = cluster
    wan_pipeline(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a cat runs\na dog jumps\n")
    small = {
        "data.sizes": "[]",
        "model.frames": 5,
        "model.height": 32,
        "model.width": 32,
        "training.cycles": 4,
        "training.batch": 4,
        "training.fake_updates": 1,
        "training.precision": "fp32",
        "training.sharding": "ddp",
        "training.gradient_checkpointing": "false",
        "training.offload_activations": "false",
        "training.student.lora": "null",
        "placement.sequence": 2,  # both workers share each sample, and ask once
        "placement.worker_gpus": 0,
        "placement.teacher_gpus": 0,
        "placement.worker_cpus": 0.5,
        "placement.teacher_cpus": 0.5,
        "evaluation.samples": 2,
        "evaluation.teacher_steps": 2,
    }
    address = f"http://127.0.0.1:{DASHBOARD}"
    command = [
        *(ray, "job", "submit", "--address", address, "--working-dir", str(ROOT), "--"),
        *("python", "experiments/phased_wan22.py", "--model", str(tmp_path / "model"), "--workers", "2"),
        *("--teachers", "2", "--prompts", str(tmp_path / "prompts.txt"), *(f"--{k}={v}" for k, v in small.items())),
    ]
    deadline = time.monotonic() + 300
    while True:  # a node's agent comes up after the node itself
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200, check=False)
        said = done.stdout + done.stderr
        if "No available agent to submit job" not in said or time.monotonic() > deadline:
            break
        time.sleep(5)
    assert done.returncode == 0, said[-4000:]
    assert "succeeded" in said
    assert "asks for no token" not in said
    assert "report" in said
    kept = Path(env["HOME"]) / "raydmd" / "runs" / "phased-wan22"
    assert (kept / "report.html").is_file(), "a job's relative output must outlive the job"
    assert (kept / "pipeline" / "model_index.json").is_file()
    # Without the token nobody gets in.
    stranger = {k: v for k, v in env.items() if k != "RAY_AUTH_MODE"} | {"HOME": str(tmp_path)}
    refused = subprocess.run(
        [ray, "job", "list", "--address", address],
        env=stranger, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert refused.returncode != 0
