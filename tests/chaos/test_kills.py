"""Processes die by SIGKILL in mid-run; the run ends by itself, and in the same bits as an undisturbed one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from raydmd.errors import BAD_INPUT, DONE, STOPPED
from raydmd.training.checkpoint import cycle_of
from raydmd.training.events import read_lines
from raydmd.training.store import Store
from tests.launch import Launch, same_bits
from tests.s3 import BUCKET, environment, object_storage

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1500)]


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
    assert re.search(r"rank \d of 2 on .*: (cycle \d+|writes a checkpoint)", stalled["doing"])
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


def test_object_storage_with_a_damaged_object_and_a_killed_worker(home, undisturbed):
    """Checkpoints in S3: stopped, the newest one cut off, resumed, and killed as the next ones are written."""
    storage = f"{BUCKET}/runs"
    with object_storage() as values, environment(values):
        first = Launch(home, "in-s3", "--max-cycles", "10", f"--checkpoints.storage={storage}")
        assert first.end() == STOPPED, first.log.read_text()[-3000:]
        store = Store.of(first.folder, storage)
        newest = store.names()[-1]
        with store.files.open_output_stream(store.path(f"{newest}/__0_0.distcp")) as stream:
            stream.write(b"cut off")
        second = Launch(home, "in-s3", f"--checkpoints.storage={storage}")
        second.wait_for("checkpoint", cycle=16)
        second.kill_one("ray::RayTrainWorker")
        assert second.end() == DONE, second.log.read_text()[-3000:]
        assert f"checkpoint {newest} is damaged" in second.events("damaged")[0]["message"]
        assert len(second.events("fallback")) == 1
        assert second.events("restart"), "the workers were never restarted"
        same_bits(second.student(storage), undisturbed.student())
    assert not list(second.folder.glob("train*")), "nothing was to be written to the run's own folder"


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
