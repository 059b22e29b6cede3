"""Timing a recipe's parts on the machine at hand: each pass of each role, the optimizers, and all that is no network's.

One process, one device, no Ray: what a cycle is put together from, so that any placement can be told from it. The
prompts are noise, and rewards, a discriminator and noise-image pairs are left out.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from raydmd.errors import InputError
from raydmd.models import load_teacher
from raydmd.models.sizes import training_latents
from raydmd.planning.calibration import Calibration, Entry, Points, key, model_key, read, write
from raydmd.planning.calls import count
from raydmd.planning.here import Clock, hardware, machine, now
from raydmd.planning.idle import Free, Idle, noise
from raydmd.planning.known import family_of
from raydmd.planning.network import Networks, blank
from raydmd.planning.trace import Meter
from raydmd.recipe import derive
from raydmd.recipe_placement import Placement
from raydmd.serving.engine import TeacherEngine
from raydmd.serving.local import LocalClient
from raydmd.training.cycle import train_cycle
from raydmd.training.events import EventLog
from raydmd.training.session import FolderSession
from raydmd.training.stream import Stream
from raydmd.training.tied import Tied
from raydmd.training.worker import Job, Worker

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from raydmd.models.base import Conditions, Experts
    from raydmd.models.family import Family
    from raydmd.recipe import Recipe
    from raydmd.training.cycle import Actors
    from raydmd.training.roles import TrainedRole

ROUNDS = 7
PROMPTS = 8


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A recipe's worker in this process.

    Attributes:
        recipe: as it runs here: one worker that holds its teacher.
        family: its pipeline.
        actors: of its cycles.
        teacher: its networks.
        conditions: of as many prompts as a batch needs.
    """

    recipe: Recipe
    family: Family
    actors: Actors
    teacher: Experts
    conditions: Conditions

    @classmethod
    def of(cls, recipe: Recipe, folder: Path) -> Bench:
        """Build it.

        Args:
            recipe: the run.
            folder: for whatever it writes.

        Raises:
            InputError: if the model or its weights are missing.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tied = recipe.placement.teacher == "tied"
        groups = max(recipe.placement.workers // recipe.placement.sequence, 1)
        here = Placement(teacher="tied" if tied else "local", threads=recipe.placement.threads)
        recipe = derive(
            recipe,
            {
                "output": folder,
                "method.gan": None,
                "method.regression": None,
                "training.batch": max(recipe.training.batch // groups, 1),
                "training.sharding": "ddp",
                "placement": here.model_dump(),
                "monitor.diversity": None,
            },
        )
        family, lengths = family_of(recipe.model)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        conditions = noise(blank(family, 1 + PROMPTS, family.shape().latent, lengths))
        shared = Tied(recipe, family, device) if tied else None
        teacher = shared.teacher() if shared else load_teacher(family, recipe.training.precision, device=device)
        job = Job(recipe=recipe, family=family, conditions=conditions, tied=shared)
        session = FolderSession(folder, device)
        client = LocalClient(TeacherEngine(teacher, conditions), alone=shared is None)
        worker = Worker(
            job, client, session, EventLog(folder / "events.jsonl"), Idle() if recipe.method.adapt else None
        )
        return cls(recipe=recipe, family=family, actors=worker.begin(), teacher=teacher, conditions=conditions)

    @property
    def device(self) -> torch.device:
        """That it runs on."""
        return self.actors.stream.batch(0, "student").draws.device

    def tensors(self) -> list[Tensor]:
        """All that is held between cycles."""
        modules: list[nn.Module] = [*self.teacher.modules.values()]
        found: list[Tensor] = []
        for role in (self.actors.student, self.actors.fake):
            modules += [*role.denoisers.values(), *role.bare_heads.values()]
            found += role.average.values()
            found += [v for state in role.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        for module in modules:
            found += [*module.parameters(), *module.buffers()]
        return found

    def cycle(self, number: int) -> dict[str, float]:
        """Run a cycle, and say what it measured."""
        return train_cycle(self.actors, number)

    def peak(self, number: int) -> float:
        """Bytes of tensors at most in a cycle, beside those that are held."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.cycle(number)
            return float(torch.cuda.max_memory_allocated() - before)
        with Meter(self.tensors()) as meter:
            self.cycle(number)
        return float(meter.peak())


def held(tensors: Iterable[Tensor]) -> float:
    """Bytes of tensors, each storage once."""
    return float(sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()))


def measure(recipe: Recipe, *, rounds: int = ROUNDS, clock: Clock = time.perf_counter) -> Entry:
    """Time a recipe's parts here.

    Args:
        recipe: the run.
        rounds: whose mean is taken, after one that is not counted.
        clock: seconds; that of the process leaves out others on the same cores.

    Raises:
        InputError: if the model or its weights are missing, or do not fit this one device.
    """
    torch.set_num_threads(recipe.placement.threads)
    try:
        return _measured(recipe, rounds, clock)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise InputError(
            f"--measure holds student, fake score and teacher together on one device, and {recipe.model.path} does not "
            "fit this one so. Measure it with adapters on one network (training.student.lora={} training.fake.lora={} "
            "placement.teacher=tied) or with fewer samples a worker (training.batch): its rates are used for the model "
            "in other recipes too. Or plan without --measure"
        ) from error


def _measured(recipe: Recipe, rounds: int, clock: Clock) -> Entry:
    with tempfile.TemporaryDirectory(prefix="raydmd-measure-") as folder:
        bench = Bench.of(recipe, Path(folder))
        share = bench.recipe.training.batch
        passes = _passes(bench, rounds, clock)
        return Entry(
            what=f"{recipe.name}: {recipe.method.name} of {recipe.model.path}, {share} samples, "
            f"{recipe.training.precision}",
            model=model_key(recipe),
            passes=passes,
            updates=_updates(bench, rounds, clock),
            beside=_beside(bench, rounds),
            rates=_rates(bench, passes),
            held=held(bench.tensors()),
            peak=max(bench.peak(number) for number in (0, 1, 2)),
        )


def calibrate(recipe: Recipe, file: Path, *, rounds: int = ROUNDS, clock: Clock = time.perf_counter) -> Calibration:
    """Time a recipe's parts here, and keep them beside those of others.

    Args:
        recipe: the run.
        file: of this machine's calibration.
        rounds: see :func:`measure`.
        clock: see :func:`measure`.

    Raises:
        InputError: see :func:`measure`; also if the file is no calibration.
    """
    before = read(file)
    found = calibration_of(recipe, rounds=rounds, clock=clock)
    if before and before.machine == found.machine:
        found = replace(found, entries={**before.entries, **found.entries})
    write(file, found)
    return found


def calibration_of(recipe: Recipe, *, rounds: int = ROUNDS, clock: Clock = time.perf_counter) -> Calibration:
    """The same, kept nowhere.

    Args:
        recipe: the run.
        rounds: see :func:`measure`.
        clock: see :func:`measure`.
    """
    entry = measure(recipe, rounds=rounds, clock=clock)
    return Calibration(machine=machine(), hardware=hardware(), entries={key(recipe): entry})


def _passes(bench: Bench, rounds: int, clock: Clock) -> dict[str, Points]:
    """Each kind of pass that a cycle calls, for the whole share and for half of it."""
    share, a = bench.recipe.training.batch, bench.actors
    networks: dict[str, Any] = {
        "student": a.student.experts.modules[a.phase.student[-1]],
        "fake": a.fake.experts.modules[a.phase.fake_experts[-1]],
        "teacher": next(iter(bench.teacher.modules.values())),
    }
    wanted = {(c.role, c.kind, c.rows) for phase in count(bench.recipe, bench.family) for c in phase.calls}
    jobs = [
        (role, kind, rows)
        for role, kind, times in sorted(wanted)
        for rows in dict.fromkeys((max(1, round(times * share / 2)), max(1, round(times * share))))
        if kind != "record"  # with the backward pass
    ]
    seen: dict[tuple[str, str, int], list[float]] = {}
    for number in range(rounds + 1):
        for role, kind, rows in jobs:
            for what, seconds in _timed(bench, networks[role], kind, rows, clock).items():
                if number:
                    seen.setdefault((role, what, rows), []).append(seconds)
    found: dict[str, Points] = {}
    for (who, what, rows), taken in seen.items():
        found.setdefault(f"{who} {what}", []).append((float(rows), fmean(taken)))
    return found


def _timed(bench: Bench, network: Any, kind: str, rows: int, clock: Clock) -> dict[str, float]:
    device = bench.device
    x, t = torch.randn(rows, *bench.actors.latent, device=device), torch.full((rows,), 0.5, device=device)
    cond = bench.conditions.rows([1 + i % PROMPTS for i in range(rows)]).to(device)
    start = now(device, clock)
    if kind == "forward":
        with torch.no_grad():
            network(x, t, cond)
        return {"forward": now(device, clock) - start}
    out = network(x, t, cond)
    middle = now(device, clock)
    out.backward(torch.ones_like(out))
    end = now(device, clock)
    network.zero_grad(set_to_none=True)
    return {"record": middle - start, "backward": end - middle}


def _updates(bench: Bench, rounds: int, clock: Clock) -> dict[str, float]:
    """Clipping, the optimizer's step and the moving average, by role; weights are left as they were."""
    found = {}
    for role in (bench.actors.student, bench.actors.fake):
        role.set_rate(0.0)
        found[role.name] = fmean([_updated(role, bench.device, clock) for _ in range(rounds + 1)][1:])
        role.set_rate(1.0)
    return found


def _updated(role: TrainedRole, device: torch.device, clock: Clock) -> float:
    parameters = list(role.parameters.values())
    for p in parameters:
        p.grad = torch.zeros_like(p)
    loss = 0.0 * parameters[-1].sum()
    start = now(device, clock)
    role.update(loss, where="measuring")
    return now(device, clock) - start


def _beside(bench: Bench, rounds: int) -> dict[str, Points]:
    """A cycle's own seconds by stage, with networks that take none."""
    a, share = bench.actors, bench.recipe.training.batch
    group = bench.recipe.method.adapt.group if bench.recipe.method.adapt else 1
    found: dict[str, Points] = {}
    for batch in dict.fromkeys((max(group, share // 2 // group * group), share)):
        stream = Stream(
            bench.conditions,
            latents=training_latents(bench.family, bench.recipe.data),
            seed=bench.recipe.seed,
            batch=batch,
            slots=["student", *(f"fake.{k}" for k in range(a.fake_updates))],
            rank=0,
            world=1,
            group=group,
            device=bench.device,
        )
        roles: dict[str, Any] = {"student": Free(a.student), "fake": Free(a.fake)}
        free = replace(a, stream=stream, teacher=Idle(), pairs=None, adversary=None, **roles)
        seen = [train_cycle(free, number) for number in range(rounds + 1)][1:]
        for stage, keys in (
            ("rollout", ("rollout",)),
            ("fake", ("fake",)),
            ("generator", ("teacher_wait", "generator")),
        ):
            seconds = fmean(sum(row[f"time/{k}"] for k in keys) for row in seen)
            found.setdefault(stage, []).append((float(batch), seconds))
    return found


def _rates(bench: Bench, passes: Mapping[str, Points]) -> dict[str, float]:
    """Operations a second of the largest passes."""
    training, bits = bench.recipe.training, 16 if bench.recipe.training.precision == "bf16" else 32
    _, lengths = family_of(bench.recipe.model)
    cost = Networks(bench.family, lengths).cost(
        rows=1,
        latent=bench.actors.latent,
        bits=bits if training.fake.lora else 32,
        autocast=bits,
        lora=training.fake.lora,
        again=training.gradient_checkpointing,
        train=True,
    )
    forward = max(passes.get("teacher forward") or passes["student forward"])
    record, backward = max(passes["fake record"]), max(passes["fake backward"])
    return {
        "forward": cost.forward * forward[0] / forward[1],
        "train": (cost.forward + cost.backward) * record[0] / (record[1] + backward[1]),
    }
