"""The function that Ray Train runs on every worker, and the session it gives the loop."""

from __future__ import annotations

import contextlib
import functools
import os
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint

from raydmd.data.real import load_real
from raydmd.errors import DamagedCheckpoint, NonFiniteError, RunFailed
from raydmd.models import load_family, load_teacher
from raydmd.models.base import Conditions, Denoiser
from raydmd.models.tokens import TokenGroup
from raydmd.rewards.engine import load_reward_engine
from raydmd.serving.engine import TeacherEngine
from raydmd.serving.local import LocalClient
from raydmd.serving.pool_client import PoolClient
from raydmd.training.checkpoint import cycle_of
from raydmd.training.events import EventLog
from raydmd.training.pairing import open_pairs
from raydmd.training.ranks import Ranks
from raydmd.training.sampling import Samplers
from raydmd.training.session import Session
from raydmd.training.shared import SharedClient
from raydmd.training.takeover import taken
from raydmd.training.tied import Tied
from raydmd.training.watchdog import Watchdog
from raydmd.training.worker import Job, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from raydmd.recipe import Recipe
    from raydmd.serving.client import Client
    from raydmd.serving.order import ClientSpec
    from raydmd.training.session import Fits


COLLECTIVE = 180
"""Seconds that a collective waits longer than a step, so that a late teacher is told before a late rank."""


class RaySession(Session):
    """A worker of Ray Train.

    Args:
        timeout: seconds to wait for Ray Train's list of checkpoints; a step's.
        sequence: neighbouring ranks that share each sample.
    """

    def __init__(self, timeout: float, *, sequence: int) -> None:
        self._timeout = timeout
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        patience = timedelta(seconds=timeout + COLLECTIVE)
        self.tokens = TokenGroup(sequence, self.device, patience) if sequence > 1 else None

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None = None, name: str | None = None) -> None:
        """See :class:`~raydmd.training.session.Session`."""
        handle = Checkpoint.from_directory(checkpoint) if checkpoint else None
        ray.train.report(dict(metrics), checkpoint=handle, checkpoint_dir_name=name)

    @contextlib.contextmanager
    def latest(self, fits: Fits | None = None) -> Iterator[Path | None]:
        """See :class:`~raydmd.training.session.Session`."""
        handle = ray.train.get_checkpoint() if fits is None else self._kept(fits)
        if handle is None:
            yield None
            return
        with handle.as_directory() as folder:
            yield Path(folder)

    def _kept(self, fits: Fits) -> Checkpoint | None:
        # Waits for the reports under way, so that all ranks see the same list.
        reported = ray.train.get_all_reported_checkpoints(
            consistency_mode=ray.train.CheckpointConsistencyMode.COMMITTED, timeout_s=self._timeout
        )
        kept = (r.checkpoint for r in reported if fits(cycle_of(Path(r.checkpoint.path).name)))
        return max(kept, key=lambda c: Path(c.path).name, default=None)


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """What crosses from the driver to every worker.

    Attributes:
        recipe: the run.
        conditions: the file of encoded prompts.
        pool: how to reach the teacher; ``None`` loads one here.
        rewards: how to reach the reward models; ``None`` loads them here, if the method asks any.
        samplers: how to reach the samplers, if the run has any.
        prompts: the training prompts, for rewards that are loaded here.
        real: the file of real samples, where the method has a GAN.
        pairs: the file of the pairs' encoded prompts, if the method has pairs.
        stop_at: see :class:`~raydmd.training.worker.Job`.
        folder: of the run.
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


class LoopConfig(TypedDict):
    """Ray Train passes a dict; ours has one typed entry."""

    worker: WorkerConfig


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
    session = RaySession(c.recipe.training.step_timeout, sequence=c.recipe.placement.sequence)
    folder = Path(c.folder)
    events = EventLog(folder / "events.jsonl", enabled=session.rank == 0)
    watchdog = Watchdog(folder, rank=session.rank, world=session.world, seconds=c.recipe.training.stall_timeout)
    watchdog.tell(EventLog(folder / "events.jsonl"))  # of any rank
    watchdog.doing("loads the model")
    try:
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
            taken=taken(folder),
        )
        teacher, rewards = clients(c, job, session)
        Worker(job, teacher, session, events, rewards, samplers(c, session), watchdog.doing).run()
    except DamagedCheckpoint as error:
        events.write("damaged", message=str(error))
    except (NonFiniteError, RunFailed) as error:  # raised by all ranks alike
        events.write("failed", error=type(error).__name__, message=str(error), trace=traceback.format_exc())
    finally:
        watchdog.close()


def clients(c: WorkerConfig, job: Job, session: Session) -> tuple[Client, Client | None]:
    """Teacher and rewards; an error of one rank, which may be alone in asking them, is raised by all."""
    made: tuple[Client, Client | None] | None = None
    error: Exception | None = None
    try:
        made = teacher_client(c, job, session), reward_client(c, session)
    except Exception as e:
        error = e
    Ranks(session).agree(error)
    assert made is not None
    return made


def teacher_client(c: WorkerConfig, job: Job, session: Session) -> Client:
    """The frozen teacher: a client of the pool, what the roles here are adapters of, or a copy in this process."""
    if c.pool is not None:
        return for_group(functools.partial(PoolClient, c.pool, f"{c.pool.holder}/rank{session.rank}"), session)
    if job.tied is not None:
        return LocalClient(TeacherEngine(job.tied.teacher(), job.conditions), name="tied", alone=False)
    experts = load_teacher(job.family, c.recipe.training.precision, device=session.device)
    for module in experts.modules.values():
        if session.tokens and isinstance(module, Denoiser):
            session.tokens.share(module)
    return LocalClient(TeacherEngine(experts, job.conditions), alone=session.tokens is None)


def samplers(c: WorkerConfig, session: Session) -> Samplers | None:
    """What draws the fake updates' samples elsewhere, where the run asks for that."""
    if c.samplers is None:
        return None
    client = PoolClient(c.samplers, f"{c.samplers.holder}/rank{session.rank}")
    return Samplers(client, Path(c.folder), every=c.recipe.placement.sampler_lag, rank=session.rank)


def reward_client(c: WorkerConfig, session: Session) -> Client | None:
    """The reward models, where the method asks any: a client of their pool, or copies in this process."""
    if c.recipe.method.adapt is None:
        return None
    if c.rewards is not None:
        return for_group(functools.partial(PoolClient, c.rewards, f"{c.rewards.holder}/rank{session.rank}"), session)

    def load() -> Client:
        return LocalClient(load_reward_engine(c.recipe, c.prompts, session.device.type), name="local rewards")

    return for_group(load, session)


def for_group(make: Callable[[], Client], session: Session) -> Client:
    """A client of this rank; of ranks that share their samples the first one alone makes it, and tells the others."""
    if session.tokens is None:
        return make()
    return SharedClient(make() if session.tokens.leads else None, session.tokens)
