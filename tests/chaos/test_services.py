"""The tracking server of cluster/services/compose.yaml, by its own command and settings, on a real PostgreSQL."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.tracking import MlflowClient

from tests.ray.postgres import server
from tests.sites import ROOT
from tests.tracking_server import free_port

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]
START = 120.0


def default(text: str) -> str:
    """A setting of the file without an environment."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def curl(*words: str) -> tuple[int, str]:
    command = ["curl", "--silent", "--max-time", "10", "--write-out", "\n%{http_code}", *words]
    text, _, code = subprocess.run(command, capture_output=True, text=True, check=False).stdout.rpartition("\n")
    return int(code or 0), text


def test_the_tracking_server_runs_on_postgres_and_answers_to_its_names_alone(tmp_path: Path) -> None:
    service: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / "services" / "compose.yaml").read_text("utf-8"))[
        "services"
    ]["mlflow"]
    port = free_port()
    places = {"0.0.0.0": "127.0.0.1", "5000": str(port), "/artifacts": str(tmp_path / "artifacts")}
    command = [places.get(word, word) for word in service["command"]]
    assert set(places) <= set(service["command"])
    with server() as postgres:
        scheme = service["environment"]["MLFLOW_BACKEND_STORE_URI"].partition("://")[0]
        env = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "MLFLOW_BACKEND_STORE_URI": postgres.address.replace("postgresql", scheme, 1),
            "MLFLOW_SERVER_ALLOWED_HOSTS": default(service["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"]),
        }
        log = tmp_path / "log"
        with log.open("w") as out:
            process = subprocess.Popen(command, env=env, stdout=out, stderr=out, cwd=tmp_path, start_new_session=True)
        try:
            healthy = [word.replace(":5000", f":{port}") for word in service["healthcheck"]["test"][1:]]
            deadline = time.monotonic() + START
            while subprocess.run(healthy, capture_output=True, check=False).returncode:
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.5)
            uri = f"http://127.0.0.1:{port}"
            client = MlflowClient(tracking_uri=uri)
            run = client.create_run(client.create_experiment("raydmd"))
            client.log_metric(run.info.run_id, "student/loss", 0.5, step=3)
            (tmp_path / "note.txt").write_text("kept")
            client.log_artifact(run.info.run_id, str(tmp_path / "note.txt"))
            assert [m.value for m in client.get_metric_history(run.info.run_id, "student/loss")] == [0.5]
            assert [f.path for f in client.list_artifacts(run.info.run_id)] == ["note.txt"]
            assert list((tmp_path / "artifacts").rglob("note.txt"))
            asked = f"{uri}/api/2.0/mlflow/experiments/search?max_results=1"
            assert curl(asked, "--header", "Host: mlflow:5000")[0] == 200
            assert curl(asked, "--header", "Host: evil.example.org")[0] == 403, "a page of somebody's browser"
            done = subprocess.run(
                [sys.executable, "-m", "raydmd", "doctor", f"tracking.uri={uri}", f"output={tmp_path}/runs"],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stdout
            assert uri in done.stdout
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
