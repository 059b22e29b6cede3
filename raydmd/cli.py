"""The command line: ``raydmd``, and the front that all scripts in ``experiments/`` share.

Importing this module brings in no Ray, diffusers or MLflow, so that ``--help``, ``--dry-run`` and
refused input answer at once. What runs is :func:`raydmd.training.run.run`, imported when needed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from pydantic_core import to_jsonable_python

import raydmd
from raydmd import recipe_io
from raydmd.cli_compare import compare
from raydmd.cli_doctor import doctor
from raydmd.cli_faults import guard
from raydmd.cli_plan import plan, told_after
from raydmd.cli_sweep import sweep_commands
from raydmd.cli_words import FLAGS, PASS_ON, read_overrides
from raydmd.errors import DONE, InputError
from raydmd.models.places import in_zoo
from raydmd.recipe import FREE, Recipe, combine
from raydmd.redact import hidden

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


EPILOG = """\b
Any recipe key is a flag too, in either form; 'raydmd recipe' lists them:
  --training.student.rate 1e-5    training.student.rate=1e-5
What wins: flags and keys, then the recipe file, then the defaults.

\b
Exit codes:
  0  done
  1  failed; what was computed is kept
  2  bad input, nothing was started
  3  stopped; the same command with the same name resumes
RAYDMD_DEBUG=1 shows tracebacks."""


def experiment(
    *,
    zoo: Recipe,
    paper: Recipe,
    doc: str | None = None,
    pairs: tuple[int, int] | None = None,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Run an experiment script: read its command line, resolve its recipe, run it, exit.

    Args:
        zoo: the parent recipe on a tiny model that ships with the package; used unless a model that
            is not of the zoo is named by flag, key or recipe file.
        paper: the parent recipe with the paper's settings, for real weights.
        doc: what ``--help`` says; pass ``__doc__``.
        pairs: how many noise-image pairs the script makes where there are none, with a zoo model and without.
        argv: arguments; default: those of the process.
    """

    def parent(model: str | None) -> Recipe:
        return zoo if model is None or model == zoo.model.path or in_zoo(model) else paper

    app = _app()
    script = Path(sys.argv[0]).name
    app.command(help=doc, epilog=EPILOG, context_settings=PASS_ON, options_metavar=USAGE)(
        _front(parent, takes_file=False, pairs=pairs)
    )
    app(args=None if argv is None else list(argv), prog_name=script)
    raise AssertionError("typer exits by itself")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The ``raydmd`` command.

    Args:
        argv: arguments; default: those of the process.
    """
    app = _app()
    app.callback(epilog=EPILOG)(_root)
    app.command("run", epilog=EPILOG, context_settings=PASS_ON, options_metavar=f"FILE {USAGE}")(
        _front(lambda _: Recipe(), takes_file=True)
    )
    app.command("pairs", epilog=EPILOG, context_settings=PASS_ON, options_metavar=f"FILE --count N {USAGE}")(
        _make_pairs
    )
    app.command("sample")(_sample)
    app.add_typer(sweep_commands(), name="sweep", help="Search over recipes.")
    app.command("compare")(compare)
    app.command("plan", context_settings=PASS_ON, options_metavar=f"FILE [--cluster NAME] {USAGE}")(plan)
    app.command("track")(_track)
    app.command("top")(_top)
    app.command("doctor", context_settings=PASS_ON, options_metavar="[FLAGS] [RECIPE] [KEY=VALUE]...")(doctor)
    app.command("recipe", context_settings=PASS_ON, options_metavar="[--file FILE] [KEY=VALUE]...")(_print_recipe)
    app(args=None if argv is None else list(argv), prog_name="raydmd")
    raise AssertionError("typer exits by itself")


USAGE = "[FLAGS] [KEY=VALUE]..."
_Model = Annotated[
    str | None,
    typer.Option(help="Zoo name, folder in diffusers' format, or hub id.", show_default=False),
]
_Prompts = Annotated[
    str | None, typer.Option(metavar="FILE", help="Text, JSONL, CSV, TSV, Parquet, or a dataset.", show_default=False)
]
_Name = Annotated[str | None, typer.Option(help="Of the run; the same name resumes it.")]
_Output = Annotated[Path | None, typer.Option(metavar="DIR", help="Runs are kept in here.")]
_Workers = Annotated[int | None, typer.Option(help="Training workers.")]
_Teachers = Annotated[int | None, typer.Option(help="Teacher replicas.")]
_MaxCycles = Annotated[
    int | None,
    typer.Option(min=1, help="Stop, resumably, once the run has this many cycles in all."),
]
_Seed = Annotated[int | None, typer.Option(help="Of every random draw.")]
_Deterministic = Annotated[
    bool | None,
    typer.Option("--deterministic/--no-deterministic", help="Bit-identical repeats, slower."),
]
_RecipeFile = Annotated[
    Path | None,
    typer.Option("--recipe", metavar="FILE", help="A YAML file of recipe keys that differ."),
]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and exit.")]


def _front(
    parent: Callable[[str | None], Recipe], *, takes_file: bool, pairs: tuple[int, int] | None = None
) -> Callable[..., None]:
    """The command that all runs share; ``parent`` picks by model the recipe to differ from."""

    def run_recipe(
        ctx: typer.Context,
        model: _Model = None,
        prompts: _Prompts = None,
        name: _Name = None,
        output: _Output = None,
        workers: _Workers = None,
        teachers: _Teachers = None,
        max_cycles: _MaxCycles = None,
        seed: _Seed = None,
        deterministic: _Deterministic = None,
        recipe: _RecipeFile = None,
        dry_run: _DryRun = False,
    ) -> None:
        """Run a recipe file."""
        given = (model, prompts, name, output, workers, teachers, seed, deterministic)
        flags = [f"{k}={v}" for k, v in zip(FLAGS.values(), given, strict=True) if v is not None]

        def resolve() -> Recipe:
            keys, files = read_overrides(ctx.args, files=1 if takes_file and recipe is None else 0)
            file = Path(files[0]) if files else recipe
            if takes_file and file is None:
                raise InputError("which recipe? raydmd run FILE; 'raydmd recipe' prints one to edit")
            return _resolve(parent, file, [*flags, *keys])

        resolved = guard(resolve, None)
        if dry_run:
            typer.echo(resolved.to_yaml(), nl=False)
            raise typer.Exit(DONE)
        wanted = pairs and pairs[0 if in_zoo(resolved.model.path) else 1]
        raise typer.Exit(guard(lambda: _run(resolved, max_cycles, pairs=wanted), resolved))

    return run_recipe


def _resolve(parent: Callable[[str | None], Recipe], file: Path | None, overrides: list[str]) -> Recipe:
    changes = recipe_io.read_changes(file, whole=FREE) if file else {}
    changes |= dict(recipe_io.split_override(o) for o in overrides)
    model = changes.get("model.path")
    return combine(parent(None if model is None else str(model)), file=file, overrides=overrides)


def _run(recipe: Recipe, max_cycles: int | None, *, pairs: int | None = None) -> int:
    from raydmd.training.stopping import leave_on_signals

    if not pairs:
        leave_on_signals()
    from raydmd.training.run import run

    if pairs and recipe.method.regression:
        from raydmd.training.make_pairs import make_missing

        make_missing(recipe, pairs)
    code = run(recipe, max_cycles=max_cycles) or DONE
    try:
        if said := told_after(recipe.folder):
            typer.echo(f"plan      {said}; raydmd plan --cluster here --after {recipe.folder}")
    except Exception as error:  # the run is done, whatever its plan was
        typer.echo(f"plan      not compared: {type(error).__name__}: {hidden(str(error))}")
    return code


def _make_pairs(
    ctx: typer.Context,
    count: Annotated[int | None, typer.Option(min=1, help="Pairs in all.", show_default=False)] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="For the pairs; default: method.regression.pairs.")
    ] = None,
    shard: Annotated[int | None, typer.Option(min=1, help="Pairs in a file; default: about 256 MiB.")] = None,
) -> None:
    """Make noise-image pairs for method.regression with a recipe's teacher; the same command resumes."""

    def resolve() -> tuple[Recipe, int]:
        keys, files = read_overrides(ctx.args, files=1)
        if not files:
            raise InputError("which recipe? raydmd pairs FILE --count N; 'raydmd recipe' prints one to edit")
        if count is None:
            raise InputError("how many pairs? raydmd pairs FILE --count N")
        return _resolve(lambda _: Recipe(), Path(files[0]), keys), count

    recipe, wanted = guard(resolve, None)

    def make() -> int:
        from raydmd.training.make_pairs import make

        return make(recipe, wanted, output, shard=shard)

    raise typer.Exit(guard(make, None))


def _sample(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder, e.g. runs/NAME.")],
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Default: the run's own.", show_default=False)
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=16, help="Of the run's own prompts.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="The first column's.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, max=16, help="Columns.")] = 2,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Default: RUN/samples.", show_default=False)
    ] = None,
) -> None:
    """Sample a finished run's student: a sheet of prompts by seeds, and each sample by itself."""

    def make() -> int:
        from raydmd.training.prepare import quiet
        from raydmd.training.show import show

        quiet()
        shown = show(folder, prompts or [], count=count, seeds=range(seed, seed + seeds), output=output)
        typer.echo(f"sheet     {shown.sheet}\nsamples   {shown.files[0].parent} ({len(shown.files)} files)")
        return DONE

    raise typer.Exit(guard(make, None))


def _track(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Runs or sweeps, e.g. runs/NAME.")],
) -> None:
    """Send to MLflow what runs could not, because its server was away."""

    def hand_over() -> int:
        from raydmd.training.tracked import send

        for folder in folders:
            trials = sorted(f.parent for f in folder.glob("trials/*/recipe.yaml"))
            for run in trials or [folder]:
                typer.echo(f"{run}: {'sent' if send(run) else 'MLflow has it all'}")
        return DONE

    raise typer.Exit(guard(hand_over, None))


def _top(
    address: Annotated[
        str | None, typer.Option(help="Of the cluster, or 'auto' for this machine's; default: $RAY_ADDRESS.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Show them once.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON, once.")] = False,
) -> None:
    """Watch a cluster's pools of teachers and rewards: replicas, load, and which run asks how much."""

    def show() -> None:
        from raydmd.training.access import show_token

        show_token(address or os.environ.get("RAY_ADDRESS"))
        from raydmd.serving.top import top

        top(address, once=once, as_json=as_json)

    guard(show, None)


def _print_recipe(
    ctx: typer.Context,
    file: Annotated[Path | None, typer.Option(metavar="FILE", help="A YAML recipe.")] = None,
) -> None:
    """Print the default recipe, changed by a file and by keys, as YAML.

    Another method's keys: raydmd recipe method.name=dmd2. Keys of sections that are off follow as comments.
    """

    def resolve() -> Recipe:
        keys, _ = read_overrides(ctx.args)
        return _resolve(lambda _: Recipe(), file, keys)

    recipe = guard(resolve, None)
    typer.echo(recipe.to_yaml(), nl=False)
    typer.echo("# Off; any of a section's keys switches it on:")
    for key, value in recipe_io.switched_off(recipe).items():
        typer.echo(f"# {key}: {'(must be given)' if value is ... else json.dumps(to_jsonable_python(value))}")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"raydmd {raydmd.__version__}")
        raise typer.Exit(DONE)


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Distil diffusion and flow models into few-step generators on a Ray cluster."""
    del version


def _app() -> typer.Typer:
    # Plain text in a terminal and in a job log alike; faults are reported by guard.
    return typer.Typer(
        add_completion=False,
        no_args_is_help=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
