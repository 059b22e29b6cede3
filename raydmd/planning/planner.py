"""A plan: for a recipe and hardware, what fits, how long a run takes, and where the teacher should be."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from raydmd.methods.presets import student_routing
from raydmd.models.sizes import training_latents
from raydmd.planning.answer import Answer, Option, PhasePlan
from raydmd.planning.calls import PhaseCalls, count
from raydmd.planning.known import family_of
from raydmd.planning.memory import Budget, RoleSize, Setting, replica, trainer
from raydmd.planning.network import Network, Networks
from raydmd.planning.search import options, top
from raydmd.planning.simulate import Outcome, Shape, Size, simulate
from raydmd.planning.timing import Step, exchange, mean, mean_of, on_paper, step, tokens_sent, update_on_paper, waited
from raydmd.planning.trace import Passes, stretched
from raydmd.training.plan import CyclePlan

if TYPE_CHECKING:
    from raydmd.models.family import Family
    from raydmd.planning.calibration import Measured
    from raydmd.planning.hardware import Hardware
    from raydmd.planning.timing import Seconds
    from raydmd.recipe import Recipe
    from raydmd.recipe_training import Role

MOST = 4096
"""GPUs of the largest cluster that is looked at."""
FEW, ENOUGH, CROWD = 6, 20, 4000
"""Cycles that are played for a plan's page, at least and at most, and workers' cycles where there are many workers."""


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
        self._played: dict[Any, list[Outcome]] = {}
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
            sizes=tuple(
                Size(
                    weight=weight,
                    rollout=_of(s.rollout, p.step.rollout),
                    fake=_of(sum(s.fake_updates), sum(p.step.fake_updates)),
                    generator=_of(s.generator, p.step.generator),
                    answer=_of(s.answer, p.step.answer),
                )
                for weight, s in zip(self.latents.values(), p.sizes, strict=True)
            ),
            transfer=p.wire / (self.hardware.network * self.hardware.wire * 1e9 / self.hardware.per_node),
            jitter=self.hardware.jitter,
            slower=self.crowd(option),
            cycles=cycles,
            seed=seed,
        )

    def played(self, answer: Answer) -> tuple[Answer, list[Outcome]]:
        """An answer with the simulator's cycles and the hours they make, and its phases there; played once each."""
        known = answer.option, self.recipe.training.batch
        if known not in self._played:
            cycles = max(FEW, min(ENOUGH, CROWD // answer.option.workers))
            self._played[known] = self.simulated(answer, cycles=cycles)
        found = self._played[known]
        return answer.played(found), found

    def crowd(self, option: Option) -> float:
        """How many times slower workers are that share the cores of one machine; 1 where each has a GPU."""
        cores = self.hardware.cores
        return max(1.0, option.workers * self.recipe.placement.threads / cores) if cores else 1.0

    def simulated(self, answer: Answer, **settings: int) -> list[Outcome]:
        """Each phase of an answer, played through."""
        return [simulate(self.shape(answer, phase=k, **settings)) for k in range(len(answer.phases))]

    def best(self, gpus: int, *, play: bool = False) -> tuple[list[Answer], Answer | None]:
        """The best of each placement on at most so many GPUs, and the best of them, if any fits.

        Args:
            gpus: that there are.
            play: whether the best of each placement are compared as the simulator plays them, barriers included.
        """
        by: dict[tuple[str, int], list[Answer]] = {}
        for option in options(self, gpus):
            by.setdefault((option.placement, option.sequence), []).append(self.answer(option))
        tops = [top(answers) for answers in by.values()]
        if play:
            tops = [self.played(a)[0] for a in tops]
        best = top(tops) if tops else None
        return tops, best if best and best.fits else None

    def enough(self, gpus: int) -> Answer | None:
        """The best on twice as many GPUs, or four times as many, and so on: the first that fits, up to 4096."""
        while (gpus := 2 * gpus) <= MOST:
            if (found := self.best(gpus)[1]) is not None:
                return self.played(found)[0]
        return None

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
        again = self.recipe.training.gradient_checkpointing
        here = option.placement != "remote"
        sent = {latent: share * self._sent(option.sequence, latent) for latent in self.latents}
        traffic = traffic.with_tokens(
            mean_of(list(sent.values()), list(self.latents.values())), calls, here=here, again=again
        )
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
                    tokens=sent[latent] / self.hardware.bandwidth(option.sequence),
                    again=again,
                )
            )
        whole = mean(timed, list(self.latents.values()))
        pool, wait, wire = None, 0.0, 0.0
        if not here:
            pool = self._pool(calls, option, teacher)
            values = mean_of([math.prod(latent) for latent in self.latents], list(self.latents.values()))
            wire = 4.0 * share * values * (calls.queries + calls.answers)
            load = max(1.0, option.workers / option.sequence / max(option.teachers, 1))
            wait = waited(timed, list(self.latents.values()), load)
        return PhasePlan(
            budget=budget,
            pool=pool,
            step=whole,
            sizes=tuple(timed),
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
            found = stretched(found, at(2), rows)
        found = found.sound()
        if shared > 1:
            found = Passes(rows=rows, **{k: v / shared for k, v in vars(found).items() if k != "rows"})
        self._costs[known] = found
        return found

    def _sent(self, sequence: int, latent: tuple[int, ...]) -> float:
        """Bytes that a worker sends those it shares a sample with, in a forward pass of one."""
        if sequence == 1:
            return 0.0
        return tokens_sent(*self.family.attention(), sum(self.family.tokens(latent)), sequence, self._compute)

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


def _upright(latents: dict[tuple[int, ...], float]) -> dict[tuple[int, ...], float]:
    """Latents by weight, where one that lies on its side costs what it costs upright."""
    found: dict[tuple[int, ...], float] = {}
    for latent, weight in latents.items():
        key = (*latent[:-2], *sorted(latent[-2:]))
        found[key] = found.get(key, 0.0) + weight
    return found


def _of(value: float, mean: float) -> float:
    """A size's seconds in those of the mean."""
    return value / mean if mean else 1.0
