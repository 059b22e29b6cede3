"""An MLflow server on PostgreSQL: both die and come back in mid-run, and MLflow has every row of every trial once."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import yaml
from mlflow.tracking import MlflowClient

from raydmd.training.events import read_lines

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parents[2]
sys.path.insert(0, str(HERE / "tests" / "ray"))
import postgres  # noqa: E402

pytestmark = [pytest.mark.chaos, pytest.mark.sweep, pytest.mark.timeout(900)]

SWEEP: dict[str, Any] = {
    "name": "tracked",
    "objectives": {"frechet": "min"},
    "space": {"method.guidance": [2.0, 4.0, 6.0]},
    "search": {"kind": "grid"},
    "recipe": {
        "model.path": "sd35-tiny",
        "method": {"name": "dmd2", "shift": 3.0},
        "training": {
            "cycles": 200,
            "batch": 8,
            "fake_updates": 1,
            "precision": "fp32",
            "report_every": 5,
            "student": {"lora": None},
        },
        "evaluation": {"every": 50, "samples": 16, "teacher_steps": 3, "grid": 2},
        "placement": {"worker_cpus": 0.5, "teacher_cpus": 0.25},
        "monitor.diversity": None,
    },
}


class Server:
    """An MLflow server as somebody runs it for a team."""

    def __init__(self, folder: Path, database: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._folder, self._database = folder, database
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        words = ["server", "--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"]
        words += ["--backend-store-uri", self._database, "--artifacts-destination", str(self._folder / "artifacts")]
        env = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")}
        with (self._folder / "mlflow.log").open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", *words], cwd=self._folder, env=env, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return
            assert self._process.poll() is None, (self._folder / "mlflow.log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.5)

    def kill(self) -> None:
        assert self._process
        if self._process.poll() is not None:
            return
        main = psutil.Process(self._process.pid)
        for process in [*main.children(recursive=True), main]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self._process.wait(timeout=30)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[Server, postgres.Server]]:
    with postgres.server() as database:
        server = Server(tmp_path, database.address.replace("postgresql://", "postgresql+psycopg://"))
        server.start()
        yield server, database
        server.kill()


def test_no_metric_is_lost_and_none_is_there_twice(
    servers: tuple[Server, postgres.Server], tmp_path: Path, record_property: Any
) -> None:
    server, database = servers
    given = {**SWEEP, "recipe": {**SWEEP["recipe"], "tracking": {"uri": server.uri}}}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(given), encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    env.pop("RAY_ADDRESS", None)
    log = tmp_path / "sweep.log"
    with log.open("w") as out:
        sweep = subprocess.Popen(
            [sys.executable, "-m", "raydmd", "sweep", "run", "s.yaml"], cwd=tmp_path, env=env, stdout=out, stderr=out
        )
    trials = tmp_path / "runs" / "tracked" / "trials"
    seed = random.SystemRandom().randrange(1 << 30)
    record_property("seed", seed)
    print(f"seed {seed}")
    draw = random.Random(seed)

    def trained() -> int:
        return sum(1 for f in trials.glob("*/metrics.jsonl") for _ in read_lines(f))

    try:
        meanwhile = 0
        for outage, rows in enumerate((8, 30, 55)):  # of 120
            deadline = time.monotonic() + 300
            while trained() < rows + draw.randrange(10):
                assert sweep.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.2)
            server.kill()
            if outage != 1:
                database.stop()
            before = trained()
            time.sleep(draw.uniform(3, 12))
            assert sweep.poll() is None, log.read_text()[-3000:]
            meanwhile += trained() - before
            if outage != 1:
                database.start()
            server.start()
        assert meanwhile, "training waits for the tracking server"
        assert sweep.wait(timeout=500) == 0, log.read_text()[-3000:]
    finally:
        if sweep.poll() is None:
            sweep.terminate()
            sweep.wait(timeout=300)

    client = MlflowClient(server.uri)
    [experiment] = [e for e in client.search_experiments() if e.name == "raydmd"]
    runs = {
        run.data.tags["raydmd.trial"]: run
        for run in client.search_runs([experiment.experiment_id])
        if "raydmd.trial" in run.data.tags
    }
    folders = sorted(trials.iterdir())
    assert sorted(runs) == [f.name for f in folders]
    assert len(folders) == 3
    compared = 0
    for folder in folders:
        run = runs[folder.name]
        assert run.info.status == "FINISHED"
        expected: dict[str, set[tuple[int, float]]] = {}
        for file in ("metrics.jsonl", "evaluations.jsonl"):
            for row in read_lines(folder / file):
                for key, value in row.items():
                    if key not in ("time", "student") and (file == "metrics.jsonl" or key != "cycle"):
                        expected.setdefault(key, set()).add((int(row["cycle"]), float(value)))
        for key, points in expected.items():
            found = Counter((m.step, m.value) for m in client.get_metric_history(run.info.run_id, key))
            more = {step for step, _ in found.keys() - points}
            assert points <= found.keys(), (folder.name, key)
            assert more == ({200} if key.startswith("evaluation/") else set()), (folder.name, key)
            assert set(found.values()) == {1}, (folder.name, key)
            compared += len(found)
        assert any(f.path == "result.json" for f in client.list_artifacts(run.info.run_id))
    print(f"{compared} figures in MLflow, each once")
    assert compared > 3000
