"""The driver: checks a recipe, starts pool and workers, follows them, and turns what they made into results."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import platform
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import ray.train.torch
import torch

from raydmd import __version__
from raydmd.data.real import prepare as prepare_real
from raydmd.errors import DONE, DamagedCheckpoint, InputError, RunFailed, RunStopped
from raydmd.files import replace
from raydmd.models.sizes import training_latents
from raydmd.redact import hidden
from raydmd.serving.order import ANYWHERE
from raydmd.tracking.tracker import Tracker
from raydmd.training.attempts import attempts
from raydmd.training.checkpoint import cycle_of
from raydmd.training.clips import at_pool
from raydmd.training.cluster import connect, wait_briefly
from raydmd.training.encoding import encode
from raydmd.training.events import METRICS, EventLog, read_lines
from raydmd.training.folder import UNSENT, finished, same_run, trained
from raydmd.training.follow import Follower, MetricsFile
from raydmd.training.groups import Reserved
from raydmd.training.interim import Interim
from raydmd.training.lock import LeaseLost, check_held, locked
from raydmd.training.mending import check_books, fall_back, patiently
from raydmd.training.pairing import check_pairs
from raydmd.training.pools import reward_pool, sampler_pool, teacher_pool
from raydmd.training.prepare import Prepared, prepare
from raydmd.training.ranks import patience
from raydmd.training.ray_worker import WorkerConfig, train_loop
from raydmd.training.restarts import progress
from raydmd.training.retention import Retention, retain
from raydmd.training.room import grows, make_room, untrained
from raydmd.training.stopping import stop_on_signals
from raydmd.training.store import Store
from raydmd.training.tracked import hand_over, send

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from raydmd.models.family import Family
    from raydmd.recipe import Recipe
    from raydmd.serving.pool import Pool


@dataclass(frozen=True)
class Surroundings:
    """What a run is part of.

    Attributes:
        holder: of the lease that its folder is held by; empty if by none.
        tags: of its MLflow run.
        tracked: whether the tracking server was seen; it is then no reason to refuse a run that it is away.
        placed: is called once the cluster has room for it.
        tell: is called with the figures of each evaluation while it trains, and of the last one.
    """

    holder: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    tracked: bool = False
    placed: Callable[[], None] = lambda: None
    tell: Callable[[dict[str, float]], None] = lambda _: None


def run(recipe: Recipe, *, max_cycles: int | None = None) -> int:
    """Train, export and evaluate; resume if a run of this name was stopped.

    Args:
        recipe: the run.
        max_cycles: stop after this many cycles in all, resumable.

    Returns:
        The exit code, ``DONE``.

    Raises:
        InputError: before anything starts.
        RunStopped: after a checkpoint; the same command resumes, without ``max_cycles`` or with more.
        RunFailed: what was computed is kept.
    """
    prepared = prepare(recipe)
    recipe, folder = prepared.recipe, prepared.recipe.folder
    with locked(folder) as hold:
        same_run(recipe, folder)
        if finished(folder):
            if (folder / UNSENT).is_file():
                sent(folder)
            print(f"run '{recipe.name}' is finished: {folder / 'report.html'}\nGive another --name to run anew.")
            return DONE
        done = cycles_done(folder)
        if max_cycles and max_cycles <= done < recipe.training.cycles:  # evaluation is no cycle
            raise InputError(
                f"run '{recipe.name}' in {folder} has {done} cycles already; give more than that as --max-cycles, or "
                "leave it out"
            )
        print(f"run '{recipe.name}' in {folder}: {f'going on from cycle {done}' if done else 'starting'}", flush=True)
        if hold.before:
            EventLog(folder / "events.jsonl").write("lock", before=hold.before)
        stop = folder / "STOP"
        stop.unlink(missing_ok=True)
        try:
            with stop_on_signals(stop):
                connect()
            with stop_on_signals(stop):  # anew, since Ray takes SIGTERM for itself as it starts
                conduct(prepared, stop, max_cycles=max_cycles, surroundings=Surroundings(hold.token))
        finally:
            ray.shutdown()
    return DONE


def cycles_done(folder: Path) -> int:
    """Cycles after which a run's furthest checkpoint was written."""
    newest = progress(read_lines(folder / "events.jsonl"))
    return cycle_of(newest) if newest else 0


def sent(folder: Path) -> None:
    """Hand over to MLflow what a finished run owes it, and say so; a server that is away is no failure of the run."""
    try:
        send(folder)
        print(f"tracking: MLflow has all of {folder} now", flush=True)
    except RunFailed as error:
        print(f"tracking: {error}; raydmd track {folder} sends it", flush=True)


def conduct(
    prepared: Prepared, stop: Path, *, max_cycles: int | None = None, surroundings: Surroundings | None = None
) -> None:
    """The run from the room check to its report, on the cluster that this process is connected to.

    Args:
        prepared: the run, whose folder this process has locked.
        stop: a file that stops it.
        max_cycles: see :func:`run`.
        surroundings: of a run that is part of something.

    Raises:
        RunStopped: or RunFailed, as :func:`run` does.
    """
    start, around = time.monotonic(), surroundings or Surroundings()
    recipe, family, prompts = prepared.recipe, prepared.family, prepared.prompts
    folder = recipe.folder
    try:
        patiently(functools.partial(check_books, recipe), recipe)
    except DamagedCheckpoint as error:
        go_back(recipe, error)
    needed = untrained(recipe, workers=1) if trained(folder) else recipe  # all that is left is its evaluation
    log = EventLog(folder / "events.jsonl")
    make_room(needed, stop, log)
    around.placed()
    paired = None if trained(folder) else check_pairs(recipe, family)
    replace(folder / "recipe.yaml", recipe.to_yaml())
    tracker = Tracker(recipe, {**versions(), **about(recipe, family), **around.tags})
    if not around.tracked:
        tracker.connect()
    try:
        cache = (recipe.data.cache or folder / "conditions").absolute()
        conditions = encode(recipe, family, prompts, cache, stop)
        pairs = encode(recipe, family, paired, cache, stop) if paired else None
        real = prepare_real(prepared.source, recipe.model, family, cache, print) if prepared.source else None
        if stop.exists():
            raise RunStopped(f"run '{recipe.name}' stopped before it began; the same command starts it")
        largest = max(training_latents(family, recipe.data), key=math.prod)
        if grows(needed):  # what has stood idle meanwhile may have been taken away
            make_room(needed, stop, log)
        with contextlib.ExitStack() as stack:
            # A run that is trained already asks it for the evaluation alone.
            remote = recipe.placement.teacher == "remote" and (at_pool(recipe, family) or not trained(folder))
            pool = stack.enter_context(teacher_pool(recipe, family, conditions, largest)) if remote else None
            asked = pool.client_spec() if pool and at_pool(recipe, family) else None
            interim = Interim(recipe, prompts, asked, around.tell)
            # A run that was trained but not evaluated goes on from there.
            checkpoint = trained(folder)
            while checkpoint is None:
                try:
                    checkpoint = train(
                        recipe, family, pool, interim, conditions, prompts, tracker, max_cycles, around, real, pairs
                    )
                except DamagedCheckpoint as error:
                    go_back(recipe, error)
            if pool and not asked:
                pool.close()  # its place is needed
            figures, artifacts = finish(recipe, checkpoint, prompts, stop, pool if asked else None, started=start)
        hand_over(recipe, tracker, "FINISHED", figures, artifacts)
        around.tell({"cycle": float(recipe.training.cycles), **figures})
    except LeaseLost:  # its tracking is somebody else's, too
        raise
    except RunStopped:
        hand_over(recipe, tracker, "KILLED")
        raise
    except BaseException:
        hand_over(recipe, tracker, "FAILED")
        raise


def go_back(recipe: Recipe, error: DamagedCheckpoint) -> None:
    """Have a run go on from its last whole checkpoint, and say so.

    Raises:
        RunFailed: if it has none.
    """
    name = patiently(functools.partial(fall_back, recipe, str(error)), recipe)
    print(f"{hidden(str(error))}; going on from {name or 'the beginning'}; what is there stays", flush=True)


def train(
    recipe: Recipe,
    family: Family,
    pool: Pool | None,
    interim: Interim,
    conditions: Path,
    prompts: list[str],
    tracker: Tracker,
    stop_at: int | None,
    around: Surroundings,
    real: Path | None = None,
    pairs: Path | None = None,
) -> str:
    """Run the workers to the end; returns the final checkpoint's name."""
    folder, p, t = recipe.folder, recipe.placement, recipe.training
    events = folder / "events.jsonl"
    store = Store.of(folder, recipe.checkpoints.storage)
    with contextlib.ExitStack() as stack:
        asks_judges = recipe.method.adapt and p.reward == "remote"
        judges = stack.enter_context(reward_pool(recipe, family, prompts)) if asks_judges else None
        if pool or judges:
            print(f"watch     raydmd top --address {ray.get_runtime_context().gcs_address}", flush=True)
        samplers = stack.enter_context(sampler_pool(recipe, conditions)) if p.samplers else None
        config = WorkerConfig(
            recipe=recipe,
            conditions=str(conditions),
            pool=pool.client_spec() if pool else None,
            rewards=judges.client_spec() if judges else None,
            samplers=samplers.client_spec() if samplers else None,
            prompts=tuple(prompts),
            real=str(real) if real else None,
            pairs=str(pairs) if pairs else None,
            stop_at=stop_at,
            folder=str(folder),
            holder=around.holder,
            store=store,
        )
        resources = {"CPU": p.worker_cpus, **p.worker_resources} | ({"GPU": p.worker_gpus} if p.worker_gpus else {})

        wait_briefly(recipe)

        def trainer() -> ray.train.torch.TorchTrainer:
            return ray.train.torch.TorchTrainer(
                train_loop,  # type: ignore[arg-type]  # Ray Train types a config's values, not its keys
                train_loop_config={"worker": config},
                scaling_config=ray.train.ScalingConfig(  # type: ignore[call-arg]  # typed as v1
                    num_workers=(p.workers_least, p.workers) if p.workers_least else p.workers,  # type: ignore[arg-type]
                    elastic_resize_monitor_interval_s=p.resize_every,
                    use_gpu=p.worker_gpus > 0,
                    resources_per_worker=resources,
                ),
                torch_config=ray.train.torch.TorchConfig(
                    backend="nccl" if p.worker_gpus else "gloo",
                    timeout_s=int(patience(t.step_timeout).total_seconds()),
                ),
                run_config=ray.train.RunConfig(
                    name=store.experiment,
                    storage_path=store.root,
                    storage_filesystem=store.files,
                    failure_config=ray.train.FailureConfig(
                        max_failures=0,  # what follows a failure is decided by attempts
                        controller_failure_limit=0,  # type: ignore[call-arg]  # typed as v1
                    ),
                    checkpoint_config=ray.train.CheckpointConfig(num_to_keep=recipe.checkpoints_kept),
                    callbacks=[  # typed as Tune's
                        MetricsFile(folder / METRICS, EventLog(events)),  # type: ignore[list-item]
                        Retention(recipe, store),  # type: ignore[list-item]
                        Reserved(folder),  # type: ignore[list-item]
                    ],
                ),
            )

        seen = sum(1 for _ in read_lines(events))
        follower = stack.enter_context(Follower(folder, recipe, tracker))
        pools = [p for p in (pool, judges, samplers) if p]

        def meanwhile() -> None:
            interim.look()
            note(pools, events)

        attempts(recipe, trainer, pools, meanwhile)
        check_held(folder, around.holder)
        if not (folder / "STOP").exists():  # what is under way is measured when the run goes on
            interim.finish()
        retain(recipe, store)
        follower.close()
        news = list(read_lines(events))[seen:]
    return outcome(recipe, news, stop_at)


def note(pools: Sequence[Pool], events: Path) -> None:
    """Write into a run's log which replicas of its pools came to harm, and which are back."""
    for pool in pools:
        for news in pool.news():
            EventLog(events).write("replica", replica=news.replica, state=news.state, why=news.why)


def outcome(recipe: Recipe, news: list[dict[str, Any]], stop_at: int | None = None) -> str:
    """What the workers' last words mean: a final checkpoint, a stop, or a failure that no restart cures."""
    last = next((e for e in reversed(news) if e["event"] in ("finished", "stopped", "failed", "damaged")), None)
    if last is None:
        raise RunFailed(f"run '{recipe.name}' ended without a word; see {recipe.folder / 'events.jsonl'}")
    if last["event"] == "damaged":
        raise DamagedCheckpoint(last["message"])
    if last["event"] == "failed":
        raise RunFailed(f"run '{recipe.name}' failed: {last['message']}\nLog: {recipe.folder / 'events.jsonl'}")
    if last["event"] == "stopped":
        by, how = "", "the same command resumes it"
        if stop_at and last["cycle"] >= stop_at:
            by, how = " (--max-cycles)", "without it, or with more, the same command goes on"
        if last["alarm"]:
            by, how = f" by its monitor: {last['alarm']}", f"{how}, as do other settings of monitor"
        raise RunStopped(f"run '{recipe.name}' stopped after {last['cycle']} cycles with a checkpoint{by}; {how}")
    return str(last["checkpoint"])


def finish(
    recipe: Recipe, checkpoint: str, prompts: list[str], stop: Path, pool: Pool | None, *, started: float
) -> tuple[dict[str, float], list[Path]]:
    """Export and evaluate in a process of its own: in a worker's place beside the pool, or else in a teacher's."""
    from raydmd.training.finish import finish_run

    p = recipe.placement
    task = ray.remote(finish_run).options(
        num_cpus=min(p.teacher_cpus, p.worker_cpus),
        num_gpus=p.worker_gpus if pool else p.teacher_gpus or p.worker_gpus,
        max_retries=1,
        scheduling_strategy=ANYWHERE,
    )
    facts = {
        **versions(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "training": f"{time.monotonic() - started:.0f} s wall time, start included",
    }
    reference = task.remote(recipe, checkpoint, prompts, facts, pool.client_spec() if pool else None)
    print("exporting and evaluating ...", flush=True)
    figures, artifacts, table = awaited(reference, recipe, stop, pool, "the report")
    print(table)
    print(f"student   {recipe.folder / 'pipeline'}\nreport    {recipe.folder / 'report.html'}")
    return figures, [Path(a) for a in artifacts]


def awaited(reference: Any, recipe: Recipe, stop: Path, pool: Pool | None, what: str) -> Any:
    """What a task that evaluates a trained run returns.

    Raises:
        RunStopped: if the run is stopped meanwhile.
        RunFailed: if it takes longer than ``evaluation.timeout``.
    """
    deadline = time.monotonic() + recipe.evaluation.timeout
    while not ray.wait([reference], timeout=1.0)[0]:
        if pool:
            pool.loaded(enough=1)
            note([pool], recipe.folder / "events.jsonl")
        if stop.exists():
            raise RunStopped(f"run '{recipe.name}' is trained, {what} is missing; the same command makes it")
        if time.monotonic() > deadline:
            raise RunFailed(
                f"run '{recipe.name}': {what} took more than evaluation.timeout={recipe.evaluation.timeout:g} s; "
                "the trained student is kept, the same command evaluates it again"
            )
    return ray.get(reference)


def about(recipe: Recipe, family: Family) -> dict[str, str]:
    """What runs are looked for by."""
    return {
        "raydmd.method": recipe.method.name,
        "raydmd.model": str(recipe.model.path),
        "raydmd.family": family.pipeline.__name__,
    }


def versions() -> dict[str, str]:
    """What a run must name to be repeated."""
    import diffusers
    import transformers

    found = {
        "raydmd": __version__,
        "torch": torch.__version__,
        "ray": ray.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        root = Path(__file__).parent
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        found["git"] = out.stdout.strip()
    return found
