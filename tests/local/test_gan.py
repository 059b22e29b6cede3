"""The GAN through the loop: real files in, a discriminator that trains, resumes exactly and agrees between ranks."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import multiprocessing
from torch.distributed.tensor import DTensor

from raydmd.data.media import pixels
from raydmd.data.real import EMPTY, SHARD, RealData, inspect, load_real, prepare
from raydmd.draws import Draws
from raydmd.errors import InputError, RunFailed
from raydmd.models import load_family, load_teacher
from raydmd.models.base import Conditions, Shape
from raydmd.recipe import Model, Recipe, derive
from raydmd.recipe_gan import Gan
from raydmd.serving.engine import TeacherEngine
from raydmd.serving.local import LocalClient
from raydmd.training.events import EventLog, read_lines
from raydmd.training.session import FolderSession
from raydmd.training.worker import Job, Worker
from tests.local.test_fsdp import FSDP, group
from tests.local.test_worker import PROMPTS, SIZE, recipe, two_experts
from tests.ranks import OneOfSome

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.local
__all__ = ["group", "two_experts"]
LATENT = (16, 2, 4, 4)
CLIP = Shape(latent=LATENT, frames=5, height=32, width=32)
PICTURE = Shape(latent=(16, 1, 4, 4), frames=1, height=32, width=32)


def write_video(file: Path, frames: int = 6, size: int = 32) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"mp4v"), 8, (size, size))
    for k in range(frames):
        writer.write(np.full((size, size, 3), min(40 * k, 255), np.uint8))
    writer.release()
    return file


def write_picture(file: Path, size: tuple[int, int] = (32, 32), value: int = 100) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 255)).save(file)
    return file


def write_latents(file: Path, count: int = 6) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"latents": torch.randn(count, *LATENT, generator=torch.Generator().manual_seed(count))}, file)
    return file


def real_data(r: Recipe) -> RealData:
    family = load_family(r.model)
    return load_real(prepare(inspect(r.method.gan, family.shape()), r.model, family, r.folder / "real", print))


def build(r: Recipe, stop_at: int | None = None, session: FolderSession | None = None) -> Worker:
    torch.set_num_threads(1)
    r.folder.mkdir(parents=True, exist_ok=True)
    family = load_family(r.model)
    table = Conditions.read(family.encode(PROMPTS, r.folder / "conditions"))
    teacher = LocalClient(TeacherEngine(load_teacher(family, "fp32", device=torch.device("cpu")), table))
    job = Job(recipe=r, family=family, conditions=table, real=real_data(r), stop_at=stop_at)
    return Worker(job, teacher, session or FolderSession(r.folder), EventLog(r.folder / "events.jsonl"))


def gan(folder: Path, **settings) -> dict:
    return {"data": str(folder), "critic_weight": 0.1, "rate": 1e-2, **settings}


@pytest.mark.parametrize(
    ("method", "training"),
    [
        ({"name": "phased", "gan": {"weight": {"balance": 0.5}, "r1": {}}}, {}),
        ({"name": "dmd2", "gan": {"weight": {"start": 0, "end": 1}, "r1": {"kind": "exact"}}}, {}),
        ({"name": "phased", "gan": {"r1": {}}}, {"gradient_checkpointing": True, "fake": {"lora": {"rank": 2}}}),
    ],
    ids=["phased", "dmd2", "lora"],
)
def test_a_run_with_a_gan_resumes_bit_identical(two_experts, tmp_path, method, training):
    write_latents(tmp_path / "data" / "a.safetensors")
    method = {**method, "gan": gan(tmp_path / "data", **method["gan"])}
    whole = build(recipe(two_experts, tmp_path / "whole", method=method, training=training))
    assert whole.run() == "finished"
    r = recipe(two_experts, tmp_path / "parts", method=method, training=training)
    for stop in (1, 3):
        assert build(r, stop).run() == "stopped"
    parts = build(r)
    assert parts.run() == "finished"
    assert [e["event"] for e in read_lines(r.folder / "events.jsonl")].count("resume") == 2
    ours, theirs = parts.state(), whole.state()
    assert ours.keys() == theirs.keys()
    assert any(".head." in key for key in theirs)
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
    rows = [row for row in whole.session.reports if "gan/critic" in row]
    assert len(rows) == r.training.cycles
    assert all("gan/r1" in row for row in rows)
    start = build(derive(r, {"name": "start"}))
    start._enter(start.method.phases[-1], {})
    before = {k: v.clone() for k, v in start.fake.tensors().items() if k in theirs and ".optimizer." not in k}
    assert any(".head." in k and not torch.equal(before[k], theirs[k]) for k in before)


def test_a_sharded_run_with_a_gan_resumes_bit_identical(group, two_experts, tmp_path):
    write_latents(tmp_path / "data" / "a.safetensors")
    changes = {"method.gan": gan(tmp_path / "data", r1={}), "training": {**FSDP, "cycles": 4}}
    whole = build(recipe(two_experts, tmp_path / "whole", **changes))
    assert whole.run() == "finished"
    r = recipe(two_experts, tmp_path / "parts", **changes)
    assert build(r, 1).run() == "stopped"
    assert build(r, 3).run() == "stopped"
    parts = build(r)
    assert parts.run() == "finished"
    ours, theirs = parts.state(), whole.state()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if not key.endswith(("step", "updates")):
            assert isinstance(value, DTensor), key
            assert torch.equal(value.full_tensor(), ours[key].full_tensor()), key


def test_a_gan_moves_student_and_fake_elsewhere_and_without_it_nothing_changes(two_experts, tmp_path):
    write_latents(tmp_path / "data" / "a.safetensors")
    off = {"start": 0, "end": 1, "until": 1}
    ends = {}
    for name, method in {
        "plain": {"name": "dmd2"},
        "late": {"name": "dmd2", "gan": gan(tmp_path / "data", weight=off, critic_weight=off)},
        "on": {"name": "dmd2", "gan": gan(tmp_path / "data", weight=1.0)},
    }.items():
        r = recipe(two_experts, tmp_path / name, method=method)
        # After one cycle (and a warm-up) the schedule is still at 0.
        worker = build(derive(r, {"training.fake_warmup": 1}), 1) if "gan" in method else plain(r)
        assert worker.run() == "stopped"
        ends[name] = {k: v for k, v in worker.state().items() if ".head." not in k}
    assert ends["late"].keys() == ends["plain"].keys()
    assert all(torch.equal(ends["late"][k], v) for k, v in ends["plain"].items())
    for role in ("student", "fake"):
        assert any(k.startswith(role) and not torch.equal(ends["on"][k], v) for k, v in ends["plain"].items())


def plain(r: Recipe) -> Worker:
    r.folder.mkdir(parents=True)
    family = load_family(r.model)
    table = Conditions.read(family.encode(PROMPTS, r.folder / "conditions"))
    teacher = LocalClient(TeacherEngine(load_teacher(family, "fp32", device=torch.device("cpu")), table))
    job = Job(recipe=r, family=family, conditions=table, stop_at=1)
    return Worker(job, teacher, FolderSession(r.folder), EventLog(r.folder / "events.jsonl"))


def test_a_worker_without_real_samples_says_so(two_experts, tmp_path):
    r = recipe(two_experts, tmp_path, method={"name": "dmd2", "gan": gan(tmp_path)})
    with pytest.raises(RunFailed, match="no real samples"):
        plain(r).run()


def one_of_two(rank: int, port: int, r: Recipe) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    r.folder.mkdir(parents=True, exist_ok=True)
    worker = build(r, session=OneOfSome(r.folder, rank))
    assert worker.run() == "finished"
    state = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in worker.state().items()}
    torch.save({k: v.clone() for k, v in state.items()}, r.folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("sharding", "r1"), [("ddp", "exact"), ("fsdp", "approximate")])
def test_two_ranks_train_what_one_does(two_experts, tmp_path, sharding, r1):
    write_latents(tmp_path / "data" / "a.safetensors")
    settings = gan(tmp_path / "data", weight={"balance": 0.5}, r1={"kind": r1})
    training = {"cycles": 2, "ema": 0.0, "sharding": sharding, "gradient_checkpointing": sharding == "fsdp"}
    method = {"name": "phased", "gan": settings}
    one = build(recipe(two_experts, tmp_path / "one", method=method, training=training))
    assert one.run() == "finished"
    two = recipe(two_experts, tmp_path / "two", method=method, training=training)
    real_data(two)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    multiprocessing.spawn(one_of_two, (port, two), nprocs=2)
    ranks = [torch.load(two.folder / f"rank{k}.pt") for k in (0, 1)]
    assert any(".head." in key for key in ranks[0])
    for key, value in one.state().items():
        assert torch.equal(ranks[0][key], ranks[1][key]), key
        if ".optimizer." not in key:
            torch.testing.assert_close(ranks[0][key], value, rtol=1e-3, atol=2e-4, msg=key)
        elif key.endswith("exp_avg_sq"):  # Adam's steps do not tell a sum of gradients from their mean
            torch.testing.assert_close(ranks[0][key].norm(), value.norm(), rtol=0.05, atol=1e-10, msg=key)


def test_clips_are_encoded_once_with_their_captions(two_experts, tmp_path):
    folder = tmp_path / "clips"
    for name in ("a", "b", "deep/c"):
        write_video(folder / f"{name}.mp4")
    (folder / "a.txt").write_text("a cat\nruns\n")
    (folder / "deep" / "c.txt").write_text("a cat runs")
    model = Model(path=str(two_experts), **SIZE)
    family, settings = load_family(model), Gan(data=folder)
    source = inspect(settings, family.shape())
    assert source.captions == ("a cat runs", "", "a cat runs")
    said: list[str] = []
    file = prepare(source, model, family, tmp_path / "cache", said.append)
    assert len(said) == 1
    real = load_real(file)
    assert len(real) == 3
    assert json.loads(file.read_text())["rows"] == [EMPTY + 1, EMPTY, EMPTY + 1]
    batch = real.batch(Draws(0, "0/fake.0", range(4)))
    assert batch.x0.shape == (4, *LATENT)
    assert len(batch.cond) == 4

    x = pixels("video", folder / "a.mp4", CLIP)
    assert x.shape == (5, 3, 32, 32)
    torch.testing.assert_close(x[:, 0, 0, 0], torch.arange(5) * 40 / 255, atol=0.03, rtol=0)
    vae = AutoencoderKLWan.from_pretrained(two_experts, subfolder="vae")
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        latents = vae.encode(2 * x.permute(1, 0, 2, 3)[None] - 1).latent_dist.mode()[0]
    index = json.loads(file.read_text())
    torch.testing.assert_close(load_file(index["files"][0])["latents"][0], (latents - mean) / std, atol=1e-5, rtol=1e-5)

    assert prepare(source, model, family, tmp_path / "cache", said.append) == file
    assert len(said) == 1
    now = time.time_ns()
    os.utime(folder / "b.mp4", ns=(now, now))
    changed = prepare(inspect(settings, family.shape()), model, family, tmp_path / "cache", said.append)
    assert changed != file
    assert len(said) == 2
    assert SHARD >= 3


def test_latents_come_with_a_line_of_caption_each(two_experts, tmp_path):
    folder = tmp_path / "latents"
    for count in (2, 3):
        write_latents(folder / f"{count}.safetensors", count)
    (folder / "3.txt").write_text("a cat\n\na dog\n")
    model = Model(path=str(two_experts), **SIZE)
    family = load_family(model)
    source = inspect(Gan(data=folder), CLIP)
    assert source.captions == ("", "", "a cat", "", "a dog")
    real = load_real(prepare(source, model, family, tmp_path / "cache", print))
    assert len(real) == 5
    assert {float(v) for v in real.batch(Draws(0, "u", range(60))).x0[:, 0, 0, 0, 0]} == {
        float(v) for k in (2, 3) for v in load_file(folder / f"{k}.safetensors")["latents"][:, 0, 0, 0, 0]
    }
    (folder / "3.txt").write_text("a cat\n")
    with pytest.raises(InputError, match=r"3\.txt has 1 lines for 3 samples"):
        inspect(Gan(data=folder), CLIP)


def test_pictures_are_cut_to_the_samples_size(tmp_path):
    picture = Image.new("RGB", (96, 40), (0, 0, 0))
    picture.paste((255, 255, 255), (28, 0, 68, 40))
    picture.save(tmp_path / "wide.png")
    source = inspect(Gan(data=tmp_path / "wide.png"), PICTURE)
    x = pixels(source.kind, source.files[0], PICTURE)
    assert x.shape == (1, 3, 32, 32)
    assert float(x.min()) > 0.95  # black lies outside the middle
    listed = tmp_path / "captions.tsv"
    listed.write_text("wide.png\ta white square\n")
    assert inspect(Gan(data=tmp_path, captions=listed), PICTURE).captions == ("a white square",)
    listed.write_text("wide.png\ta white square\nnarrow.png\tnothing\nwide.png\n")
    with pytest.raises(InputError, match=r"line 2 \(no file 'narrow\.png'\), line 3 \(no tab\)"):
        inspect(Gan(data=tmp_path, captions=listed), PICTURE)


def test_bad_files_are_named_before_anything_starts(tmp_path):
    def refused(match: str, shape: Shape = CLIP) -> None:
        with pytest.raises(InputError, match=match):
            inspect(Gan(data=tmp_path / "d"), shape)

    refused("does not exist")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "notes.md").write_text("no data")
    refused("holds no files of these kinds")
    write_video(tmp_path / "d" / "good.mp4")
    write_video(tmp_path / "d" / "short.mp4", frames=3)
    write_video(tmp_path / "d" / "small.mp4", size=16)
    (tmp_path / "d" / "broken.mp4").write_bytes(b"no video")
    refused(
        r"unfit files: \S*broken\.mp4 \(no readable video\); \S*short\.mp4 \(3 frames, samples have 5\); "
        r"\S*small\.mp4 \(16 x 16 pixels, samples have 32 x 32\)"
    )
    write_picture(tmp_path / "d" / "a.png")
    refused(r"mixes kinds of files: image \(a\.png\), video \(broken\.mp4\)")
    for file in (tmp_path / "d").glob("*.mp4"):
        file.unlink()
    refused("holds images, but samples are clips of 5 frames")
    write_picture(tmp_path / "d" / "tiny.png", (31, 64))
    (tmp_path / "d" / "cut.png").write_bytes((tmp_path / "d" / "a.png").read_bytes()[:40])
    refused(r"cut\.png \(no readable image: .*tiny\.png \(31 x 64 pixels", PICTURE)
    for file in (tmp_path / "d").glob("*.png"):
        file.unlink()
    write_latents(tmp_path / "d" / "a.safetensors")
    save_file({"x": torch.zeros(2)}, tmp_path / "d" / "b.safetensors")
    (tmp_path / "d" / "c.safetensors").write_bytes(b"nothing")
    refused(r"b\.safetensors \(has no tensor 'latents', but \['x'\]\); \S*c\.safetensors \(no readable safetensors")
    for name in ("b", "c"):
        (tmp_path / "d" / f"{name}.safetensors").unlink()
    refused(r"a\.safetensors \(latents are \(6, 16, 2, 4, 4\), not \(N, 16, 1, 4, 4\)", PICTURE)
