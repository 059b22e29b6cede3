"""The Train worker: builds the roles of each phase, runs the cycles, reports, checkpoints.

All resumable state is what :meth:`Worker.state` names. Everything drawn at random is a function of
seed and position, so there is no generator to save.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from raydmd.errors import RunFailed
from raydmd.methods.presets import build_method, student_routing
from raydmd.models.sizes import training_latents
from raydmd.training import checkpoint
from raydmd.training.adversary import build_adversary, make_heads
from raydmd.training.build import Building
from raydmd.training.cycle import Actors, ahead, draw, learn, train_cycle
from raydmd.training.machine import usage
from raydmd.training.plan import CyclePlan
from raydmd.training.preemption import Notices
from raydmd.training.quarantine import Ward
from raydmd.training.ranks import Ranks
from raydmd.training.sample_log import SampleLog
from raydmd.training.saving import Saver
from raydmd.training.stream import Stream
from raydmd.training.students import due, write_student
from raydmd.training.takeover import newer
from raydmd.training.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from raydmd.data.real import RealData
    from raydmd.methods.method import Method
    from raydmd.methods.phases import Phase
    from raydmd.models.base import Conditions, Denoiser, Routing
    from raydmd.models.family import Family
    from raydmd.pairs.stream import PairStream
    from raydmd.recipe import Recipe
    from raydmd.serving.client import Client
    from raydmd.training.events import EventLog
    from raydmd.training.monitor import Alarm, Measures
    from raydmd.training.pairing import Pairing
    from raydmd.training.roles import TrainedRole
    from raydmd.training.sampling import Samplers
    from raydmd.training.session import Session
    from raydmd.training.tied import Tied


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is told.

    Attributes:
        recipe: the run.
        family: the teacher's pipeline.
        conditions: encoded prompts.
        real: what a discriminator takes for real, where the method has one.
        stop_at: cycles after which this invocation stops, resumable; ``None`` runs to the end.
        stop_file: stops the run when it exists.
        pairing: noise-image pairs, where the method regresses to them.
        tied: the networks that student and fake score share with the teacher, where they do.
        taken: another run's checkpoint that this one goes on from, unless its own are newer.
        prompts: what the conditions' rows from 1 on encode, for messages.
    """

    recipe: Recipe
    family: Family
    conditions: Conditions
    real: RealData | None = None
    stop_at: int | None = None
    stop_file: Path | None = None
    pairing: Pairing | None = None
    tied: Tied | None = None
    taken: Path | None = None
    prompts: Sequence[str] = ()


class Worker:
    """One rank of a run.

    Args:
        job: what to do.
        teacher: asks the frozen teacher, here or elsewhere.
        session: ranks, reports and checkpoints.
        events: what happened, for people and for tests.
        rewards: asks the reward models, where the method adapts to them.
        samplers: draw the fake updates' samples, where the run asks for that.
        doing: is told what comes next, before anything that may take long.
    """

    def __init__(
        self,
        job: Job,
        teacher: Client,
        session: Session,
        events: EventLog,
        rewards: Client | None = None,
        samplers: Samplers | None = None,
        doing: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.recipe, self.family, self.session, self.events = job.recipe, job.family, session, events
        self.teacher, self.rewards, self.samplers = teacher, rewards, samplers
        self._doing = doing
        self._ranks = Ranks(session)
        self._saver = Saver(job.recipe, session, events)
        self._waited = 0.0  # seconds, for checkpoints, since the last cycle
        self._stop_at, self._stop_file, self._taken = job.stop_at, job.stop_file, job.taken
        self._notices = Notices(session, self._ranks)
        self._samples = SampleLog(self.recipe, session, self._saver.stamp)
        training = self.recipe.training
        self.routing: Routing = job.family.routing()
        self.method: Method = build_method(self.recipe.method, self.routing, job.family.process, job.family.prediction)
        self.plan = CyclePlan.of(training, len(self.method.phases))
        self._conditions, self._real, self._pairing = job.conditions, job.real, job.pairing
        self._tied = job.tied
        self._pairs: PairStream | None = None
        for part, wanted, given in (
            ("adapt", self.recipe.method.adapt, rewards),
            ("regression", self.recipe.method.regression, job.pairing),
        ):
            if wanted and given is None:
                raise RunFailed(f"method.{part} is on, but the worker was given nothing for it")
        self.ward = Ward(self.recipe, self._ranks, events, job.prompts, writes=session.rank == 0)
        self.watch = Watch(self.recipe, job.conditions, session)
        self.cycle = 0
        self._final = ""  # name of the last checkpoint
        self._alarm: Alarm | None = None  # one that ends the cycles: a stop or a rollback
        self.student: TrainedRole
        self.fake: TrainedRole

    def run(self) -> str:
        """Train to the end, or to a stop.

        Returns:
            ``finished`` or ``stopped``.

        Raises:
            NonFiniteError: or RunFailed, on all ranks alike; the last checkpoint stays.
        """
        self._doing("looks for a checkpoint")
        fresh = self._restore()
        if self._stop_at is not None and self._stop_at <= self.cycle < self.plan.cycles:  # it had come that far before
            self.events.write("stopped", cycle=self.cycle, alarm=None)
            return "stopped"
        while self.cycle < self.plan.cycles:
            phase = self.method.phases[self.plan.phase(self.cycle)]
            if fresh:
                self._enter(phase, {} if phase.index == 0 else self.student.denoisers)
            actors = self._actors(phase)
            if fresh:
                self._warm_up(actors)
                if self.cycle == 0 and self.recipe.monitor.action == "rollback":
                    self._save()  # something to go back to
            fresh = self._train(phase, actors)
            del actors  # or the old fake score would stay beside the next phase's
            if self._alarm is not None and self._alarm.action == "rollback":
                fresh = self._roll_back(phase, self._alarm)
            if self._stopping():
                self.events.write("stopped", cycle=self.cycle, alarm=self._alarm and self._alarm.message)
                return "stopped"
        if not self._final:
            self._save(student=True)
        self.events.write("finished", cycle=self.cycle, checkpoint=self._final)
        return "finished"

    def begin(self) -> Actors:
        """What the next cycle works with, for those who run cycles themselves, e.g. to time them; once, before all."""
        fresh = self._restore()
        phase = self.method.phases[self.plan.phase(self.cycle)]
        if fresh:
            self._enter(phase, {})
        return self._actors(phase)

    def state(self) -> dict[str, Tensor]:
        """All tensors that a resumed run needs."""
        pairs = self._pairing.tensors() if self._pairing else {}
        return {**self.student.tensors(), **self.fake.tensors(), **pairs}

    def _train(self, phase: Phase, actors: Actors) -> bool:
        """Run cycles until the phase ends, or the run must stop or go back; returns whether the phase ended."""
        training = self.recipe.training
        end, seen = self.plan.ends[phase.index], dict[str, list[float]]()
        if self.samplers:
            self.samplers.begin(end)
        while self.cycle < end:
            factor = self.plan.rate(self.cycle) * self.watch.measures.rate
            rate = self.student.set_rate(factor)
            self.fake.set_rate(factor)
            self._doing(f"cycle {self.cycle + 1}")
            metrics = train_cycle(actors, self.cycle)
            self._samples.write()
            metrics["time/checkpoint"], self._waited = self._waited, 0.0
            self.cycle += 1
            self._alarm = self._heed(self.watch.look(actors, metrics))
            if self._alarm is not None and self._alarm.action == "rollback":
                return False
            now = self.watch.monitor
            actors = replace(actors, fake_updates=now.measures.fake_updates, reference=now.reference)
            for key, value in metrics.items():
                seen.setdefault(key, []).append(value)
            if folder := due(self.recipe, self.cycle, self.watch.measures.attempt):
                write_student(self.student, folder, rank=self.session.rank, agree=self._ranks.agree, average=True)
            stop = self._stopping()
            hurry = stop
            if notice := self._notices.new():
                self.events.write("preempted", cycle=self.cycle, **asdict(notice))
                hurry = True
            save = self.cycle % self.recipe.checkpoints.every == 0 or hurry
            if self.cycle % training.report_every == 0 or save or self.cycle == end:
                means = {k: sum(v) / len(v) for k, v in seen.items()}
                row = {"cycle": self.cycle, "phase": phase.index, "student/rate": rate, **means, **self.watch.report()}
                row |= {"cycles": self.plan.cycles, "teacher/retries": self.teacher.retries}
                row |= usage(self.session.device)
                seen = {}
                if save and self.cycle < end:
                    self._save(row, wait=hurry)
                else:
                    self.session.report(row)
            if stop:
                break
        if self.cycle < end:
            return False
        self.student.settle()
        if self.cycle < self.plan.cycles:
            self._save(ended=True)
        return True

    def _heed(self, alarm: Alarm | None) -> Alarm | None:
        """Write an alarm down; returns it if it ends the cycles."""
        if alarm is None:
            return None
        self.events.write("alarm", cycle=self.cycle, signal=alarm.kind, message=alarm.message, action=alarm.action)
        return alarm if alarm.action in ("stop", "rollback") else None

    def _roll_back(self, phase: Phase, alarm: Alarm) -> bool:
        """Go on from the last checkpoint before the alarm's cause; returns whether to enter a phase anew.

        What actions have changed stays changed, and is written down at once: whoever dies now does not forget it.
        Without such a checkpoint the run stops where it is.
        """
        measures, gone = self.watch.measures, self.cycle
        before = max(gone - self.recipe.monitor.lookback, self.plan.start(phase.index))
        every = self.recipe.checkpoints.every

        def fits(cycle: int) -> bool:
            # Not one of a stop: a run that was stopped and resumed must end as if it had not been.
            return cycle <= before and (cycle % every == 0 or cycle in self.plan.ends)

        with self.session.latest(fits) as folder:
            if folder is None:
                message = f"{alarm.message} (no checkpoint of cycle {before} or earlier is kept to roll back to)"
                self._alarm = replace(alarm, action="stop", message=message)
                self.watch.monitor.stopped(alarm)
                if ended := self.cycle == self.plan.ends[phase.index]:
                    self.student.settle()
                self._save(ended=ended)
                return ended
            fresh = self._load(folder, measures)
        self._alarm = None
        self._save()
        self.events.write("rollback", cycle=self.cycle, since=gone, **asdict(measures))
        return fresh

    def _restore(self) -> bool:
        """Go on from the last checkpoint, if there is one; returns whether to enter a phase anew."""
        with self.session.latest() as own:
            folder = newer(self._taken, own)
            if folder is None:
                self._address()
                self.events.write("start", world=self.session.world)
                return True
            fresh = self._load(folder)
            if folder == own and (folder / checkpoint.STUDENT).is_dir():
                self._final = checkpoint.name_of(self.cycle, self.watch.measures.attempt) + checkpoint.FINAL
            self.events.write("resume", cycle=self.cycle, world=self.session.world)
            return fresh

    def _load(self, folder: Path, measures: Measures | None = None) -> bool:
        """Build the roles of a checkpoint's phase and fill them; returns whether to enter a phase anew."""
        self._saver.check(folder)
        progress = checkpoint.read_progress(folder)
        self.cycle = progress.cycle
        self._enter(self.method.phases[progress.phase], {})
        checkpoint.load(folder, self.state())
        self.watch.restore(progress.monitor, measures)
        self._address()
        return self.cycle >= self.plan.ends[progress.phase] and self.cycle < self.plan.cycles

    def _address(self) -> None:
        """Make the streams of samples of this attempt: after a rollback the same draws would collapse again."""
        training, m, now = self.recipe.training, self.recipe.monitor, self.watch.measures
        most = training.fake_updates
        if m.action in ("rollback", "raise_ratio"):
            for _ in range(m.limit):
                most = m.raised(most)
        updates = ["student", *(f"fake.{k}" for k in range(max(most, now.fake_updates)))]
        share, shares = self.session.share
        self.stream, self._warmup_stream = (
            Stream(
                self._conditions,
                latents=training_latents(self.family, self.recipe.data),
                seed=self.recipe.seed + salt + (now.attempt << 32),
                batch=training.batch,
                slots=slots,
                regular=regular,
                rank=share,
                world=shares,
                group=self.recipe.method.adapt.group if self.recipe.method.adapt else 1,
                device=self.session.device,
                log=self._samples,
                quarantine=self.ward.quarantine,
            )
            for salt, slots, regular in (
                (0, updates, 1 + training.fake_updates),
                (1, [f"warmup.{k}" for k in range(training.fake_warmup)], None),
            )
        )
        self._pairs = self._pairing.stream(self.recipe, self.session, now.attempt) if self._pairing else None

    def _enter(self, phase: Phase, students: dict[str, Denoiser]) -> None:
        """Make the roles of a phase: its student experts go on, its fake score starts from the teacher."""
        self._doing(f"begins phase {phase.index + 1}")
        recipe, m, training = self.recipe, self.method, self.recipe.training
        routing = student_routing(recipe.method, self.routing)
        finished = tuple(e for p in m.phases[: phase.index] for e in p.student)
        needed = tuple(dict.fromkeys((*finished, *phase.student)))
        self.watch.monitor.begin()
        self.teacher.expect(m.asks(phase, self.routing))
        self.fake = self.student = None  # type: ignore[assignment]  # their memory is needed for the next ones
        building = Building(recipe, self.family, self.session, self._tied)
        student = {e: students.get(e) or building.expert("student", e) for e in needed}
        self.student = building.role("student", student, phase.student, finished, training.student, routing)
        fake = {e: building.expert("fake", e) for e in phase.fake_experts}
        heads = make_heads(recipe.method.gan, fake, seed=recipe.seed, device=self.session.device)
        self.fake = building.role("fake", fake, phase.fake_experts, (), training.fake, self.routing, heads)

    def _actors(self, phase: Phase) -> Actors:
        return Actors(
            method=self.method,
            phase=phase,
            student=self.student,
            fake=self.fake,
            teacher=self.teacher,
            rewards=self.rewards,
            samplers=self.samplers,
            stream=self.stream,
            latent=self.family.shape().latent,
            fake_updates=self.watch.measures.fake_updates,
            reference=self.watch.monitor.reference,
            progress=self.plan.progress,
            agree=self._ranks.agree,
            mean=self._ranks.mean,
            isolate=self.ward.isolate,
            everyone=self._ranks.everyone,
            adversary=build_adversary(self.recipe.method.gan, self.fake, self.family.process, self._real),
            pairs=self._pairs,
            distance=self._pairing.distance if self._pairing else None,
        )

    def _warm_up(self, actors: Actors) -> None:
        warm = replace(actors, samplers=None, stream=self._warmup_stream, progress=lambda _: 0.0)
        self.fake.set_rate(self.watch.measures.rate)  # the plan's ramp is for the cycles
        rounds = range(self.recipe.training.fake_warmup)
        for k, drawn in enumerate(ahead(draw(warm, actors.phase.index, f"warmup.{k}") for k in rounds)):
            self._doing(f"update {k + 1} of the warm-up of phase {actors.phase.index + 1}")
            learn(warm, drawn)
        self._samples.write()

    def _save(
        self, row: dict[str, float] | None = None, *, wait: bool = True, ended: bool = False, student: bool = False
    ) -> None:
        """Write a checkpoint; ``student`` adds the weights to export."""
        self._doing(f"writes a checkpoint after cycle {self.cycle}")
        start = time.perf_counter()
        suffix = checkpoint.FINAL if student else checkpoint.PHASE if ended else ""
        name = checkpoint.name_of(self.cycle, self.watch.measures.attempt) + suffix
        progress = checkpoint.Progress(
            cycle=self.cycle,
            phase=len(self.method.phases) - 1 if student else self.plan.phase(self.cycle - 1),
            monitor=self.watch.state(),
            recipe=self.recipe.to_yaml(),
        )
        row = row or {"cycle": self.cycle, "cycles": self.plan.cycles}
        more, most = (self._export, self.student.written()) if student else (None, 0)
        self._saver.write(name, self.state(), progress, row, wait=wait, more=more, most=most)
        self._final = name if student else ""
        self._waited += time.perf_counter() - start

    def _export(self, folder: Path) -> None:
        self.student.write(folder / checkpoint.STUDENT, rank=self.session.rank)

    def _stopping(self) -> bool:
        """Whether all ranks stop after this cycle; rank 0 decides."""
        asked = self._ranks.asked(self._stop_file is not None and self.session.rank == 0 and self._stop_file.exists())
        limit = self._stop_at is not None and self.cycle >= self._stop_at
        return (asked or limit or self._alarm is not None) and self.cycle < self.plan.cycles
