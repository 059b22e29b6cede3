"""``raydmd compare``: any runs and sweeps, side by side."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raydmd.cli_faults import guard
from raydmd.cli_sweep import FILE, read
from raydmd.errors import DONE, InputError

if TYPE_CHECKING:
    from raydmd.comparing.gather import SweepFacts


def compare(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="WHAT...",
            help="Folders of runs and sweeps; with --tracking also run ids, and names of runs, sweeps and experiments.",
            show_default=False,
        ),
    ] = None,
    tracking: Annotated[
        str | None,
        typer.Option(metavar="URI", envvar="MLFLOW_TRACKING_URI", help="Of the tracking server, or its database."),
    ] = None,
    by: Annotated[
        str | None, typer.Option(metavar="METRIC", help="To sort and colour by; default: the sweep's first objective.")
    ] = None,
    goal: Annotated[
        str | None,
        typer.Option(metavar="min|max|teacher", help="Which way --by is better; teacher: the nearest to it."),
    ] = None,
    objectives: Annotated[
        str | None, typer.Option(metavar="A:min,B:max", help="Of the Pareto front; default: the sweep's.")
    ] = None,
    html: Annotated[Path, typer.Option(metavar="FILE", help="The page; its JSON lies beside it.")] = Path(
        "compare.html"
    ),
    no_html: Annotated[bool, typer.Option("--no-html", help="The table alone.")] = False,
    samples: Annotated[int, typer.Option(min=0, metavar="N", help="Runs whose samples the page shows.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print the same figures for a machine.")] = False,
) -> None:
    """Compare runs and sweeps: a table, sorted, of what differs, and a page with fronts, curves and samples."""

    def go() -> int:
        from raydmd.comparing.document import as_text, compared, document
        from raydmd.comparing.gather import gather
        from raydmd.comparing.ranking import read_objectives
        from raydmd.comparing.terminal import text
        from raydmd.comparing.write import facts, write

        if not what:
            raise InputError("which runs? raydmd compare runs/NAME runs/OTHER, or a sweep's folder")
        if goal not in (None, "min", "max", "teacher"):
            raise InputError(f"--goal {goal!r}: min, max or teacher")
        if html.suffix != ".html":
            raise InputError(f"--html {html}: its name must end with .html")
        given = read_objectives(objectives) if objectives else {}
        gathered = gather(what, tracking, _study)
        found = compared(
            gathered.runs,
            title=gathered.title,
            by=by,
            goal=goal,
            objectives=given,
            sweep_objectives=gathered.objectives,
            searched=gathered.searched,
            notes=gathered.notes,
        )
        if as_json:
            whole = document(found, facts=facts(found, gathered.seconds))
            typer.echo(as_text({k: v for k, v in whole.items() if k not in ("curves", "samples")}))
        else:
            typer.echo(text(found, width=shutil.get_terminal_size((120, 24)).columns))
        if not no_html:
            page, data = write(found, html, most=samples, seconds=gathered.seconds)
            typer.echo(f"page      {page}\nfigures   {data}", err=as_json)
        return DONE

    raise typer.Exit(guard(go, None))


def _study(folder: Path) -> SweepFacts:
    """A sweep's folder and its study."""
    from raydmd.tuning.compare import facts_of
    from raydmd.tuning.spec import read_sweep
    from raydmd.tuning.storage import storage_url
    from raydmd.tuning.study import rows_of

    given, base = read(folder / FILE)
    spec = read_sweep({**given, "storage": os.environ.get("RAYDMD_STORAGE") or given.get("storage")})
    rows = rows_of(spec, storage_url(spec, folder.absolute()))
    return facts_of(spec, base, rows, folder)
