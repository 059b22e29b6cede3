"""The evaluation's clips: what a teacher and its students make of the same noise.

The teacher's walks go to its pool where the run has one, and are kept on disk: they depend on nothing that training
changes, so other runs of the same evaluation, and the next attempt after a crash, find them there.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import platform
import time
import uuid
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from raydmd import __version__
from raydmd.draws import Draws
from raydmd.evaluation.samples import Samples
from raydmd.guidance import Guidance
from raydmd.models import load_teacher
from raydmd.models.base import Conditions
from raydmd.models.identity import changes_of
from raydmd.models.places import locate
from raydmd.models.placing import place, take_back
from raydmd.process import step_grid
from raydmd.sampling import sample
from raydmd.serving.messages import WalkRequest
from raydmd.serving.order import key_of
from raydmd.serving.pool_client import PoolClient
from raydmd.training.pools import teacher_facts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from raydmd.models.base import Experts
    from raydmd.models.family import Family
    from raydmd.recipe import Recipe
    from raydmd.serving.client import Pending
    from raydmd.serving.order import ClientSpec

ALL = ("teacher", "reference", "undistilled", "undistilled_guided")
"""Samplers of the teacher."""
AHEAD = 3
"""Walks under way for each replica, so that none waits for the next step."""


@dataclass(frozen=True)
class Sampler:
    """One way to make the evaluation's clips.

    Attributes:
        name: key of its row.
        title: what a reader sees.
        grid: its times.
        guidance: its guidance.
        salt: other noise for another number.
        renoise: fresh noise between steps.
    """

    name: str
    title: str
    grid: Sequence[float]
    guidance: Guidance
    salt: int = 0
    renoise: bool = False

    @property
    def evaluations(self) -> int:
        """Of the network, per clip."""
        return (len(self.grid) - 1) * (2 if self.guidance.active else 1)


@dataclass(frozen=True)
class Asked:
    """What clips are made of.

    Attributes:
        recipe: the run; its evaluation section counts.
        family: its pipeline.
        texts: a prompt per clip.
        file: of the condition table.
        conditions: the table.
        rows: of it, one per clip.
        device: where the clips are decoded, and the student is sampled.
    """

    recipe: Recipe
    family: Family
    texts: list[str]
    file: Path
    conditions: Conditions
    rows: list[int]
    device: torch.device

    def parts(self, sampler: Sampler, size: int) -> Iterator[tuple[list[int], Draws]]:
        """Rows and random numbers, ``size`` clips at a time."""
        for i in range(0, len(self.rows), size):
            part = self.rows[i : i + size]
            yield part, evaluation_draws(self.recipe, range(i, i + len(part)), salt=sampler.salt)


@dataclass(frozen=True)
class Latents:
    """What a sampler came to.

    Attributes:
        latents: clean, one per clip, fp32, on the CPU.
        seconds: per clip, of sampling alone.
    """

    latents: Tensor
    seconds: float


def evaluation_draws(recipe: Recipe, positions: Sequence[int], *, salt: int = 0) -> Draws:
    """The random numbers of evaluation samples, the same for every method."""
    return Draws(recipe.evaluation.seed + salt, "evaluation", list(positions))


def ask(recipe: Recipe, family: Family, texts: list[str], device: torch.device) -> Asked:
    """What an evaluation with these prompts is made of; encodes them unless that was done."""
    unique = list(dict.fromkeys(texts))
    file = family.encode(unique, (recipe.data.cache or recipe.folder / "conditions").absolute())
    rows = [1 + unique.index(t) for t in texts]
    return Asked(recipe, family, texts, file, Conditions.read(file), rows, device)


def teacher_samples(asked: Asked, pool: ClientSpec | None, names: Sequence[str] = ALL) -> Iterator[Samples]:
    """The clips of the teacher: in full, and undistilled in as many evaluations as the student has.

    A pool walks beside what else happens here, from the first that is asked for; a teacher of this process when it is
    its turn.

    Args:
        asked: the evaluation.
        pool: walks; default: the teacher is loaded here.
        names: of :data:`ALL`. The ``reference`` is in full from other noise. Distances are taken to it: clips from
            the same noise are paired and seem nearer.
    """
    recipe, e, m = asked.recipe, asked.recipe.evaluation, asked.recipe.method
    full = step_grid(e.teacher_steps, e.shift or m.shift)
    guided = Guidance(m.guidance if e.guidance is None else e.guidance)
    few, half = step_grid(m.steps, m.shift), step_grid(max(m.steps // 2, 1), m.shift)
    every = [
        Sampler("teacher", f"teacher, {e.teacher_steps} guided steps", full, guided),
        Sampler("reference", "teacher, other seeds", full, guided, salt=1),
        Sampler("undistilled", f"undistilled, {m.steps} steps, unguided", few, Guidance()),
        Sampler("undistilled_guided", f"undistilled, {len(half) - 1} guided steps", half, guided),
    ]
    samplers = [s for s in every if s.name in names]

    @functools.cache
    def teacher() -> Experts:
        return load_teacher(asked.family, recipe.training.precision, device=torch.device("cpu"))

    def draw(sampler: Sampler) -> Latents:
        return draw_at_pool(asked, sampler, pool) if pool else draw_here(asked, sampler, teacher())

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    where = {
        "device": device,
        "batch": e.batch,
        "cuda": asked.device.type == "cuda",
        "threads": torch.get_num_threads(),
    }
    if pool:
        where |= {
            "batch": request_size(recipe),
            "cuda": recipe.placement.teacher_gpus > 0,
            "threads": recipe.placement.threads,
        }
    thread = ThreadPoolExecutor(1)
    try:
        found = [
            (sampler, thread.submit(kept, asked, sampler, where, functools.partial(draw, sampler)) if pool else None)
            for sampler in samplers
        ]
        for sampler, coming in found:
            latents = coming.result() if coming else kept(asked, sampler, where, functools.partial(draw, sampler))
            yield decoded(asked, sampler, latents)
    finally:
        thread.shutdown(wait=False, cancel_futures=True)


def draw_here(asked: Asked, sampler: Sampler, experts: Experts) -> Latents:
    """Sample networks of this process; they are on the device only meanwhile."""
    for module in experts.modules.values():
        place(module, asked.device, spread=asked.recipe.placement.teacher_gpus > 1)
    latent, found, start = asked.family.shape().latent, list[Tensor](), time.perf_counter()
    for part, draws in asked.parts(sampler, asked.recipe.evaluation.batch):

        def noise(name: str, draws: Draws = draws) -> Tensor:
            return draws.normal(name, latent).to(asked.device)

        def fresh(step: int, noise: Callable[[str], Tensor] = noise) -> Tensor:
            return noise(f"noise.{step}")

        cond, uncond = (asked.conditions.rows(r).to(asked.device) for r in (part, [0] * len(part)))
        latents = sample(
            experts,
            noise("noise"),
            cond,
            uncond,
            grid=sampler.grid,
            guidance=sampler.guidance,
            fresh=fresh if sampler.renoise else None,
        )
        found.append(latents.float().cpu())
    seconds = (time.perf_counter() - start) / len(asked.rows)
    for module in experts.modules.values():
        take_back(module)
    return Latents(torch.cat(found), seconds)


def draw_at_pool(asked: Asked, sampler: Sampler, pool: ClientSpec) -> Latents:
    """Have the teacher's pool walk, a step in each request.

    So others' requests wait for one forward at most, and what dies or hangs is noticed as soon as in training.

    Raises:
        PoolError: or NonFiniteError, from the pool.
    """
    client = PoolClient(dataclasses.replace(pool, table=str(asked.file)), f"{pool.holder}/evaluation")
    client.expect(tuple(dict.fromkeys(asked.family.routing().expert(t) for t in sampler.grid[:-1])))
    latent, steps = asked.family.shape().latent, list(itertools.pairwise(sampler.grid))

    def ask_for(walk: _Walk) -> Pending:
        request = WalkRequest(
            x_t=walk.x,
            grid=steps[walk.step],
            conditions=walk.rows,
            guidance=sampler.guidance,
            name=f"{sampler.name}, clips {walk.number * size}.., step {walk.step + 1}",
        )
        return client.submit(request)

    size = request_size(asked.recipe)
    waiting = (
        _Walk(number, tuple(part), draws.normal("noise", latent))
        for number, (part, draws) in enumerate(asked.parts(sampler, size))
    )
    under_way = deque(
        (walk, ask_for(walk)) for walk in itertools.islice(waiting, AHEAD * asked.recipe.placement.teachers)
    )
    found, seconds = dict[int, Tensor](), 0.0
    while under_way:
        walk, pending = under_way.popleft()
        reply = pending.result()
        seconds += reply.seconds * len(walk.rows) / reply.batch_items  # of a forward shared with others, its share
        walk.x, walk.step = reply.answer.value, walk.step + 1
        if walk.step == len(steps):
            found[walk.number] = walk.x
            following = next(waiting, None)
            if following is None:
                continue
            walk = following
        under_way.append((walk, ask_for(walk)))
    return Latents(torch.cat([found[number] for number in sorted(found)]), seconds / len(asked.rows))


@dataclass
class _Walk:
    """Clips on their way."""

    number: int
    rows: tuple[int, ...]
    x: Tensor
    step: int = 0


def request_size(recipe: Recipe) -> int:
    """Clips in one request to the teacher's pool."""
    return min(recipe.evaluation.batch, recipe.placement.batch_items)


def at_pool(recipe: Recipe, family: Family) -> bool:
    """Whether a run's evaluation asks the teacher's pool: not one whose weights are quantised, nor one too small.

    A teacher spread over several GPUs is loaded after the workers have gone, since their places may not suffice for
    the student beside it.
    """
    p = recipe.placement
    room = not p.teacher_experts or p.teachers * p.teacher_experts >= len(family.routing().experts)
    return p.teacher == "remote" and not p.teacher_quantize and p.teacher_gpus <= 1 and room


def kept(asked: Asked, sampler: Sampler, where: Mapping[str, Any], draw: Callable[[], Latents]) -> Latents:
    """A teacher's latents from the file that another run, or another attempt, has left; else drawn, and left there.

    Args:
        asked: the evaluation.
        sampler: the teacher's.
        where: what else they differ by, if only in rounding: the clips in one batch, the device.
        draw: makes them.
    """
    file = asked.file.parent / f"{key_of('clips', {**_facts(asked, sampler), **where})}.safetensors"
    if file.is_file():
        try:
            with safe_open(file, framework="pt") as stored:
                return Latents(stored.get_tensor("latents"), float(stored.metadata()["seconds"]))
        except (SafetensorError, OSError, KeyError, ValueError, TypeError):
            pass  # half of one is as good as none: it is written anew
    found = draw()
    about = {"seconds": repr(found.seconds), "sampler": json.dumps(sampler.title)}
    partial = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}")  # two runs may be at it at once
    save_file({"latents": found.latents.contiguous()}, partial, metadata=about)
    os.replace(partial, file)
    return found


def decoded(asked: Asked, sampler: Sampler, found: Latents) -> Samples:
    """The clips of latents; decoding counts into their seconds."""
    start, size = time.perf_counter(), asked.recipe.evaluation.batch
    clips = [asked.family.decode(part.to(asked.device)).cpu() for part in torch.split(found.latents, size)]
    return Samples(
        name=sampler.name,
        title=sampler.title,
        clips=torch.cat(clips),
        prompts=asked.texts,
        evaluations=sampler.evaluations,
        seconds=found.seconds + (time.perf_counter() - start) / len(asked.rows),
    )


def _facts(asked: Asked, sampler: Sampler) -> dict[str, Any]:
    e = asked.recipe.evaluation
    return {
        "raydmd": __version__,
        **teacher_facts(asked.recipe, asked.family),
        "table": asked.file.stem,
        "rows": asked.rows,
        "seed": e.seed + sampler.salt,
        "latent": asked.family.shape().latent,
        "grid": list(sampler.grid),
        "guidance": sampler.guidance.scale,
        "deterministic": asked.recipe.deterministic,
        # The digests are of samples of large files; a file that was written to since says so by its time.
        "written": changes_of(locate(asked.recipe.model).settings, asked.family.routing().experts),
        "versions": (torch.__version__, diffusers.__version__),
    }
