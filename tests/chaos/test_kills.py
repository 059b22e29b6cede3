"""Processes die by SIGKILL in mid-run; the run ends by itself, and in the same bits as an undisturbed one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from raydmd.errors import BAD_INPUT, DONE, STOPPED
from raydmd.training.checkpoint import cycle_of
from raydmd.training.events import read_lines
from tests.pipelines import wan_pipeline

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1500)]
ROOT = Path(__file__).parents[2]
CYCLES = 24


class Launch:
    """The experiment as a user starts it: a process of its own, on a Ray of its own."""

    def __init__(self, home: Path, name: str, *extra: str, teachers: int = 1, **training: float) -> None:
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
            "training.checkpoint_every": 4,
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
        }
        command = [
            *(sys.executable, "experiments/phased_wan22.py", "--model", str(home / "model"), "--name", name),
            *("--prompts", str(home / "prompts.txt"), "--output", str(home / "runs"), "--deterministic"),
            *("--workers", "2", "--teachers", str(teachers), *(f"--{k}={v}" for k, v in overrides.items()), *extra),
        ]
        env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"OMP_NUM_THREADS": "1"}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)

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

    def student(self) -> dict:
        (final,) = (self.folder / "train").glob("*-final")
        return {f.stem: load_file(f) for f in (final / "student").glob("*.safetensors")}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("chaos")
    wan_pipeline(home / "model")
    (home / "prompts.txt").write_text("a cat runs\na dog jumps\n")
    return home


@pytest.fixture(scope="module")
def undisturbed(home) -> Launch:
    run = Launch(home, "undisturbed")
    assert run.end() == DONE, run.log.read_text()[-3000:]
    assert not run.events("resume")
    return run


def _yaml(home: Path, text: str) -> Path:
    file = home / "recipe.yaml"
    file.write_text(text)
    return file


def same_bits(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for expert, weights in one.items():
        for name, value in weights.items():
            assert value.equal(other[expert][name]), f"{expert}.{name}"


STOCK = """
import json, sys
from diffusers import WanPipeline
from safetensors import safe_open

folder = sys.argv[1]
with safe_open(f"{folder}/contact.safetensors", "pt") as file:
    noise, frames, about = file.get_tensor("noise"), file.get_tensor("frames"), file.metadata()
pipe = WanPipeline.from_pretrained(f"{folder}/pipeline")
_, count, _, height, width = frames.shape
for i, prompt in enumerate(json.loads(about["prompts"])):
    made = pipe(prompt, num_inference_steps=4, guidance_scale=1.0, num_frames=count, height=height, width=width,
                max_sequence_length=int(about["text_length"]), latents=noise[i : i + 1], output_type="pt").frames
    assert (made - frames[i : i + 1]).abs().max() < 1e-4, prompt
assert not any(name.split(".")[0] == "raydmd" for name in sys.modules)
"""


def test_stock_diffusers_makes_the_reports_frames(undisturbed):
    """In a process that does not import raydmd."""
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(undisturbed.folder)],
        capture_output=True, text=True, timeout=300, check=False, cwd=undisturbed.folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_fsdp_on_two_ranks_is_ddp_on_two_ranks(home, undisturbed):
    run = Launch(home, "fsdp", "--recipe", str(_yaml(home, "training: {sharding: fsdp}")))
    assert run.end() == DONE, run.log.read_text()[-3000:]
    other, moved = undisturbed.student(), 0.0
    for expert, weights in run.student().items():
        (start,) = (home / "model" / expert).glob("*.safetensors")
        begun = load_file(start)
        for name, value in weights.items():
            moved = max(moved, float((value - begun[name]).abs().max()))
            apart = float((value - other[expert][name]).abs().max())
            assert apart < 1e-5, f"{expert}.{name}"
    assert moved > 1e-3, "the bar is a hundredth of what training moved"


def metrics(run: Launch) -> list[dict]:
    return list(read_lines(run.folder / "metrics.jsonl"))


def test_a_killed_teacher_replica_and_then_a_killed_worker_change_nothing(home, undisturbed):
    run = Launch(home, "killed", teachers=2)
    run.wait_for("checkpoint", cycle=4)
    run.kill_one("ray::Replica")
    run.wait_for("checkpoint", cycle=12)
    assert not run.events("resume"), "the teacher's death reached the workers"
    run.kill_one("ray::RayTrainWorker")
    assert run.end() == DONE, run.log.read_text()[-3000:]
    assert max(m.get("teacher/retries", 0) for m in metrics(run)) > 0, "nobody noticed the teacher's death"
    assert run.events("resume"), "the workers were never restarted"
    same_bits(run.student(), undisturbed.student())


def test_stop_resume_and_the_second_start_after_the_end(home, undisturbed):
    """--max-cycles, then Ctrl-C, then to the end; then the same command changes nothing."""
    first = Launch(home, "stopped", "--max-cycles", "6")
    assert first.end() == STOPPED, first.log.read_text()[-3000:]
    second = Launch(home, "stopped")
    second.wait_for("checkpoint", cycle=8)
    second.process.send_signal(signal.SIGINT)
    assert second.end() == STOPPED, second.log.read_text()[-3000:]
    assert "the same command resumes" in second.log.read_text()
    third = Launch(home, "stopped")
    assert third.end() == DONE, third.log.read_text()[-3000:]
    same_bits(third.student(), undisturbed.student())
    before = {f: f.stat().st_mtime_ns for f in third.folder.rglob("*") if f.is_file() and f.name != "lock"}
    again = Launch(home, "stopped")
    assert again.end(60) == DONE
    assert "is finished" in again.log.read_text()
    assert before == {f: f.stat().st_mtime_ns for f in third.folder.rglob("*") if f.is_file() and f.name != "lock"}


def test_a_worker_that_hangs_is_told_of_with_stacks_and_the_run_goes_on(home, undisturbed):
    """SIGSTOP is a hang as bad as they come: nothing in that process runs. The other rank's watchdog ends the wait."""
    run = Launch(home, "hanging", step_timeout=40, stall_timeout=45)
    run.wait_for("checkpoint", cycle=8)
    stopped = run.one("ray::RayTrainWorker")
    stopped.send_signal(signal.SIGSTOP)
    try:
        stalled = run.wait_for("stalled", seconds=300)
    finally:
        if stopped.is_running():
            stopped.send_signal(signal.SIGKILL)
    assert run.end() == DONE, run.log.read_text()[-3000:]
    text = Path(stalled["stacks"]).read_text()
    assert stalled["doing"] in text
    assert re.search(r"rank \d of 2, .*: (cycle \d+|writes a checkpoint)", stalled["doing"])
    assert "train_cycle" in text or "_save" in text, text[:3000]
    same_bits(run.student(), undisturbed.student())


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(home, undisturbed):
    first = Launch(home, "damaged", "--max-cycles", "10")
    assert first.end() == STOPPED, first.log.read_text()[-3000:]
    newest = max((first.folder / "train").glob("cycle-*"))
    for file in newest.glob("*.distcp"):
        os.truncate(file, 4096)
    second = Launch(home, "damaged")
    assert second.end() == DONE, second.log.read_text()[-3000:]
    assert f"checkpoint {newest.name} is damaged" in second.events("damaged")[0]["message"]
    [fallback] = second.events("fallback")
    assert fallback["checkpoint"] < newest.name
    assert f"going on from {fallback['checkpoint']}" in second.log.read_text()
    assert [e["cycle"] for e in second.events("resume")] == [cycle_of(fallback["checkpoint"])]
    same_bits(second.student(), undisturbed.student())


def test_a_signal_before_training_stops_the_run_with_a_word(home):
    run = Launch(home, "early")
    deadline = time.monotonic() + 120
    while not (run.folder / "recipe.yaml").is_file():
        assert time.monotonic() < deadline, run.log.read_text()[-3000:]
        time.sleep(0.05)
    run.process.send_signal(signal.SIGTERM)
    assert run.end(240) == STOPPED, run.log.read_text()[-3000:]
    assert "the same command" in run.log.read_text()


def test_more_workers_than_there_is_room_for(home):
    run = Launch(home, "too-big", "--placement.worker_resources={trainer: 1}")
    code = run.end(120)
    text = run.log.read_text()
    assert code == BAD_INPUT, text[-3000:]
    assert "too little trainer" in text
    assert "Traceback" not in text
