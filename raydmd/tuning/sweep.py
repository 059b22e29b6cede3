"""The driver of a sweep: checks it, opens its study, and has Ray Tune run one cluster's share of the trials."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
import uuid
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any

import ray
from ray import tune

from raydmd.errors import DONE, InputError, RunFailed, RunStopped
from raydmd.models.sizes import training_latents
from raydmd.recipe import derive
from raydmd.redact import hidden
from raydmd.tracking import RUN_ID
from raydmd.tracking.group import Group
from raydmd.tracking.model import BEST, register
from raydmd.training.clips import at_pool
from raydmd.training.cluster import connect
from raydmd.training.encoding import encode
from raydmd.training.export import PIPELINE
from raydmd.training.folder import UNSENT
from raydmd.training.lock import Held, locked
from raydmd.training.pools import teacher_pool
from raydmd.training.room import grows, living_nodes, make_room, parallel_runs
from raydmd.training.run import versions
from raydmd.training.stopping import stop_on_signals
from raydmd.training.tracked import send
from raydmd.tuning.checks import check, fitting, pinned
from raydmd.tuning.compare import PAGE, compare_page
from raydmd.tuning.halving import Halving
from raydmd.tuning.members import Members, only_here
from raydmd.tuning.repeats import merged
from raydmd.tuning.search import StudySearch
from raydmd.tuning.show import best_of, progress, table
from raydmd.tuning.spec import cluster_folder
from raydmd.tuning.storage import BEAT, storage_url
from raydmd.tuning.study import Study
from raydmd.tuning.trial import LEAVE, Common, RunTrial
from raydmd.tuning.verdict import judge, kept

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from raydmd.recipe import Recipe
    from raydmd.serving.pool import Pool
    from raydmd.training.prepare import Prepared
    from raydmd.tuning.rows import Row
    from raydmd.tuning.spec import Sweep

SAY = 30.0
"""Seconds between two lines about how it goes."""


def sweep(spec: Sweep, base: Recipe, *, cluster: str, agreed: Callable[[], object] = lambda: None) -> int:
    """Run this cluster's share of a sweep; the same command goes on with one that was stopped.

    Args:
        spec: the sweep.
        base: the recipe that its trials differ from.
        cluster: this cluster's name in the study; its commands run one at a time.
        agreed: is called once the study is known to be this sweep's.

    Returns:
        The exit code, ``DONE``.

    Raises:
        InputError: before anything starts.
        RunStopped: the trials under way were given back.
        RunFailed: if no trial of this cluster came to its end.
    """
    base = pinned(spec, base)
    folder = base.output.parent
    prepared = check(spec, base)
    here = cluster_folder(folder, cluster)
    with locked(here):
        study = Study(spec, base, storage_url(spec, folder), cluster)
        known_here(study, spec, cluster, folder)
        agreed()
        stop = here / "STOP"
        study.patience.stop = stop
        if spec.population:
            only_here(study, spec, cluster)
        if left := study.give_back():
            print(f"sweep '{spec.name}': going on with {left} trial(s) that were under way")
        if study.over() and (best := best_of(study.rows(), spec)) and not judged_here(spec, base, best):
            print(f"sweep '{spec.name}' is finished")
            print(table(study.rows(), spec))
            if verdict := kept(folder, best, spec):
                print(verdict.text(spec.objectives))
            print(f"compare   {folder / PAGE}\nbest      trial {best.root:04d}: {base.output / f'{best.root:04d}'}")
            return DONE
        print(f"sweep '{spec.name}' in {folder}: {study.taken()} of {study.budget} trials are taken", flush=True)
        stop.unlink(missing_ok=True)
        try:
            with stop_on_signals(stop), beating(study, stop):
                connect()
            with stop_on_signals(stop), beating(study, stop):
                make_room(base, stop)
                if grows(base):
                    stay_here()
            # Anew, since Ray takes SIGTERM for itself as it starts.
            with stop_on_signals(stop), beating(study, stop), shared(prepared, stop) as pool:
                group = Group.open(base, spec.name, study.attribute, versions())
                tags = {**group.tags(), "raydmd.cluster": cluster}
                if not study.over():
                    conduct(spec, prepared, study, pool, stop, folder, tags)
                    study.give_back()
                rows = study.rows()
                pages = compare_page(spec, base, rows, folder)
                group.close(merged(rows, spec.repeats), spec.objectives, pages)
                conclude(spec, study, prepared, pool, stop, tags)
        finally:
            study.give_back()
            ray.shutdown()
    return DONE


def stay_here() -> None:
    """Have the actor that asks Ray's autoscaler for Ray Train's workers on this node.

    It stays where the first of all runs creates it, which keeps that node for good: a trial may be on any.
    """
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as asking

    asking.get_or_create_autoscaling_coordinator()  # type: ignore[no-untyped-call]


def known_here(study: Study, spec: Sweep, cluster: str, folder: Path) -> None:
    """Refuse the name of a cluster that works in another folder: each would take the other's trials for its own.

    Raises:
        InputError: if that is so.
    """
    file = cluster_folder(folder, cluster) / "id"
    if not file.is_file():
        file.write_text(uuid.uuid4().hex, encoding="utf-8")  # this command holds the folder
    own = file.read_text(encoding="utf-8")
    if study.attribute(f"cluster {cluster}", lambda: own) != own:
        raise InputError(
            f"sweep {spec.name!r}: a cluster {cluster!r} takes part from another folder than {folder}, and the trials "
            "under way there would be taken for this one's; give this one a name of its own, --cluster NAME"
        )


def conclude(
    spec: Sweep, study: Study, prepared: Prepared, pool: Pool | None, stop: Path, tags: Mapping[str, str]
) -> None:
    """What follows the last trial: the table, the best student's registration, the verdict.

    Raises:
        RunStopped: if the sweep is not over, or the verdict was stopped.
        RunFailed: if no trial has come to its end.
    """
    base, rows = prepared.recipe, study.rows()
    print(table(rows, spec))
    if (page := base.output.parent / PAGE).is_file():
        print(f"compare   {page}")
    send_rest(base)
    if stop.exists() and not study.over():
        raise RunStopped(f"sweep '{spec.name}' stopped; the same command goes on with it")
    best = best_of(rows, spec)
    if best is None:
        raise RunFailed(f"sweep '{spec.name}': no trial has come to its end; the last errors are above")
    print(f"best      trial {best.root:04d}: {base.output / f'{best.root:04d}'}")
    publish(spec, base, best, prepared)
    if study.over() and judged_here(spec, base, best):
        try:
            print(judge(spec, base, best, rows, pool, stop, tags).text(spec.objectives))
            compare_page(spec, base, rows, base.output.parent)  # which says it, too
        except Held:
            print("verdict: another cluster of this sweep is at it; raydmd sweep best will show it")


def judged_here(spec: Sweep, base: Recipe, best: Row) -> bool:
    """Whether this cluster has yet to find the verdict: the best trial is in its folder."""
    here = (base.output / f"{best.root:04d}" / PIPELINE).is_dir()
    return bool(spec.verdict) and here and kept(base.output.parent, best, spec) is None


def conduct(
    spec: Sweep,
    prepared: Prepared,
    study: Study,
    pool: Pool | None,
    stop: Path,
    folder: Path,
    tags: Mapping[str, str],
) -> None:
    """Tune's part of a sweep, on the cluster that this process is connected to."""
    base = prepared.recipe
    room = max(1, parallel_runs(base, living_nodes()))
    # Where nodes come for those who ask, each trial does.
    parallel = (spec.parallel if grows(base) else min(spec.parallel, room)) or room
    print(f"{parallel} trial(s) at a time", flush=True)
    search, scheduler = searcher(spec, prepared, study, Common(base, tags, stop), stop)
    for name, value in {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # MLflow has the curves
        "RAY_AIR_NEW_OUTPUT": "0",  # the other one writes a frame about Tune whatever is asked
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed or was stopped has no figures
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    }.items():
        os.environ.setdefault(name, value)
    tuner = tune.Tuner(
        tune.with_resources(RunTrial, {"cpu": 0.01}),
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=scheduler,
            num_samples=-1,
            max_concurrent_trials=parallel,
            # One kept for the next trial would train on, and one that takes long to leave would be lost to the search.
            reuse_actors=False,
        ),
        run_config=tune.RunConfig(
            name=f"{stop.parent.name}-{int(time.time())}",
            storage_path=str(folder / "tune"),
            stop=Stops(stop, search),
            verbose=0,
        ),
    )
    done: Future[Any] = Future()

    def work() -> None:
        try:
            done.set_result(tuner.fit())
        except BaseException as error:
            done.set_exception(error)

    begun = said = time.monotonic()
    threading.Thread(target=work, name="raydmd-tune", daemon=True).start()
    while not wait([done], timeout=1.0).done:  # signals are heeded in between
        now = time.monotonic()
        if pool:
            pool.loaded(enough=1)
        if stop.exists():
            search.close("the sweep was told to stop")
        hours, gpu_hours = spec.budget.hours, spec.budget.gpu_hours
        if hours and now - begun > hours * 3600:
            search.close("its hours are over")
        if now - said > SAY:
            said = now
            print(progress(study.rows(), spec), flush=True)
            if gpu_hours and study.gpu_hours() > gpu_hours:
                search.close("its GPU hours are used")
    done.result()


def send_rest(base: Recipe) -> None:
    """Hand over what trials could not, while the tracking server was away."""
    for file in sorted(base.output.glob(f"*/{UNSENT}")):
        try:
            send(file.parent)
        except RunFailed as error:
            print(f"tracking: {error}; raydmd track {base.output.parent} tries again")
            return


def searcher(
    spec: Sweep, prepared: Prepared, study: Study, common: Common, stop: Path
) -> tuple[StudySearch | Members, Halving | None]:
    """What Tune asks for trials, and what ends them early, if anything does."""
    if spec.population:
        return Members(spec, study, common, fitting(spec, prepared), stop), None
    search = StudySearch(study, common)
    return search, Halving.of(spec, prepared.recipe, study, search) if spec.stopping else None


def publish(spec: Sweep, base: Recipe, best: Row, prepared: Prepared) -> None:
    """Put the best student into MLflow's registry; a registry that is away does not undo a sweep."""
    folder = base.output / f"{best.root:04d}"
    if base.tracking.weights == "none":
        return
    if not (folder / PIPELINE).is_dir():
        print(f"its student is where cluster {best.cluster!r} keeps its trials; that one registers it")
        return
    recipe = derive(base, best.changes)
    how = {"call": prepared.family.sampling(steps=recipe.method.steps), "absent": prepared.family.absent()}
    try:
        run_id = (folder / RUN_ID).read_text(encoding="utf-8").strip()
        version = register(str(base.tracking.uri), run_id, spec.name, folder / PIPELINE, how)
        print(f"model     models:/{spec.name}@{BEST} (version {version}) in {hidden(str(base.tracking.uri))}")
    except Exception as error:  # whatever MLflow raises, the student is in its folder
        print(f"tracking: the best student was not registered ({type(error).__name__}: {error})")


@contextlib.contextmanager
def shared(prepared: Prepared, stop: Path) -> Iterator[Pool | None]:
    """What the trials share, kept from the first to the last: encoded prompts and the teacher's pool."""
    recipe, family = prepared.recipe, prepared.family
    assert recipe.data.cache is not None
    conditions = encode(recipe, family, prepared.prompts, recipe.data.cache, stop)
    if not at_pool(recipe, family):  # no pool, or one that a trial's evaluation must see go
        yield None
        return
    largest = max(training_latents(family, recipe.data), key=math.prod)
    if grows(recipe):  # what has stood idle meanwhile may have been taken away
        make_room(recipe, stop)
    with teacher_pool(recipe, family, conditions, largest, holder=f"sweep-{recipe.output.parent.name}") as pool:
        yield pool


@contextlib.contextmanager
def beating(study: Study, stop: Path) -> Iterator[None]:
    """Signs of life as long as the block lasts, and an ear for a word to stop that comes through the study."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT):
            study.beat()
            if not stop.exists() and study.told_to_stop():
                print("stopping: somebody has told the study to", flush=True)
                stop.touch()

    thread = threading.Thread(target=beat, name="raydmd-beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=BEAT)


class Stops(tune.Stopper):
    """Ends all trials that have not ended by themselves some time after a file was there; another cluster's at once.

    Args:
        file: whose coming is waited for.
        search: knows whose a trial is.
    """

    def __init__(self, file: Path, search: StudySearch | Members) -> None:
        self._file, self._search = file, search
        self._since: float | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """See :class:`ray.tune.Stopper`."""
        del result
        return trial_id in self._search.robbed

    def stop_all(self) -> bool:
        """See :class:`ray.tune.Stopper`."""
        if not self._file.exists():
            return False
        self._since = self._since or time.monotonic()
        return time.monotonic() - self._since > LEAVE
