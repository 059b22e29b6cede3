"""Two Ray clusters on one study in a real PostgreSQL; one of them is killed, the other finishes the budget."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

HERE = Path(__file__).parents[2]
sys.path.insert(0, str(HERE / "tests" / "ray"))
import postgres  # noqa: E402

pytestmark = [pytest.mark.chaos, pytest.mark.sweep, pytest.mark.timeout(900)]

SWEEP: dict[str, Any] = {
    "name": "shared",
    "objectives": {"frechet": "min"},
    "space": {"method.guidance": {"low": 2.0, "high": 6.0}},
    "search": {"kind": "random"},
    "budget": {"trials": 4},
    "parallel": 1,
    "recipe": {
        "model.path": "sd35-tiny",
        "method": {"name": "dmd2", "shift": 3.0},
        "training": {"cycles": 100, "batch": 8, "fake_updates": 1, "precision": "fp32", "student": {"lora": None}},
        "evaluation": {"every": 20, "samples": 16, "teacher_steps": 3, "grid": 2},
        "placement": {"worker_cpus": 0.5, "teacher_cpus": 0.25},
        "monitor.diversity": None,
    },
}


def start(folder: Path, cluster: str, storage: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "RAYDMD_STORAGE": storage}
    env.pop("RAY_ADDRESS", None)
    words = ["run", "s.yaml", "--cluster", cluster, f"output={folder / cluster}"]
    log = (folder / f"{cluster}.log").open("w")
    return subprocess.Popen(
        [sys.executable, "-m", "raydmd", "sweep", *words], cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT
    )


def rows(folder: Path, storage: str) -> list[dict[str, Any]]:
    words = ["status", str(folder), "--json", "--storage", storage]
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    asked = subprocess.run(
        [sys.executable, "-m", "raydmd", "sweep", *words],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found: list[dict[str, Any]] = json.loads(asked.stdout[asked.stdout.index("{") :])["trials"]
    return found


def test_the_survivor_finishes_the_budget(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(SWEEP), encoding="utf-8")
    with postgres.server() as database:
        storage = database.address
        doomed = start(tmp_path, "doomed", storage)
        metrics = tmp_path / "doomed" / "shared" / "trials" / "0000" / "metrics.jsonl"
        deadline = time.monotonic() + 300
        while not metrics.exists():  # it trains the first trial
            assert doomed.poll() is None, (tmp_path / "doomed.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.5)
        lives = start(tmp_path, "lives", storage)
        running: dict[str, set[int]] = {}
        while running.keys() != {"doomed", "lives"}:
            assert lives.poll() is None, (tmp_path / "lives.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.5)
            running = {}
            for row in rows(tmp_path / "doomed" / "shared", storage):
                if row["state"] == "running" and row["cluster"]:
                    running.setdefault(row["cluster"], set()).add(row["trial"])
        family = [psutil.Process(doomed.pid), *psutil.Process(doomed.pid).children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        doomed.wait(timeout=30)
        assert lives.wait(timeout=500) == 0, (tmp_path / "lives.log").read_text()
        found = rows(tmp_path / "lives" / "shared", storage)
        kept = [row for row in found if row["state"] != "lost"]
        assert len({row["trial"] for row in kept}) == len(kept) == 4  # none twice, none lost
        assert {row["state"] for row in kept} == {"finished"}
        taken_over = [row["cluster"] for row in kept if row["trial"] in running["doomed"]]
        assert taken_over
        assert set(taken_over) == {"lives"}
