"""From a fault to one message on stderr and an exit code."""

from __future__ import annotations

import os
import traceback
from typing import TYPE_CHECKING, TypeVar

import typer

from raydmd.errors import FAILED, STOPPED, RaydmdError, RunStopped
from raydmd.redact import hidden

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from raydmd.recipe import Recipe

T = TypeVar("T")


def guard(step: Callable[[], T], recipe: Recipe | None) -> T:
    """Do ``step``; a fault becomes one message on stderr and the exit code that belongs to it."""
    try:
        return step()
    except KeyboardInterrupt:
        _say("stopped", "interrupted; the same command resumes from the last checkpoint")
        raise typer.Exit(STOPPED) from None
    except RaydmdError as error:
        _say("stopped" if isinstance(error, RunStopped) else "error", _message(error))
        raise typer.Exit(error.exit_code) from None
    except Exception as error:
        log = _keep_traceback(recipe)
        where = f"traceback in {log}" if log else "RAYDMD_DEBUG=1 shows the traceback"
        _say("error", f"{type(error).__name__}: {_message(error)} ({where})")
        raise typer.Exit(FAILED) from None


def _say(kind: str, message: str) -> None:
    if os.environ.get("RAYDMD_DEBUG") == "1":
        typer.echo(hidden(traceback.format_exc()), err=True)
    typer.echo(hidden(f"{kind}: {message}"), err=True)


def _message(error: Exception) -> str:
    """What an error says; of one that crossed Ray, without the traceback Ray puts around it."""
    text = str(error).strip()
    if isinstance(error, RaydmdError) and not text.startswith("ray::"):
        return text
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    if len(lines) == 1:
        return lines[0]
    remote = text.startswith("ray::") or "Traceback (most recent call last)" in text
    return lines[-1] if remote else lines[0]


def _keep_traceback(recipe: Recipe | None) -> Path | None:
    if recipe is None:
        return None
    path = recipe.folder / "error.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as log:
            log.write(hidden(traceback.format_exc()) + "\n")
    except OSError:
        return None
    return path
