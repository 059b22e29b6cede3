"""The function that Ray Train runs on every worker, and the session it gives the loop."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import ray
import ray.train
import ray.train.torch
import torch
from pyarrow import fs as arrow
from ray.train import Checkpoint, CheckpointUploadMode

from raydmd.data.real import load_real
from raydmd.errors import DamagedCheckpoint, NonFiniteError, RunFailed
from raydmd.models import load_family, load_teacher
from raydmd.models.base import Conditions, Denoiser
from raydmd.models.tokens import TokenGroup
from raydmd.rewards.engine import load_reward_engine
from raydmd.serving.engine import TeacherEngine
from raydmd.serving.local import LocalClient
from raydmd.serving.pool_client import PoolClient
from raydmd.serving.router import seat
from raydmd.training.checkpoint import cycle_of
from raydmd.training.events import EventLog
from raydmd.training.failures import SHORT
from raydmd.training.lock import LeaseLost, check_held
from raydmd.training.machine import out_of_memory, peaks
from raydmd.training.manifest import damage
from raydmd.training.mending import own
from raydmd.training.pairing import open_pairs
from raydmd.training.preemption import Notice
from raydmd.training.ranks import Ranks, patience
from raydmd.training.sampling import Samplers
from raydmd.training.session import Session
from raydmd.training.shared import SharedClient
from raydmd.training.store import SEEN_WITHIN, Store, check_space
from raydmd.training.takeover import TAKEN, pending, since, taken
from raydmd.training.tied import Tied
from raydmd.training.watchdog import Watchdog
from raydmd.training.worker import Job, Worker

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from raydmd.recipe import Recipe
    from raydmd.serving.client import Client
    from raydmd.serving.order import ClientSpec
    from raydmd.training.checkpoint import Writing
    from raydmd.training.session import Fits

Connect = Callable[["ClientSpec"], PoolClient]
"""Makes this rank's client of a pool."""
AGAIN = "asked_again"
"""Kind of event that a worker writes when it asks a pool once more after a failure or a silence."""
COMMIT = 10.0
"""Seconds within which Ray Train books a checkpoint whose files are there on all ranks."""
SYNC, ASYNC = CheckpointUploadMode.SYNC, CheckpointUploadMode.ASYNC


class RaySession(Session):
    """A worker of Ray Train.

    Args:
        timeout: seconds to wait for a checkpoint, and for Ray Train's list of them; a step's.
        sequence: neighbouring ranks that share each sample.
        store: of the run's checkpoints.
        folder: of the run.
        held: raises if that is no longer this group's.
    """

    def __init__(self, timeout: float, *, sequence: int, store: Store, folder: Path, held: Callable[[], None]) -> None:
        self._timeout, self._store, self._folder, self._held = timeout, store, folder, held
        self._writing: tuple[str, threading.Event] | None = None
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.tokens = TokenGroup(sequence, self.device, patience(timeout)) if sequence > 1 else None

    def begin(self, name: str, size: int) -> Path:
        """See :class:`~raydmd.training.session.Session`."""
        if self._writing and not self._writing[1].wait(self._timeout):
            raise RuntimeError(
                f"checkpoint {self._writing[0]} was not written within training.step_timeout={self._timeout:g} s"
            )
        if not self._store.local:
            # Each node holds the files of its own ranks until they are sent.
            here = ray.train.get_context().get_local_world_size()
            # Of one name, so that what a worker has left that was killed goes with the next one.
            folder = Path(tempfile.gettempdir()) / f"raydmd-{Path(self._store.root).name}-rank{self.rank}"
            shutil.rmtree(folder, ignore_errors=True)
            check_space(name, size * here // self.world, Path(tempfile.gettempdir()))
            folder.mkdir()
            return folder
        folder = Path(self._store.path(name))
        if self.rank == 0:  # whoever died over it may have left files; Ray Train would have gone on from a whole one
            shutil.rmtree(folder, ignore_errors=True)
            check_space(name, size, folder)
            folder.mkdir(parents=True)
        return folder

    def report(self, metrics: Mapping[str, float], writing: Writing | None = None, *, background: bool = False) -> None:
        """See :class:`~raydmd.training.session.Session`."""
        if writing is None:
            # Ray Train takes reports in their order: one after a checkpoint that is under way would wait for it.
            later = self._writing is not None and not self._writing[1].is_set()
            ray.train.report(dict(metrics), checkpoint_upload_mode=ASYNC if later else SYNC)
            return
        there, failed = threading.Event(), list[str]()
        self._writing = writing.name, there

        def send(_: Checkpoint, name: str) -> Checkpoint:
            if failed:  # Ray asks once more after some of S3's errors; by now the folder may be the next checkpoint's
                raise RuntimeError(f"checkpoint {name} could not be written: {failed[0].replace('AWS Error ', '')}")
            try:
                writing.complete()
                if not self._store.local:
                    self._store.send(writing.folder, name)
                    shutil.rmtree(writing.folder, ignore_errors=True)
                writing.done()
            except Exception as error:
                failed.append(f"{type(error).__name__}: {error}")
                raise
            finally:
                there.set()
            return Checkpoint(self._store.path(name), self._store.files)

        ray.train.report(
            dict(metrics),
            checkpoint=Checkpoint.from_directory(writing.folder),
            checkpoint_dir_name=writing.name,
            checkpoint_upload_mode=ASYNC if background else SYNC,
            checkpoint_upload_fn=send,
            delete_local_checkpoint_after_upload=False,  # it may lie where it stays
        )

    @contextlib.contextmanager
    def latest(self, fits: Fits | None = None) -> Iterator[Path | None]:
        """See :class:`~raydmd.training.session.Session`."""
        handle = ray.train.get_checkpoint() if fits is None else self._fitting(fits)
        if handle is None:
            yield None
            return
        with handle.as_directory() as folder:
            try:
                yield Path(folder)
            except DamagedCheckpoint as error:  # a copy from object storage has a name of its own
                text = str(error).replace(Path(folder).name, Path(handle.path).name)
                raise DamagedCheckpoint(text) from None

    def held(self) -> None:
        """See :class:`~raydmd.training.session.Session`."""
        self._held()

    def flush(self) -> None:
        """Wait for the checkpoint under way, before an error ends this group: the next one goes on from it."""
        if self._writing is not None:
            with contextlib.suppress(Exception):  # the error that is on its way says more
                # Where the files are there, what lacks is Ray Train's word, for which all ranks' reports are needed.
                self._reported(min(COMMIT, self._timeout) if self._writing[1].is_set() else self._timeout)

    def notice(self) -> Notice | None:
        """See :class:`~raydmd.training.session.Session`."""
        info = ray.train.get_preemption_info()
        if info is None:
            return None
        deadline = None if info.deadline_ms is None else info.deadline_ms / 1000
        return Notice(tuple(info.preempted_node_ids), tuple(info.preempted_ranks), deadline)

    def _fitting(self, fits: Fits) -> Checkpoint | None:
        begun = since(self._folder)
        kept = [
            c for c in self._reported() if cycle_of(Path(c.path).name) > begun and fits(cycle_of(Path(c.path).name))
        ]
        found = max(kept, key=lambda c: Path(c.path).name, default=None)
        if found is None and self.rank == 0:  # those from before a fall back, of which Ray Train knows nothing
            found = self._older(fits)
        # By rank 0's word: another may have given up waiting for the last report.
        path, local = json.loads(
            Ranks(self).everyone(json.dumps(["", False] if found is None else [found.path, _local(found)]))[0]
        )
        return Checkpoint(path, arrow.LocalFileSystem() if local else self._store.files) if path else None

    def _older(self, fits: Fits) -> Checkpoint | None:
        took = taken(self._folder)
        if took is not None and fits(cycle_of(took.name)) and not damage(took):
            return Checkpoint(str(took), arrow.LocalFileSystem())
        for name, place in sorted(own(self._folder, self._store), reverse=True):
            if place != self._store.experiment and fits(cycle_of(name)):
                with self._store.at(name, place) as files:
                    if not damage(files):
                        return Checkpoint(self._store.path(name, place), self._store.files)
        return None

    def _reported(self, timeout: float | None = None) -> list[Checkpoint]:
        # Waits for the reports under way, so that all ranks see the same list.
        committed, timeout = ray.train.CheckpointConsistencyMode.COMMITTED, timeout or self._timeout
        reported = ray.train.get_all_reported_checkpoints(consistency_mode=committed, timeout_s=timeout)
        return [r.checkpoint for r in reported]


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """What crosses from the driver to every worker.

    Attributes:
        recipe: the run.
        conditions: the file of encoded prompts.
        pool: how to reach the teacher; ``None`` loads one here.
        rewards: how to reach the reward models; ``None`` loads them here, if the method asks any.
        samplers: how to reach the samplers, if the run has any.
        prompts: the training prompts.
        real: the file of real samples, where the method has a GAN.
        pairs: the file of the pairs' encoded prompts, if the method has pairs.
        stop_at: see :class:`~raydmd.training.worker.Job`.
        folder: of the run.
        holder: whose lease the folder is held by, see :mod:`raydmd.training.lock`; empty if by nobody's.
        store: of its checkpoints.
    """

    recipe: Recipe
    conditions: str
    pool: ClientSpec | None
    rewards: ClientSpec | None
    samplers: ClientSpec | None
    prompts: tuple[str, ...]
    real: str | None
    pairs: str | None
    stop_at: int | None
    folder: str
    store: Store
    holder: str = ""


class LoopConfig(TypedDict):
    """Ray Train passes a dict; ours has one typed entry."""

    worker: WorkerConfig


def _local(found: Checkpoint) -> bool:
    return isinstance(found.filesystem, arrow.LocalFileSystem)


def prepare_process(*, threads: int, deterministic: bool) -> None:
    """Settings of this process that decide the last bits of a result."""
    torch.set_num_threads(threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def train_loop(config: LoopConfig) -> None:
    """Run one worker to the end.

    A failure that a restart cannot cure is written down and ends the worker in peace, so that Ray Train
    does not repeat it; any other exception goes to Ray Train, which restarts the group.
    """
    c = config["worker"]
    prepare_process(threads=c.recipe.placement.threads, deterministic=c.recipe.deterministic)
    folder = Path(c.folder)
    held = functools.partial(check_held, folder, c.holder)
    sequence = c.recipe.placement.sequence
    session = RaySession(c.recipe.training.step_timeout, sequence=sequence, store=c.store, folder=folder, held=held)
    events = EventLog(folder / "events.jsonl", enabled=session.rank == 0)
    watchdog = Watchdog(
        folder,
        rank=session.rank,
        world=session.world,
        seconds=c.recipe.training.stall_timeout,
        node=ray.get_runtime_context().get_node_id(),
    )

    def doing(what: str) -> None:
        held()
        watchdog.doing(what)

    try:
        doing("loads the model")
        family = load_family(c.recipe.model)
        tied = Tied(c.recipe, family, session.device, session.tokens) if c.recipe.placement.teacher == "tied" else None
        job = Job(
            recipe=c.recipe,
            family=family,
            conditions=Conditions.read(Path(c.conditions)).padded(c.recipe.placement.sequence),
            real=load_real(Path(c.real)) if c.real else None,
            stop_at=c.stop_at,
            stop_file=folder / "STOP",
            pairing=open_pairs(c.recipe, family, Path(c.pairs), session.device) if c.pairs else None,
            tied=tied,
            taken=begins_from(session, folder),
            prompts=c.prompts,
        )

        def connect(spec: ClientSpec) -> PoolClient:
            said = EventLog(folder / "events.jsonl")  # whatever rank this is

            def again(request: str, why: str) -> None:
                said.write(AGAIN, rank=session.rank, request=request, why=why)

            name, own = f"{spec.holder}/rank{session.rank}", seat(spec.holder, session.share[0])
            return PoolClient(spec, name, waits=watchdog.waits, again=again, seat=own)

        teacher, rewards = clients(c, job, session, connect)
        drawers = samplers(c, session, connect)
        Worker(job, teacher, session, events, rewards, drawers, doing).run()
    except LeaseLost as error:  # not another word in a folder that is somebody else's
        print(error, flush=True)
    except DamagedCheckpoint as error:
        events.write("damaged", message=str(error))
    except (NonFiniteError, RunFailed) as error:  # raised by all ranks alike
        events.write("failed", error=type(error).__name__, message=str(error), trace=traceback.format_exc())
    except BaseException as error:
        if out_of_memory(error):  # whatever rank this is
            what = str(error).strip().partition("\n")[0]
            said = f"{watchdog.post.line()}: too little memory: {what}; {peaks(session.device)}"
            EventLog(folder / "events.jsonl").write(SHORT, rank=session.rank, message=said)
        session.flush()
        watchdog.close(keep=True)
        raise
    watchdog.close()


def begins_from(session: Session, folder: Path) -> Path | None:
    """What the run has taken over and goes on from, by all ranks' word.

    A file server may show one node what another has written there a while later, and ranks that go on from different
    checkpoints would not notice.

    Raises:
        RuntimeError: on all ranks, if they see different ones for too long.
    """
    ranks = Ranks(session)
    for _ in range(SEEN_WITHIN):
        found = pending(folder)
        said = ranks.everyone("" if found is None else found.name)
        if len(set(said)) == 1:
            return found
        time.sleep(1)
    seen = ", ".join(f"rank {rank}: {name or 'nothing'}" for rank, name in enumerate(said))
    raise RuntimeError(f"ranks see different checkpoints in {folder / TAKEN} for {SEEN_WITHIN} s: {seen}")


def clients(c: WorkerConfig, job: Job, session: Session, connect: Connect) -> tuple[Client, Client | None]:
    """Teacher and rewards; an error of one rank, which may be alone in asking them, is raised by all."""
    made: tuple[Client, Client | None] | None = None
    error: Exception | None = None
    try:
        made = teacher_client(c, job, session, connect), reward_client(c, session, connect)
    except Exception as e:
        error = e
    Ranks(session).agree(error)
    assert made is not None
    return made


def teacher_client(c: WorkerConfig, job: Job, session: Session, connect: Connect) -> Client:
    """The frozen teacher: a client of the pool, what the roles here are adapters of, or a copy in this process."""
    if c.pool is not None:
        return for_group(functools.partial(connect, c.pool), session)
    if job.tied is not None:
        return LocalClient(TeacherEngine(job.tied.teacher(), job.conditions), name="tied", alone=False)
    experts = load_teacher(job.family, c.recipe.training.precision, device=session.device)
    for module in experts.modules.values():
        if session.tokens and isinstance(module, Denoiser):
            session.tokens.share(module)
    return LocalClient(TeacherEngine(experts, job.conditions), alone=session.tokens is None)


def samplers(c: WorkerConfig, session: Session, connect: Connect) -> Samplers | None:
    """What draws the fake updates' samples elsewhere, where the run asks for that."""
    if c.samplers is None:
        return None
    return Samplers(connect(c.samplers), Path(c.folder), every=c.recipe.placement.sampler_lag, rank=session.rank)


def reward_client(c: WorkerConfig, session: Session, connect: Connect) -> Client | None:
    """The reward models, where the method asks any: a client of their pool, or copies in this process."""
    if c.recipe.method.adapt is None:
        return None
    if c.rewards is not None:
        return for_group(functools.partial(connect, c.rewards), session)

    def load() -> Client:
        return LocalClient(load_reward_engine(c.recipe, c.prompts, session.device.type), name="local rewards")

    return for_group(load, session)


def for_group(make: Callable[[], Client], session: Session) -> Client:
    """A client of this rank; of ranks that share their samples the first one alone makes it, and tells the others."""
    if session.tokens is None:
        return make()
    return SharedClient(make() if session.tokens.leads else None, session.tokens)
