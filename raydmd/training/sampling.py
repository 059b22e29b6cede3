"""Samples for fake updates, drawn elsewhere by replicas that follow the student's weights. Off unless asked for.

The worker writes its student's weights to the run's folder every few updates and asks for the next cycle's samples
while it trains on this one's. A sample so comes from a student some updates old: how old is bounded, and stamped on
each. The generator's update always draws its own, so that its scores are of the student as it is.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from raydmd.draws import CPU
from raydmd.errors import InputError, NonFiniteError
from raydmd.methods.presets import build_method, source_expert
from raydmd.methods.terms import Answer
from raydmd.models import load_family
from raydmd.models.base import Conditions
from raydmd.serving.batcher import Key
from raydmd.serving.engine import Engine
from raydmd.serving.messages import RolloutRequest
from raydmd.training.checkpoint import STUDENT
from raydmd.training.export import fill, student_experts
from raydmd.training.roles import add_adapter
from raydmd.training.store import SEEN_WITHIN
from raydmd.training.students import write_student

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raydmd.methods.method import Method
    from raydmd.methods.phases import Phase
    from raydmd.methods.rollout import Sample
    from raydmd.models.base import Denoiser
    from raydmd.models.family import Family
    from raydmd.recipe import Recipe
    from raydmd.serving.client import Client, Pending
    from raydmd.serving.messages import Request
    from raydmd.training.cycle import Agree
    from raydmd.training.roles import TrainedRole
    from raydmd.training.stream import Batch, Stream

LIVE = "live"
"""Folder of a run with the weights that samplers follow."""
KEPT = 3
"""Versions that stay there: one that is asked for must not go before it is read."""


def version_folder(folder: Path, version: int) -> Path:
    """Where the weights after ``version`` student updates are."""
    return folder / LIVE / f"{version:08d}"


class SamplerEngine(Engine):
    """The student, as its weights were written down.

    Args:
        recipe: the run.
        family: its pipeline.
        conditions: the table that rows are of.
        device: to draw on.
    """

    def __init__(self, recipe: Recipe, family: Family, conditions: Conditions, device: torch.device) -> None:
        self._recipe, self._family, self._conditions, self._device = recipe, family, conditions, device
        self._method: Method = build_method(recipe.method, family.routing(), family.process, family.prediction)
        self._experts: dict[str, Denoiser] = {}
        self._held: list[tuple[str, int, int]] | None = None

    def key(self, request: Request) -> Key:
        """See :class:`Engine`; a rollout's steps are its update's own, so that updates do not share forwards."""
        if not isinstance(request, RolloutRequest):
            raise InputError(f"request {request.name!r} asks a student for what it does not do")
        return Key("", tuple(request.x_t.shape[1:]), 1.0, f"{request.version} {request.draws.update}")

    @torch.no_grad()
    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """See :class:`Engine`: per request the samples, and their clean predictions as ``uncond``."""
        return [self._one(request) for request in requests if isinstance(request, RolloutRequest)]

    def warm_up(self) -> None:
        """Nothing to do before there are weights."""

    def _one(self, request: RolloutRequest) -> Answer:
        self._follow(request.version)
        cond = self._conditions.rows(request.conditions).to(self._device)
        draws, phase = request.draws, self._method.phases[request.phase]
        experts = student_experts(self._recipe, self._family, self._experts)
        noise = request.x_t.to(self._device)
        sample = self._method.rollout(
            experts, cond, draws.on(self._device), phase, tuple(noise.shape[1:]), grad=False, noise=noise
        )
        if not (sample.x.isfinite().all() and sample.x0.isfinite().all()):
            bad = (~(sample.x.isfinite() & sample.x0.isfinite()).flatten(1).all(1)).nonzero().flatten().tolist()
            raise NonFiniteError(f"request {request.name!r}: the student's samples {bad} are not finite")
        return Answer(value=sample.x.to(request.x_t.device), uncond=sample.x0.to(request.x_t.device))

    def _follow(self, version: int) -> None:
        folder = version_folder(self._recipe.folder, version)
        files = _appeared(folder / STUDENT)
        # By the files themselves: after a resume or a rollback another student has had as many updates.
        found = [(f.name, f.stat().st_mtime_ns, f.stat().st_ino) for f in files]
        if found == self._held:
            return
        self._held = None  # or a failure half-way would leave two students' experts together
        training = self._recipe.training
        precision = torch.bfloat16 if training.precision == "bf16" else torch.float32
        for file in files:
            if file.stem not in self._experts:
                source = source_expert(self._recipe.method, self._family.routing(), file.stem)
                lora = training.student.lora
                dtype = precision if lora else torch.float32
                denoiser = self._family.denoiser(source, dtype=dtype, autocast=precision)
                if lora is not None:
                    add_adapter(denoiser, lora, seed=self._recipe.seed)
                self._experts[file.stem] = denoiser.eval().requires_grad_(False).to(self._device)
            fill(self._experts[file.stem], file)
        self._held = found


def _appeared(folder: Path) -> list[Path]:
    """The weights of a folder that another node may have written only just now."""
    deadline = time.monotonic() + SEEN_WITHIN
    while not (files := sorted(folder.glob("*.safetensors"))):
        if time.monotonic() > deadline:
            raise InputError(f"the student's weights are not in {folder}: do all nodes share it?")
        time.sleep(0.05)
    return files


def load_sampler_engine(recipe: Recipe, conditions: str, device: str, experts: tuple[str, ...] = ()) -> SamplerEngine:
    """Build one; see :data:`raydmd.serving.engine.Build`.

    Raises:
        InputError: if the pipeline or the conditions cannot be read.
    """
    del experts
    table = Conditions.read(Path(conditions))
    return SamplerEngine(recipe, load_family(recipe.model), table, torch.device(device))


@dataclass(frozen=True)
class _Asked:
    pending: Pending
    version: int


class Samplers:
    """A worker's side: writes weights, asks a cycle ahead, hands out samples with their age.

    Args:
        client: of the samplers' pool.
        folder: of the run.
        every: student updates between two versions of the weights.
        rank: this worker's; rank 0 writes.
    """

    def __init__(self, client: Client, folder: Path, *, every: int, rank: int) -> None:
        self._client, self._folder, self._every, self._rank = client, folder, every, rank
        self._version: int | None = None
        self._end = 0
        self._asked: dict[tuple[int, str], _Asked] = {}

    def begin(self, end: int) -> None:
        """A phase begins, which lasts up to cycle ``end``, or a run goes on; what was asked before is of no use."""
        self._version, self._end, self._asked = None, end, {}

    def ahead(
        self, cycle: int, student: TrainedRole, phase: Phase, stream: Stream, purposes: Sequence[str], agree: Agree
    ) -> None:
        """Write the weights if it is time, and ask for the samples of the cycle after this one.

        Args:
            cycle: in progress; the student has had so many updates.
            student: whose weights; all ranks call this, since sharded weights are gathered.
            phase: in progress.
            stream: makes batches by position.
            purposes: the fake updates' slots.
            agree: of all ranks, so that none asks for weights that are not written yet.
        """
        self._asked = {key: asked for key, asked in self._asked.items() if key[0] >= cycle}
        if cycle + 1 >= self._end:
            return
        if self._version is None or cycle - self._version >= self._every:
            folder = version_folder(self._folder, cycle)
            write_student(student, folder, rank=self._rank, agree=agree)
            if self._rank == 0:
                self._tidy(folder)
            self._version = cycle
        for purpose in purposes:
            batch = stream.batch(cycle + 1, purpose)
            request = RolloutRequest(
                x_t=batch.draws.normal("noise", batch.latent),
                draws=batch.draws.on(CPU),
                phase=phase.index,
                version=self._version,
                conditions=batch.conditions,
                name=f"cycle {cycle + 1} {purpose} rollout",
            )
            self._asked[cycle + 1, purpose] = _Asked(self._client.submit(request), self._version)

    def take(self, cycle: int, purpose: str, batch: Batch, method: Method, phase: Phase) -> tuple[Sample, int] | None:
        """The samples of an update and how many student updates old they are; ``None`` if they were never asked for.

        Raises:
            RaydmdError: as :meth:`raydmd.serving.client.Pending.result` does.
        """
        asked = self._asked.pop((cycle, purpose), None)
        if asked is None:
            return None
        answer = asked.pending.result().answer
        if answer.uncond is None:
            raise NonFiniteError(f"cycle {cycle} {purpose}: samples came without their clean predictions")
        device, noise = batch.draws.device, batch.draws.normal("noise", batch.latent)
        x, x0 = answer.value.to(device), answer.uncond.to(device)
        return method.rollout.restored(x, x0, noise, batch.draws, phase), cycle - asked.version

    def _tidy(self, newest: Path) -> None:
        others = sorted(f for f in newest.parent.iterdir() if f != newest)
        # What is there when a phase begins, or a run goes on, is of no use, whatever its number.
        for old in others if self._version is None else others[: -KEPT + 1]:
            shutil.rmtree(old, ignore_errors=True)
