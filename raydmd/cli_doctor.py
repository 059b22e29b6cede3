"""``raydmd doctor``: looks at a cluster before a run does."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from raydmd.cli_faults import guard
from raydmd.cli_words import read_overrides
from raydmd.recipe import Recipe, combine


def doctor(
    ctx: typer.Context,
    address: Annotated[
        str | None,
        typer.Option(help="Of the cluster, or 'auto' for this machine's; default: $RAY_ADDRESS, else this machine."),
    ] = None,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds for each question.")] = 20.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print findings and facts as JSON.")] = False,
) -> None:
    """Look at a cluster, and say what to do about what is wrong; exit code 1 if a run would fail.

    With a recipe file, or keys of one (output=/shared/runs tracking.uri=http://HOST:5000), its folders, storage,
    tracking server and room are looked at too.
    """

    def look() -> int:
        keys, files = read_overrides(ctx.args, files=1)
        recipe = combine(Recipe(), file=Path(files[0]) if files else None, overrides=keys) if keys or files else None
        from raydmd.doctor.gather import gather
        from raydmd.doctor.show import examine, show, verdict

        with contextlib.redirect_stdout(sys.stderr):  # Ray tells of nodes that go
            facts = gather(address or os.environ.get("RAY_ADDRESS", ""), recipe, deadline)
        findings = examine(facts)
        show(facts, findings, as_json=as_json)
        return verdict(findings)

    raise typer.Exit(guard(look, None))
