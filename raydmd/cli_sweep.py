"""``raydmd sweep``: run one, look at it, stop it."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
import yaml

from raydmd import recipe_io
from raydmd.cli_faults import guard
from raydmd.cli_words import PASS_ON, read_overrides
from raydmd.errors import DONE, InputError
from raydmd.models.places import in_zoo
from raydmd.recipe import Recipe, combine, derive

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from raydmd.tuning.spec import Sweep

FILE = "sweep.yaml"
"""In a sweep's folder: what it was started with."""
EPILOG = """\b
Any recipe key is a flag too, in either form; keys of the sweep have 'sweep.' before them:
  --training.cycles=100   sweep.budget.trials=40"""
OWN = "sweep."
"""Before keys of the sweep itself, among those of its recipe."""

HERE = platform.node() or "here"
_Folder = Annotated[Path, typer.Argument(metavar="SWEEP", help="A sweep's folder, e.g. runs/NAME.")]
_Json = Annotated[bool, typer.Option("--json", help="For a machine.")]
_Storage = Annotated[
    str | None,
    typer.Option(envvar="RAYDMD_STORAGE", help="Of the study, e.g. postgresql://host/db; default: SQLite."),
]
_Cluster = Annotated[str, typer.Option(help="This cluster's name in the study.")]


def sweep_commands() -> typer.Typer:
    """The commands below ``raydmd sweep``."""
    app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)
    app.command("run", epilog=EPILOG, context_settings=PASS_ON, options_metavar="FILE [FLAGS] [KEY=VALUE]...")(_run)
    app.command("status")(_status)
    app.command("best")(_best)
    app.command("front")(_front)
    app.command("stop")(_stop)
    return app


def sweep_experiment(
    *, zoo: Recipe, paper: Recipe, sweep: Mapping[str, Any], doc: str | None = None, argv: Sequence[str] | None = None
) -> NoReturn:
    """Run a script that sweeps: read its command line, resolve recipe and sweep, run it, exit.

    Args:
        zoo: the recipe that trials differ from, on a tiny model that ships with the package; used unless a model
            that is not of the zoo is named.
        paper: the same with the paper's settings, for real weights.
        sweep: the sweep, as plain values.
        doc: what ``--help`` says; pass ``__doc__``.
        argv: arguments; default: those of the process.
    """

    def run_sweep(
        ctx: typer.Context,
        model: Annotated[str | None, typer.Option(help="Zoo name, folder in diffusers' format, or hub id.")] = None,
        prompts: Annotated[Path | None, typer.Option(help="Text, JSONL, CSV, TSV, Parquet, or a dataset.")] = None,
        output: Annotated[Path | None, typer.Option(metavar="DIR", help="Sweeps are kept in here.")] = None,
        name: Annotated[str | None, typer.Option(help="Of the sweep; the same name goes on with it.")] = None,
        cluster: _Cluster = HERE,
        storage: _Storage = None,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Look at it, print it, and exit.")] = False,
    ) -> None:
        def go() -> int:
            base = zoo if model is None or in_zoo(model) else paper
            flags = {"model.path": model, "data.prompts": prompts, "output": output}
            words = [f"{k}={v}" for k, v in flags.items() if v is not None]
            own = {"name": name, "storage": storage}
            given = {**sweep, **{k: v for k, v in own.items() if v is not None}}
            return start(given, base, [*words, *read_keys(ctx.args)], cluster, dry_run=dry_run)

        raise typer.Exit(guard(go, None))

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(help=doc, epilog=EPILOG, context_settings=PASS_ON, options_metavar="[FLAGS] [KEY=VALUE]...")(run_sweep)
    app(args=None if argv is None else list(argv), prog_name=Path(sys.argv[0]).name)
    raise AssertionError("typer exits by itself")


def start(given: dict[str, Any], base: Recipe, overrides: Sequence[str], cluster: str, *, dry_run: bool) -> int:
    """Start a sweep, or go on with it.

    Args:
        given: the sweep, as plain values.
        base: the recipe that its trials differ from.
        overrides: ``key=value`` of the recipe, and of the sweep with :data:`OWN` before the key.
        cluster: this cluster's name.
        dry_run: print what would run, after it was looked at.

    Returns:
        The exit code.

    Raises:
        InputError: before anything starts.
    """
    from raydmd.training.stopping import leave_on_signals

    leave_on_signals()
    from raydmd.training.prepare import quiet
    from raydmd.tuning.spec import read_sweep  # brings torch along

    quiet()
    changes = [o.removeprefix(OWN).partition("=") for o in overrides if o.startswith(OWN)]
    for key, _, value in changes:
        tree, parts = given, key.split(".")
        for part in parts[:-1]:
            tree = tree.setdefault(part, {})
        tree[parts[-1]] = yaml.safe_load(value)
    base = combine(base, overrides=[o for o in overrides if not o.startswith(OWN)])
    spec = read_sweep(given)
    text = described(spec, base)
    if dry_run:
        from raydmd.tuning.checks import check, pinned

        check(spec, pinned(spec, base))
        typer.echo(text, nl=False)
        trials = len(spec.grid(base)) if spec.search.kind == "grid" else spec.budget.trials
        said = f"{trials} settings" + (f", {spec.repeats} runs each" if spec.repeats > 1 else "")
        typer.echo(f"ok: {said}; nothing was started", err=True)
        return DONE
    from raydmd.training.cluster import lasting
    from raydmd.tuning.sweep import sweep

    file = lasting(base.output) / spec.name / FILE
    return sweep(spec, base, cluster=cluster, agreed=lambda: file.write_text(text, encoding="utf-8"))


def read_keys(words: Sequence[str]) -> list[str]:
    """Keys of the recipe, in either form, and of the sweep.

    Raises:
        InputError: as :func:`raydmd.cli_words.read_overrides` does.
    """
    plain = [w.removeprefix("--") if w.startswith(f"--{OWN}") else w for w in words]
    own = [w for w in plain if w.startswith(OWN)]
    if wrong := [w for w in own if "=" not in w]:
        raise InputError(f"{wrong[0]} needs a value: {wrong[0]}=VALUE")
    return [*read_overrides([w for w in plain if not w.startswith(OWN)])[0], *own]


def described(spec: Sweep, base: Recipe) -> str:
    """A sweep and its recipe as the YAML file that starts it again; a password in the storage's address stays out."""
    sweep = spec.model_dump(mode="json")
    if "@" in (spec.storage or ""):
        sweep["storage"] = None
    recipe = base.model_dump(mode="json")
    return yaml.safe_dump({**sweep, "recipe": recipe}, sort_keys=False)


def read(file: Path) -> tuple[dict[str, Any], Recipe]:
    """A sweep's file: its own values and its recipe.

    Raises:
        InputError: if it can't be read, or the recipe is refused.
    """
    try:
        tree = recipe_io.read_yaml(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"sweep file {file}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"sweep file {file} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise InputError(f"sweep file {file} holds no mapping of keys to values")
    changes = tree.pop("recipe", {})
    try:
        return tree, derive(Recipe(), changes)
    except InputError as error:
        raise InputError(f"sweep file {file}, recipe: {error}") from None


def _run(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A YAML sweep, with its recipe's changes.")],
    cluster: _Cluster = HERE,
    storage: _Storage = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Look at it, print it, and exit.")] = False,
) -> None:
    """Run this cluster's share of a sweep; the same command goes on with it, other clusters' join it."""

    def go() -> int:
        given, base = read(file)
        if storage:
            given["storage"] = storage
        return start(given, base, read_keys(ctx.args), cluster, dry_run=dry_run)

    raise typer.Exit(guard(go, None))


def _study(folder: Path, storage: str | None) -> tuple[Sweep, str]:
    from raydmd.tuning.spec import read_sweep
    from raydmd.tuning.storage import storage_url

    folder = folder.parent if folder.name == FILE else folder
    if not (folder / FILE).is_file():
        raise InputError(f"{folder} is no sweep's folder: it has no {FILE}")
    given, _ = read(folder / FILE)
    if storage:
        given["storage"] = storage
    spec = read_sweep(given)
    return spec, storage_url(spec, folder.absolute())


def _show(folder: Path, storage: str | None, as_json: bool, which: str) -> None:
    from raydmd.tuning import show
    from raydmd.tuning.repeats import merged
    from raydmd.tuning.study import rows_of
    from raydmd.tuning.verdict import kept

    def tell() -> None:
        spec, url = _study(folder, storage)
        rows = rows_of(spec, url)
        best = show.best_of(rows, spec)
        chosen = {
            "status": rows,
            "best": [best] if best else [],
            "front": show.front(merged(rows, spec.repeats), spec.objectives),
        }[which]
        if as_json:
            typer.echo(json.dumps(show.as_json(rows, spec, only=chosen), indent=1))
            return
        if which == "status":
            typer.echo(show.progress(rows, spec))
            typer.echo(show.table(rows, spec))
        elif not chosen:
            typer.echo("no trial has come to its end yet")
        else:
            typer.echo(show.table(rows, spec, only=chosen))
            if best and which == "best" and (verdict := kept(folder, best, spec)):
                typer.echo(verdict.text(spec.objectives))
            for row in chosen[:1] if which == "best" else chosen:
                typer.echo(f"trial {row.root:04d}   {folder / 'trials' / f'{row.root:04d}'}")
                if stretches := show.scheduled(rows, row):
                    typer.echo(stretches)

    guard(tell, None)


def _status(folder: _Folder, storage: _Storage = None, as_json: _Json = False) -> None:
    """All trials, the best first."""
    _show(folder, storage, as_json, "status")


def _best(folder: _Folder, storage: _Storage = None, as_json: _Json = False) -> None:
    """The best trial by the first objective."""
    _show(folder, storage, as_json, "best")


def _front(folder: _Folder, storage: _Storage = None, as_json: _Json = False) -> None:
    """The trials that no other one beats in every objective."""
    _show(folder, storage, as_json, "front")


def _stop(
    folder: _Folder,
    storage: _Storage = None,
    cluster: Annotated[str | None, typer.Option(help="One alone; default: all.")] = None,
) -> None:
    """Stop a sweep's commands, wherever they run; trials under way are kept, and the same commands go on with them."""

    def stop() -> None:
        from raydmd.tuning.spec import cluster_folder
        from raydmd.tuning.study import tell_to_stop

        folders = [cluster_folder(folder, cluster)] if cluster else sorted((folder / "clusters").glob("*"))
        tell_to_stop(*_study(folder, storage), cluster)
        for f in folders:
            if f.is_dir():
                (f / "STOP").touch()  # those who see this folder need not wait for their next look at the study
        typer.echo(f"told {cluster or 'all clusters'}")

    guard(stop, None)
