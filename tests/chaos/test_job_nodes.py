"""The main job on two nodes by ``ray job submit``: trainer here, teacher there, and metrics of both read over HTTP."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

from raydmd.training.events import read_lines
from tests.sites import ROOT, Node, Nodes, _clean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1200)]
BOARD = json.loads((ROOT / "cluster" / "grafana" / "raydmd-pools.json").read_text(encoding="utf-8"))
SETTINGS: dict[str, Any] = {
    "data.sizes": "[]",
    "model.frames": 5,
    "model.height": 32,
    "model.width": 32,
    "training.cycles": 200,
    "training.batch": 2,
    "training.fake_updates": 4,
    "training.precision": "fp32",
    "training.sharding": "ddp",
    "training.gradient_checkpointing": "false",
    "training.offload_activations": "false",
    "training.student.lora": "null",
    "checkpoints.every": 20,
    "placement.worker_cpus": 1,
    "placement.teacher_cpus": 1,
    "placement.worker_gpus": 0,
    "placement.teacher_gpus": 0,
    "placement.worker_resources": "{trainer: 1}",
    "placement.teacher_resources": "{teacher: 1}",
    "evaluation.samples": 2,
    "evaluation.teacher_steps": 2,
}
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
SELDOM = {"ray_raydmd_failed_total", "ray_raydmd_refused_total"}
"""Not there before the first."""


@pytest.fixture
def pair() -> Iterator[tuple[Node, Node]]:
    with Nodes(RAY_metrics_report_interval_ms="1000", PATH=PATH) as nodes:
        if not nodes.apart:
            pytest.skip("nodes with addresses of their own need root")
        yield (
            nodes.start(cpus=2, resources={"trainer": 1}, dashboard=True),
            nodes.start(cpus=1, resources={"teacher": 1}),
        )


def get(node: Node, url: str, *, token: bool = False) -> tuple[int, str]:
    """Status and text of what an address answers to a process on a node."""
    header = ["--header", f"Authorization: Bearer {node.env['RAY_AUTH_TOKEN']}"] if token else []
    command = [*node.enter, "curl", "--silent", "--max-time", "10", "--write-out", "\n%{http_code}", *header, url]
    done = subprocess.run(command, capture_output=True, text=True, env=_clean(), check=False)
    text, _, code = done.stdout.rpartition("\n")
    return int(code or 0), text


def until(what: Callable[[], Any], job: subprocess.Popen[str], log: Path, seconds: float = 300.0) -> Any:
    """What comes of something as soon as it is true, while a job runs."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert job.poll() is None, f"the job ended:\n{log.read_text()[-4000:]}"
        assert time.monotonic() < deadline, f"it did not come within {seconds:g} s:\n{log.read_text()[-4000:]}"
        time.sleep(0.5)
    return found


def series(text: str) -> dict[str, float]:
    """Prometheus' text format as values by name and labels."""
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name] = float(value)
    return found


def expressions() -> list[str]:
    return [target["expr"] for panel in BOARD["panels"] for target in panel.get("targets", [])]


def test_trainer_and_teacher_on_two_nodes_and_their_metrics(home: Path, pair: tuple[Node, Node]) -> None:
    head, other = pair
    address, log = f"http://{head.address}:8265", home / "job.log"
    words = ["--model", str(home / "model"), "--prompts", str(home / "prompts.txt"), "--name", "job"]
    words += ["--output", str(home / "runs"), "--workers", "1", "--teachers", "1"]
    command = [
        *(*head.enter, sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", address),
        *("--working-dir", str(ROOT), "--", "python", "experiments/phased_wan22.py"),
        *(*words, *(f"--{key}={value}" for key, value in SETTINGS.items())),
    ]
    env = _clean() | head.env
    wait_for_agents(head, address)
    with log.open("w") as out:
        job = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, text=True)
    try:
        events = home / "runs" / "job" / "events.jsonl"
        until(lambda: events.exists() and any(e["event"] == "committed" for e in read_lines(events)), job, log)
        # Where they are.
        assert len(head.find("ray::RayTrainWorker")) == 1
        assert len(other.find("ray::Replica")) == 1
        assert not head.find("ray::Replica")
        assert not other.find("ray::RayTrainWorker")
        # The dashboard answers who has the token.
        assert get(head, f"{address}/api/jobs/")[0] == 401
        code, text = get(other, f"{address}/api/jobs/", token=True)
        assert code == 200
        assert [j["status"] for j in json.loads(text) if j["type"] == "SUBMISSION"] == ["RUNNING"]
        # Both nodes are on the list that Prometheus reads (cluster/prometheus/prometheus.yml), and answer.
        listed = head.folder / f"{head.name}0" / "prom_metrics_service_discovery.json"
        targets = [t for group in json.loads(listed.read_text()) for t in group["targets"]]
        by_node = {n.name: [t for t in targets if t.startswith(f"{n.address}:")] for n in pair}
        assert all(by_node.values()), targets

        def scrape(node: Node) -> dict[str, float]:
            answers = [get(head, f"http://{target}/metrics") for target in by_node[node.name]]
            return series("\n".join(text for code, text in answers if code == 200))

        assert until(lambda: [s for s in scrape(head) if s.startswith("ray_node_mem_used")], job, log)
        assert until(lambda: [s for s in scrape(head) if s.startswith("ray_train_")], job, log), "Ray Train's own"
        first = until(lambda: pool_items(scrape(other)), job, log)
        assert until(lambda: pool_items(scrape(other)) > first, job, log), "samples are counted as they are answered"
        there = scrape(other)
        names = {name.partition("{")[0] for name in there}
        asked = {name for expr in expressions() for name in re.findall(r"ray_raydmd_\w+", expr)}
        assert asked - SELDOM <= names, "what the dashboard shows is exported"
        [items] = [name for name in there if name.startswith("ray_raydmd_items_total")]
        assert 'trial="job-' in items, "they are told by run"
        assert not [name for name in scrape(head) if name.startswith("ray_raydmd_items")], "no teacher is there"
        if tool := shutil.which("prometheus"):
            shown_by_prometheus(Path(tool), head, listed, job, log)
        assert job.wait(600) == 0, log.read_text()[-4000:]
    finally:
        job.kill()
        job.wait()
    assert "succeeded" in log.read_text()
    assert (home / "runs" / "job" / "report.html").is_file()


def wait_for_agents(head: Node, address: str) -> None:
    """Jobs are started by a node's agent, which comes up after its node."""
    deadline = time.monotonic() + 120
    while get(head, f"{address}/api/jobs/", token=True)[0] != 200:
        assert time.monotonic() < deadline, "the dashboard does not answer"
        time.sleep(0.5)
    time.sleep(5)


def pool_items(scraped: dict[str, float]) -> float:
    return sum(value for name, value in scraped.items() if name.startswith("ray_raydmd_items_total"))


def shown_by_prometheus(tool: Path, head: Node, listed: Path, job: subprocess.Popen[str], log: Path) -> None:
    """A real Prometheus with our configuration answers what the dashboard asks it."""
    folder = log.parent / "prometheus"
    folder.mkdir()
    ours = (ROOT / "cluster" / "prometheus" / "prometheus.yml").read_text(encoding="utf-8")
    assert "/tmp/ray/prom_metrics_service_discovery.json" in ours
    ours = ours.replace("/tmp/ray/prom_metrics_service_discovery.json", str(listed)).replace(
        "interval: 10s", "interval: 1s"
    )
    (folder / "prometheus.yml").write_text(ours.replace("timeout: 8s", "timeout: 1s"))
    options = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    options.append("--web.listen-address=127.0.0.1:9090")
    with (folder / "log").open("w") as out:
        server = subprocess.Popen([*head.enter, tool, *options], stdout=out, stderr=out, env=_clean())
    try:
        query = "http://127.0.0.1:9090/api/v1/query?query="

        def answer(expr: str) -> list[Any]:
            code, text = get(head, query + quote(expr.replace("$pool", ".*").replace("[1m]", "[10s]")))
            return json.loads(text)["data"]["result"] if code == 200 else []

        up = until(lambda: len(r := answer('up{job="ray"} == 1')) >= 2 and r, job, log)
        assert len(up) >= 2
        for expr in expressions():
            if not any(name in expr for name in SELDOM):
                assert until(lambda e=expr: answer(e), job, log), expr
    finally:
        server.kill()
        server.wait()
