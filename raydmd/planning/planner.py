"""A plan: for a recipe and hardware, what fits, how long a run takes, and where the teacher should be."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from raydmd.errors import InputError
from raydmd.methods.presets import student_routing
from raydmd.models.sizes import training_latents
from raydmd.planning.answer import Answer, Option, PhasePlan, nearest
from raydmd.planning.calls import PhaseCalls, count
from raydmd.planning.known import family_of
from raydmd.planning.memory import Budget, RoleSize, Setting, replica, trainer
from raydmd.planning.network import Network, Networks
from raydmd.planning.simulate import Outcome, Shape, simulate
from raydmd.planning.timing import Step, exchange, mean, on_paper, step, update_on_paper
from raydmd.planning.trace import Passes
from raydmd.training.plan import CyclePlan

if TYPE_CHECKING:
    from raydmd.models.family import Family
    from raydmd.planning.calibration import Measured
    from raydmd.planning.hardware import Hardware
    from raydmd.planning.memory import Placement, Sharding
    from raydmd.planning.timing import Seconds
    from raydmd.recipe import Recipe
    from raydmd.recipe_training import Role

SEQUENCES = (1, 2, 4, 8)
"""Workers that may share a sample."""
MOST = 4096
"""GPUs of the largest cluster that is looked at."""


class Planner:
    """Answers questions about one recipe on one kind of hardware.

    Args:
        recipe: the run.
        hardware: what it is planned for.
        measured: times of this machine, where they were taken.

    Raises:
        InputError: if the recipe's model can't be found or fitted.
    """

    def __init__(self, recipe: Recipe, hardware: Hardware, measured: Measured | None = None) -> None:
        self.recipe, self.hardware, self.measured = recipe, hardware, measured
        self.family: Family
        self.family, lengths = family_of(recipe.model)
        self.networks = Networks(self.family, lengths)
        self.latents = _upright(training_latents(self.family, recipe.data))
        self.phases: list[PhaseCalls] = count(recipe, self.family)
        self._costs: dict[Any, Passes] = {}
        self._sizes: dict[str, Network] = {}
        self._heads: int | None = None
        self._compute = 2.0 if recipe.training.precision == "bf16" else 4.0
        self._bits = round(8 * self._compute)

    @property
    def own(self) -> Option:
        """The recipe's own placement."""
        p, t = self.recipe.placement, self.recipe.training
        remote = p.teacher == "remote"
        return Option(
            placement=p.teacher,
            sharding=t.sharding if p.workers > 1 else "single",
            workers=p.workers,
            teachers=p.teachers if remote else 0,
            teacher_gpus=max(1.0, p.teacher_gpus) if remote else 1.0,
            sequence=p.sequence,
        )

    @property
    def largest(self) -> tuple[int, ...]:
        """The latent with most values, which memory must suffice for."""
        return max(self.latents, key=math.prod)

    def share(self, option: Option) -> int:
        """Samples of a worker's update."""
        return self.recipe.training.batch * option.sequence // option.workers

    def with_batch(self, batch: int) -> Planner:
        """The same with another batch."""
        if batch == self.recipe.training.batch:
            return self
        other = copy.copy(self)
        training = self.recipe.training.model_copy(update={"batch": batch})
        other.recipe = self.recipe.model_copy(update={"training": training})
        return other

    def possible(self, option: Option) -> bool:
        """Whether workers can share the batch, and adapters allow what is tied."""
        t = self.recipe.training
        adapters = t.student.lora is not None and t.fake.lora is not None
        return self._divides(option.workers, option.sequence) and (option.placement != "tied" or adapters)

    def answer(self, option: Option) -> Answer:
        """What becomes of the run under an option."""
        training = self.recipe.training
        ends = CyclePlan.of(training, len(self.phases)).ends
        cycles = [b - a for a, b in zip((0, *ends), ends, strict=False)]
        phases = tuple(self._phase(k, option, n) for k, n in enumerate(cycles))
        warm = sum(training.fake_warmup * p.step.fake_updates[0] for p in phases if p.step.fake_updates)
        seconds = sum(p.seconds * p.cycles for p in phases) + warm
        return Answer(
            option=option,
            phases=phases,
            room=self.hardware.room,
            host_room=self.hardware.host_room,
            hours=seconds / 3600,
            price=self.hardware.price * option.gpus,
        )

    def shape(self, answer: Answer, *, phase: int = 0, runs: int = 1, cycles: int = 20, seed: int = 0) -> Shape:
        """One phase of an answer, for the simulator."""
        p, option = answer.phases[phase], answer.option
        place = self.recipe.placement
        items, calls = self.share(option), self.phases[phase]
        each = p.step.answer / max(calls.queries, 1) / max(items, 1)
        return Shape(
            workers=max(1, option.workers // option.sequence),
            runs=runs,
            replicas=option.teachers,
            rollout=p.step.rollout,
            fake_updates=p.step.fake_updates,
            generator=p.step.generator,
            requests=calls.queries,
            items=items,
            service=lambda n: each * n,
            batch_items=place.batch_items,
            batch_wait=place.batch_wait,
            transfer=p.wire / (self.hardware.network * self.hardware.wire * 1e9 / self.hardware.per_node),
            jitter=self.hardware.jitter,
            slower=self.crowd(option),
            cycles=cycles,
            seed=seed,
        )

    def crowd(self, option: Option) -> float:
        """How many times slower workers are that share the cores of one machine; 1 where each has a GPU."""
        cores = self.hardware.cores
        return max(1.0, option.workers * self.recipe.placement.threads / cores) if cores else 1.0

    def simulated(self, answer: Answer, **settings: int) -> list[Outcome]:
        """Each phase of an answer, played through."""
        return [simulate(self.shape(answer, phase=k, **settings)) for k in range(len(answer.phases))]

    def options(self, gpus: int) -> list[Option]:
        """Every sensible way to use so many GPUs."""
        found: list[Option] = []
        own, before = self.own, 0
        for sequence in dict.fromkeys((own.sequence, *SEQUENCES)):
            workers = self._workers(gpus, sequence)
            # To share a sample only pays where there are more workers than samples.
            if sequence < own.sequence or workers <= before or not self._splits(sequence):
                continue
            before = workers
            places: tuple[Placement, ...] = ("tied", "local", "remote")
            for placement in places:
                for teachers in self._pools(gpus) if placement == "remote" else (0,):
                    n = self._workers(gpus - math.ceil(teachers * own.teacher_gpus), sequence)
                    shardings: tuple[Sharding, ...] = ("ddp", "fsdp") if n > 1 else ("single",)
                    found += [
                        Option(
                            placement=placement,
                            sharding=sharding,
                            workers=n,
                            teachers=teachers,
                            teacher_gpus=own.teacher_gpus if teachers else 1.0,
                            sequence=sequence,
                        )
                        for sharding in shardings
                    ]
        return [option for option in found if option.workers and self.possible(option)]

    def _workers(self, gpus: int, sequence: int) -> int:
        """The most that can share the batch."""
        return next((n for n in range(gpus, 0, -1) if self._divides(n, sequence)), 0)

    def _pools(self, gpus: int) -> list[int]:
        """Numbers of replicas worth a look: up to half of the GPUs."""
        most = self.own.teacher_gpus
        return sorted({n for k in range(11) for n in (2**k, 3 * 2**k) if n * most <= gpus / 2} | {1})

    def best(self, gpus: int) -> tuple[list[Answer], Answer | None]:
        """The best of each placement on so many GPUs, and the best of them, if any fits.

        Fewer hours are better, and then less memory. A smaller pool that takes at most 1% longer is better too: what
        is left over can serve another run.
        """
        by: dict[tuple[str, int], list[Answer]] = {}
        for option in self.options(gpus):
            by.setdefault((option.placement, option.sequence), []).append(self.answer(option))
        tops = [_top(answers) for answers in by.values()]
        fitting = [a for a in tops if a.fits]
        return tops, (min(fitting, key=lambda a: (a.hours, a.peak)) if fitting else None)

    def enough(self, gpus: int) -> Answer | None:
        """The best on twice as many GPUs, or four times as many, and so on: the first that fits, up to 4096."""
        while (gpus := 2 * gpus) <= MOST:
            if (found := self.best(gpus)[1]) is not None:
                return found
        return None

    def _divides(self, workers: int, sequence: int) -> bool:
        groups, adapt, batch = workers // sequence, self.recipe.method.adapt, self.recipe.training.batch
        if not groups or workers % sequence or batch % groups:
            return False
        return adapt is None or not batch // groups % adapt.group  # a prompt's samples stay on one worker

    def _splits(self, sequence: int) -> bool:
        """Whether so many workers can share a sample."""
        if sequence > 1 and (self.recipe.placement.samplers or self.recipe.method.gan):
            return sequence == self.recipe.placement.sequence
        try:
            self.family.check_sequence(sequence, self.latents)
        except InputError:
            return False
        return True

    def _phase(self, k: int, option: Option, cycles: int) -> PhasePlan:
        calls, share = self.phases[k], max(self.share(option), 1)
        setting = Setting(
            placement=option.placement, sharding=option.sharding, workers=option.workers, compute=self._compute
        )
        student, fake, teacher = self._roles(calls, option, share, self.largest)
        adapters = len(student_routing(self.recipe.method, self.family.routing()).experts)
        adapters += len(self.family.routing().experts)
        budget = trainer(
            student,
            fake,
            teacher,
            setting=setting,
            teacher_experts=len(self.family.routing().experts),
            adapters=adapters,
            held=calls.held,
            fake_rows=calls.fake_rows,
        )
        traffic = exchange(self.hardware, student, fake, setting, calls)
        here = option.placement != "remote"
        updates = {"student": 0.0, "fake": 0.0}
        timed: list[Step] = []
        for latent in self.latents:
            roles = dict(zip(("student", "fake"), self._roles(calls, option, share, latent)[:2], strict=True))
            frozen = replace(roles["student"], passes=self._cost(None, share, latent, train=False, option=option))
            seconds: Seconds = on_paper(
                self.hardware, {**roles, "teacher": frozen}, self.recipe.training.precision, self._compute
            )
            updates = {name: update_on_paper(self.hardware, role, setting) for name, role in roles.items()}
            beside: dict[str, float] = {}
            if self.measured is not None:
                seconds = self.measured.seconds(seconds, share)
                updates = self.measured.updates(updates)
                beside = self.measured.beside(share)
            timed.append(
                step(
                    calls,
                    seconds,
                    updates=updates,
                    traffic=traffic,
                    here=here,
                    fake_updates=self.recipe.training.fake_updates,
                    beside=beside,
                )
            )
        whole = mean(timed, list(self.latents.values()))
        pool, wait, wire = None, 0.0, 0.0
        if not here:
            pool = self._pool(calls, option, teacher)
            values = sum(math.prod(latent) * w for latent, w in self.latents.items())
            values /= sum(self.latents.values())
            wire = 4.0 * share * values * (calls.queries + calls.answers)
            load = max(1.0, option.workers / option.sequence / max(option.teachers, 1))
            wait = max(0.0, whole.answer * load - sum(whole.fake_updates))
        return PhasePlan(
            budget=budget,
            pool=pool,
            step=whole,
            exchange=traffic,
            seconds=whole.busy + wait,
            wait=wait,
            wire=wire,
            host=calls.held * student.passes.moved + calls.fake_rows * fake.passes.moved,
            cycles=cycles,
        )

    def _roles(
        self, calls: PhaseCalls, option: Option, share: int, latent: tuple[int, ...]
    ) -> tuple[RoleSize, RoleSize, Passes]:
        training, phase = self.recipe.training, calls.phase
        finished = {e for p in self.phases[: phase.index] for e in p.phase.student}
        gan = self.recipe.method.gan
        if gan and self._heads is None:
            self._heads = self.networks.head(len(gan.depths))
        heads = (self._heads or 0) * len(phase.fake_experts)

        def role(settings: Role, experts: int, trained: int, *, average: bool, heads: int = 0) -> RoleSize:
            return RoleSize(
                network=self._size(settings),
                experts=experts,
                trained=trained,
                full=settings.lora is None,
                average=average,
                heads=heads,
                passes=self._cost(settings, share, latent, train=True, option=option),
            )

        student = role(
            training.student,
            len(finished | set(phase.student)),
            len(phase.student),
            average=training.ema > 0,
        )
        fake = role(training.fake, len(phase.fake_experts), len(phase.fake_experts), average=False, heads=heads)
        return student, fake, self._cost(None, share, latent, train=False, option=option)

    def _size(self, role: Role) -> Network:
        known = repr(role.lora)
        if known not in self._sizes:
            self._sizes[known] = self.networks.size(role.lora)
        return self._sizes[known]

    def _cost(self, role: Role | None, rows: int, latent: tuple[int, ...], *, train: bool, option: Option) -> Passes:
        """Passes of a role's network, ``None`` for the teacher's; many rows are told from one and two."""
        gathered = option.sharding == "fsdp" and option.workers > 1
        full = role is not None and role.lora is None
        bits = 32 if full and not gathered else self._bits
        # A teacher beside its workers shares their samples' tokens with them.
        shared = option.sequence if role is not None or option.placement != "remote" else 1
        known = (role and repr(role.lora), rows, latent, train, bits, shared)
        if known in self._costs:
            return self._costs[known]

        def at(n: int) -> Passes:
            return self.networks.cost(
                rows=n,
                latent=latent,
                bits=bits,
                autocast=self._bits,
                lora=role.lora if role else None,
                again=train and self.recipe.training.gradient_checkpointing,
                train=train,
                offload=train and self.recipe.training.offload_activations,
            )

        found = at(1)
        if rows > 1:
            found = _stretched(found, at(2), rows)
        if shared > 1:
            found = Passes(rows=rows, **{k: v / shared for k, v in vars(found).items() if k != "rows"})
        self._costs[known] = found
        return found

    @property
    def _bare(self) -> Network:
        if "" not in self._sizes:
            self._sizes[""] = self.networks.size(None)
        return self._sizes[""]

    def _pool(self, calls: PhaseCalls, option: Option, teacher: Passes) -> Budget:
        p = self.recipe.placement
        experts = p.teacher_experts or len(self.family.routing().experts)
        size = 1.0 if p.teacher_quantize else self._compute
        asked = max((c.rows for c in calls.calls if c.role == "teacher"), default=1.0)
        together = max(self.share(option), min(p.batch_items, self.share(option) * option.workers))
        return replica(
            self._bare,
            teacher,
            experts=experts,
            size=size,
            gpus=option.teacher_gpus,
            rows=asked * together,
        )


def _stretched(one: Passes, two: Passes, rows: int) -> Passes:
    """What many rows cost, from what one and two do."""
    found = {k: v + (rows - 1) * (getattr(two, k) - v) for k, v in vars(one).items() if k != "rows"}
    # Few rows have their peak where all gradients are, many where all activations are.
    found["whole"] = max(found["whole"], found["peak"])
    return Passes(rows=rows, **found)


def _upright(latents: dict[tuple[int, ...], float]) -> dict[tuple[int, ...], float]:
    """Latents by weight, where one that lies on its side costs what it costs upright."""
    found: dict[tuple[int, ...], float] = {}
    for latent, weight in latents.items():
        key = (*latent[:-2], *sorted(latent[-2:]))
        found[key] = found.get(key, 0.0) + weight
    return found


def _top(answers: list[Answer]) -> Answer:
    """The best of one placement: that fits, is fast, and has no larger pool than it needs."""
    fitting = [a for a in answers if a.fits]
    if not fitting:
        return nearest(answers)
    fastest = min(a.hours for a in fitting)
    near = [a for a in fitting if a.hours <= 1.01 * fastest]
    return min(near, key=lambda a: (a.option.gpus, a.option.teachers, a.hours, a.peak))
