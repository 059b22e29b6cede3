"""A sweep on a standing cluster, stopped by signals and kill -9 at random points, ends as an undisturbed one does."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import yaml
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from raydmd.training.events import read_lines

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.chaos, pytest.mark.sweep, pytest.mark.timeout(1500)]

HERE = Path(__file__).parents[2]
PORT, DASHBOARD = 6395, 8395
TEMP = "/tmp/raydmd-stopped"
TRIALS = 4
SWEEP: dict[str, Any] = {
    "name": "stopped",
    "objectives": {"frechet": "min"},
    "space": {"method.guidance": {"low": 2.0, "high": 6.0}},
    "search": {"kind": "random"},
    "budget": {"trials": TRIALS},
    "recipe": {
        "model.path": "sd35-tiny",
        "method": {"name": "dmd2", "shift": 3.0},
        "training": {
            "cycles": 100,
            "batch": 8,
            "fake_updates": 1,
            "precision": "fp32",
            "report_every": 5,
            "student": {"lora": None},
        },
        "checkpoints.every": 20,
        "evaluation": {"every": 50, "samples": 16, "teacher_steps": 3, "grid": 2},
        "placement": {"worker_cpus": 0.5, "teacher_cpus": 0.25},
        "monitor.diversity": None,
    },
}
LEFT = """
import json, sys, time
import ray
from ray.util import placement_group_table
from ray.util.state import list_actors
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
me = ray.get_runtime_context().get_job_id()
deadline = time.monotonic() + float(sys.argv[2])
while True:
    actors = [a.class_name for a in list_actors(limit=9999) if a.state != "DEAD" and a.job_id != me]
    # Ray Train's own, one for the whole cluster, for as long as it stands.
    actors = [name for name in actors if name != "_AutoscalingCoordinatorActor"]
    groups = [g["name"] for g in placement_group_table().values() if g["state"] != "REMOVED"]
    if not (actors or groups) or time.monotonic() > deadline:
        break
    time.sleep(1)
print(json.dumps({"actors": actors, "groups": groups}))
"""


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head node of our own, with its own token; yields the environment that finds it."""
    ray = str(Path(sys.executable).parent / "ray")
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "token",
        "HOME": str(tmp_path_factory.mktemp("home")),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(HERE),
        "RAY_ADDRESS": f"127.0.0.1:{PORT}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    starting = {k: v for k, v in env.items() if k != "RAY_ADDRESS"}
    subprocess.run([ray, "get-auth-token", "--generate"], env=starting, check=True, capture_output=True, timeout=240)
    start = [ray, "start", "--head", f"--port={PORT}", f"--dashboard-port={DASHBOARD}", "--num-cpus=2"]
    start += ["--dashboard-agent-listen-port=52395", "--ray-client-server-port=24395", f"--temp-dir={TEMP}"]
    before = {p.pid for p in psutil.process_iter()}
    subprocess.run([*start, "--disable-usage-stats"], env=starting, check=True, capture_output=True, timeout=240)
    yield env
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid not in before and any(TEMP in part for part in process.cmdline()):
                process.send_signal(signal.SIGKILL)


def remains(env: dict[str, str], patience: float) -> dict[str, list[str]]:
    """Actors and placement groups of others that are there after a while."""
    asked = subprocess.run(
        [sys.executable, "-c", LEFT, env["RAY_ADDRESS"], str(patience)],
        env=env,
        capture_output=True,
        text=True,
        timeout=patience + 120,
        check=False,
    )
    assert asked.returncode == 0, asked.stderr[-3000:]
    found: dict[str, list[str]] = json.loads(asked.stdout.strip().splitlines()[-1])
    return found


def test_five_stops_lose_nothing_and_leave_nothing(cluster: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(SWEEP), encoding="utf-8")
    log, seed = tmp_path / "sweep.log", random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    draw = random.Random(seed)

    def start() -> subprocess.Popen[bytes]:
        with log.open("a") as out:
            return subprocess.Popen(
                [sys.executable, "-m", "raydmd", "sweep", "run", "s.yaml", "--cluster", "here"],
                cwd=tmp_path,
                env=cluster,
                stdout=out,
                stderr=out,
            )

    def rows() -> list[dict[str, Any]]:
        words = ["sweep", "status", "runs/stopped", "--json"]
        asked = subprocess.run(
            [sys.executable, "-m", "raydmd", *words],
            cwd=tmp_path,
            env=cluster,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        found: list[dict[str, Any]] = json.loads(asked.stdout[asked.stdout.index("{") :])["trials"]
        return [row for row in found if row["state"] != "lost"]

    trials = tmp_path / "runs" / "stopped" / "trials"

    def trained() -> int:
        return sum(max((int(r["cycle"]) for r in read_lines(f)), default=0) for f in trials.glob("*/metrics.jsonl"))

    stops = 0
    for how, in_training in (
        (signal.SIGINT, True),
        (signal.SIGKILL, False),
        (signal.SIGKILL, True),
        (signal.SIGINT, False),
        (signal.SIGKILL, True),
    ):
        sweep, before = start(), trained()
        # In the first seconds of the command, or after some more cycles of its trials.
        wait, cycles = draw.uniform(4, 20), draw.randrange(5, 60) if in_training else 0
        begun = time.monotonic()
        while sweep.poll() is None and (time.monotonic() < begun + wait or trained() < before + cycles):
            assert time.monotonic() < begun + 300, log.read_text()[-3000:]
            time.sleep(0.1)
        if sweep.poll() is None:
            stops += 1
            sweep.send_signal(how)
            print(f"stop {stops}: {how.name} after {time.monotonic() - begun:.1f} s, {trained()} cycles in all")
            code = sweep.wait(timeout=240)
            assert code in (3, -signal.SIGINT, -signal.SIGKILL), log.read_text()[-3000:]
        else:
            assert sweep.returncode == 0, log.read_text()[-3000:]
    sweep = start()
    assert sweep.wait(timeout=800) == 0, log.read_text()[-5000:]
    found = rows()
    assert [row["state"] for row in found] == ["finished"] * TRIALS, found
    assert len({row["trial"] for row in found}) == TRIALS
    left = remains(cluster, 120)
    assert left == {"actors": [], "groups": []}

    uri = f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    client = MlflowClient(uri)
    [experiment] = [e for e in client.search_experiments() if e.name == "raydmd"]
    runs = client.search_runs([experiment.experiment_id])
    assert len([r for r in runs if MLFLOW_PARENT_RUN_ID not in r.data.tags]) == 1
    children = {r.data.tags["raydmd.trial"]: r for r in runs if MLFLOW_PARENT_RUN_ID in r.data.tags}
    assert len(children) == len(runs) - 1 == TRIALS
    for name, run in children.items():
        for key in ("cycle", "fake/loss", "evaluation/frechet"):
            steps = Counter(m.step for m in client.get_metric_history(run.info.run_id, key))
            assert set(steps.values()) == {1}, (name, key, steps)
        assert max(steps) == 100
        rows_kept = {int(r["cycle"]) for r in read_lines(trials / name / "metrics.jsonl") if "fake/loss" in r}
        assert {m.step for m in client.get_metric_history(run.info.run_id, "fake/loss")} == rows_kept
    resumed = [e for f in trials.glob("*/events.jsonl") for e in read_lines(f) if e["event"] == "resume"]
    print(f"{stops} stops, {len(resumed)} resumes, trials {sorted(children)}")
    assert stops >= 4
    assert resumed
