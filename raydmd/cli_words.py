"""Reading what is left of a command line: recipe keys in two forms, files, and the nearest right word."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raydmd import recipe_io
from raydmd.errors import InputError
from raydmd.recipe import known_keys

if TYPE_CHECKING:
    from collections.abc import Sequence

FLAGS = {
    "model": "model.path",
    "prompts": "data.prompts",
    "name": "name",
    "output": "output",
    "workers": "placement.workers",
    "teachers": "placement.teachers",
    "seed": "seed",
    "deterministic": "deterministic",
}
"""Flags that are short for a recipe key."""
OTHER_FLAGS = ("recipe", "max-cycles", "dry-run", "help")

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Click leaves what it doesn't know in ``ctx.args``; :func:`read_overrides` reads it strictly."""


def read_overrides(words: Sequence[str], *, files: int = 0) -> tuple[list[str], list[str]]:
    """Sort what is left of a command line into ``key=value`` overrides and file names.

    Args:
        words: what click did not know, in its order.
        files: how many words may be file names.

    Returns:
        Overrides and file names.

    Raises:
        InputError: for an unknown flag (with the nearest right one), a key without a value, or a
            word that is neither.
    """
    keys = set(known_keys())
    overrides: list[str] = []
    found: list[str] = []
    rest = iter(words)
    for word in rest:
        if word.startswith("-"):
            key, sign, value = word.removeprefix("--").partition("=")
            if word.startswith("--") and key in keys:
                if not sign:
                    value = next(rest, "")
                    if not value or value.startswith("--"):
                        raise InputError(f"--{key} needs a value: --{key} VALUE or --{key}=VALUE")
                overrides.append(f"{key}={value}")
                continue
            raise InputError(f"unknown flag '{word.partition('=')[0]}'{_nearest_flag(key)}")
        if "=" in word:
            overrides.append(word)
        elif len(found) < files:
            found.append(word)
        else:
            key = word if word in keys else "KEY"
            raise InputError(f"can't read '{word}'; a recipe key is set by {key}=VALUE")
    return overrides, found


def _nearest_flag(word: str) -> str:
    others = [flag.replace("-", "_") for flag in OTHER_FLAGS]
    near = recipe_io.nearest(word, [*FLAGS, *others, *known_keys()])
    if near is None:
        return "; --help lists flags, 'raydmd recipe' all keys"
    short = {key: flag for flag, key in FLAGS.items()} | dict(zip(others, OTHER_FLAGS, strict=True))
    return f"; did you mean '--{short.get(near, near)}'?"
