"""Who can reach a run for real, and what it writes down of the secrets around it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from raydmd.errors import DONE
from raydmd.training.access import is_open
from tests.launch import Launch
from tests.listening import far, listening
from tests.pipelines import wan_pipeline

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

CANARY = "c4n4ry0000"
SECRETS = {
    name: f"{CANARY}{i:02d}secret"
    for i, name in enumerate(
        ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
    )
} | {
    "PGPASSWORD": f"{CANARY}90secret",
    "WANDB_API_KEY": f"{CANARY}91secret",
    "RAYDMD_STORAGE": f"postgresql://ann:{CANARY}92@db/x",
}
CONNECT = """
import sys, time
import ray
from raydmd.training.cluster import connect
connect()
print("at", ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


class Seen:
    """A run from start to end, and what was seen of it under way."""

    def __init__(self, home: Path) -> None:
        wan_pipeline(home / "model")
        (home / "prompts.txt").write_text("a cat runs\na dog jumps\n")
        with pytest.MonkeyPatch.context() as patch:
            for name, value in SECRETS.items():
                patch.setenv(name, value)
            self.run = Launch(home, "guarded", cycles=8)
        self.home = home
        self.run.wait_for("checkpoint", cycle=4)
        self.listening = listening(self.run.process.pid)
        said = re.search(r"raydmd top --address (\S+)", self.run.log.read_text())
        assert said
        self.address = said[1]
        self.open = is_open(self.address)
        self.code = self.run.end()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return Seen(tmp_path_factory.mktemp("access"))


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def test_a_run_listens_on_this_machine_alone(seen: Seen) -> None:
    assert seen.code == DONE, seen.run.log.read_text()[-3000:]
    assert {"gcs_server", "raylet"} <= {name for name, _, _ in seen.listening}
    assert not far(seen.listening)
    assert seen.address.startswith("127.0.0.1:")


def test_its_ray_refuses_who_has_no_token(seen: Seen) -> None:
    assert seen.open is False
    assert "asks for no token" not in seen.run.log.read_text()


def test_secrets_of_the_environment_are_in_nothing_that_a_run_writes(seen: Seen) -> None:
    files = [f for f in seen.home.rglob("*") if f.is_file()]
    names = {f.name for f in files}
    assert {"mlflow.db", "recipe.yaml", "events.jsonl", "report.html", "guarded.log", "metrics.jsonl"} <= names
    assert [f for f in files if CANARY.encode() in f.read_bytes()] == []


def connected(processes: list[subprocess.Popen[str]], **env: str) -> tuple[str, str]:
    """What a process that connects says before it has, and where it is then."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-c", CONNECT],
        env=plain | env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    processes.append(process)
    assert process.stdout is not None
    said = ""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and (line := process.stdout.readline()):
        if line.startswith("at "):
            return said, line.split()[1]
        said += line
    raise AssertionError(said)


def test_a_ray_without_a_token_is_told_to_who_starts_it_and_to_who_joins_it(
    processes: list[subprocess.Popen[str]],
) -> None:
    said, address = connected(processes, RAY_AUTH_MODE="disabled")
    assert "the Ray that this run starts asks for no token (RAY_AUTH_MODE=disabled is set; unset it)" in said
    assert is_open(address) is True
    assert not far(listening(processes[0].pid))
    said, joined = connected(processes, RAY_AUTH_MODE="disabled", RAY_ADDRESS=address)
    assert joined == address
    assert f"the Ray cluster at {address} asks for no token" in said
    assert "RAY_AUTH_MODE=token" in said


def test_what_does_not_answer_is_not_called_safe() -> None:
    assert is_open("127.0.0.1:9") is None


def test_raydmd_top_finds_a_ray_that_listens_on_this_machine_alone(processes: list[subprocess.Popen[str]]) -> None:
    said, address = connected(processes)
    assert "asks for no token" not in said
    plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}  # not even that it should show its token
    command = [sys.executable, "-m", "raydmd", "top", "--once", "--address", address]
    done = subprocess.run(command, env=plain, capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, "no pools" in done.stdout) == (0, True), done.stdout + done.stderr
