"""``raydmd plan``: will it fit, how long does it take, where should the teacher be; and how far off that was."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raydmd import recipe_io
from raydmd.cli_faults import guard
from raydmd.cli_words import read_overrides
from raydmd.errors import DONE, InputError
from raydmd.models.places import in_zoo
from raydmd.recipe import Recipe, combine

if TYPE_CHECKING:
    from raydmd.planning.calibration import Calibration
    from raydmd.planning.hardware import Hardware


def plan(
    ctx: typer.Context,
    cluster: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="Hardware: h100, h200, a100, b200, l40s, a YAML file like theirs, or 'here' as --measure found it.",
        ),
    ] = "h100",
    gpus: Annotated[
        int | None, typer.Option(min=1, help="To place the run on; default: as many as the recipe takes.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time the recipe's parts on this machine first, and keep that.")
    ] = False,
    after: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Say how far off the plan was: a finished run's folder.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What --measure keeps; default: in this user's cache.")
    ] = None,
    scale: Annotated[
        bool, typer.Option("--scale", help="Also on 8 to 1024 GPUs, simulated, and where more stop to pay.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures for a machine.")] = False,
) -> None:
    """Plan a run: memory of each GPU, seconds, hours, cost, and the best placement.

    FILE is a recipe in YAML, or a script of experiments/, of which the paper's recipe is planned unless model.path
    names a model of the zoo.
    """

    def go() -> int:
        from raydmd.planning import show
        from raydmd.planning.answer import nearest
        from raydmd.planning.calibration import default_file
        from raydmd.planning.hardware import ON_PAPER
        from raydmd.planning.planner import Planner

        kept = calibration or default_file()
        if after is not None:
            if measure or ctx.args:
                raise InputError("--after takes its recipe from the run's folder, and nothing beside it")
            return _compare(after, cluster, kept, as_json=as_json)
        recipe = _recipe(ctx)
        _quiet()
        if measure:
            from raydmd.planning.measure import calibrate

            calibrate(recipe, kept)
            typer.echo(f"measured, and kept in {kept}", err=as_json)
        hardware, known = _machine("here" if measure else cluster, kept)
        source = known.source(recipe) if known else ON_PAPER
        planner = Planner(recipe, known.at(recipe) if known else hardware, known.of(recipe) if known else None)
        answer = planner.answer(planner.own)
        tops, best = planner.best(gpus or planner.own.gpus, play=True)
        if gpus is not None:  # where none fits, the nearest
            answer = best or nearest(tops)
        enough = None if best else planner.enough(gpus or planner.own.gpus)
        answer, played = planner.played(answer)
        if as_json:
            typer.echo(json.dumps(show.document(planner, answer, played, tops, best, enough, source=source), indent=1))
        else:
            typer.echo(show.text(planner, answer, played, tops, best, enough, source=source))
        if scale:
            from raydmd.planning import scaling

            for grow in (False, True):
                how = "a worker's share kept" if grow else f"batch {recipe.training.batch}"
                typer.echo(f"\nOn more GPUs, {how}\n{scaling.text(scaling.sizes(planner, grow=grow))}", err=as_json)
        return DONE

    raise typer.Exit(guard(go, None))


def _machine(cluster: str, kept: Path) -> tuple[Hardware, Calibration | None]:
    """The hardware that is planned for; and what was measured, if it is this machine."""
    from raydmd.planning.calibration import read
    from raydmd.planning.hardware import read_hardware

    if cluster != "here":
        return read_hardware(cluster), None
    known = read(kept)
    if known is None:
        raise InputError(f"--cluster here: nothing was measured yet in {kept}; 'raydmd plan FILE --measure' does that")
    return known.hardware, known


def _compare(folder: Path, cluster: str, kept: Path, *, as_json: bool) -> int:
    from raydmd.planning.after import after, read_run, text

    _quiet()
    hardware, known = _machine(cluster, kept)
    found = after(folder, hardware, known)
    if as_json:
        typer.echo(json.dumps([vars(o) | {"off": o.by} for o in found], indent=1))
    else:
        said = known.source(read_run(folder)[0]) if known else f"times on paper, {hardware.name}"
        typer.echo(text(found, said))
    return DONE


def told_after(folder: Path) -> str | None:
    """How far off the plan of a run was, in a line; nothing on a machine where nothing was measured."""
    from raydmd.planning.calibration import default_file, read

    if not default_file().is_file():
        return None
    from raydmd.planning.after import after, summary

    known = read(default_file())
    return summary(after(folder, known.hardware, known)) if known else None


def _recipe(ctx: typer.Context) -> Recipe:
    """The recipe that is meant: of a file, or of an experiment's script, with the keys beside it."""
    keys, files = read_overrides(ctx.args, files=1)
    if not files:
        raise InputError("which recipe? raydmd plan FILE, a YAML recipe or a script like experiments/phased_wan22.py")
    file = Path(files[0])
    if file.suffix != ".py":
        return combine(Recipe(), file=file, overrides=keys)
    model = dict(recipe_io.split_override(key) for key in keys).get("model.path")
    return combine(_parent(file, None if model is None else str(model)), overrides=keys)


def _parent(script: Path, model: str | None) -> Recipe:
    """A script's recipe: the paper's, or the zoo's where a model of the zoo is named."""
    if not script.is_file():
        raise InputError(f"there is no script {script}")
    before = list(sys.path)
    sys.path.insert(0, str(script.parent))  # as if it were run
    try:
        found = runpy.run_path(str(script))
    finally:
        sys.path[:] = before
    recipe = found.get("ZOO" if model is not None and in_zoo(model) else "PAPER")
    if not isinstance(recipe, Recipe):
        raise InputError(f"{script} has no recipe of the name PAPER, as the scripts in experiments/ have")
    return recipe


def _quiet() -> None:
    from raydmd.training.prepare import quiet

    quiet()
