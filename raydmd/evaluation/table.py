"""What the columns of an evaluation's table are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from raydmd.zoo.judge import LANGUAGES

ATTRIBUTES = tuple(dict.fromkeys(name for language in LANGUAGES for name in language.attributes))
"""Of all the zoo's worlds."""


@dataclass(frozen=True)
class Column:
    """A figure of the table.

    Attributes:
        key: in a row.
        label: in the head.
        better: which way is better; ``teacher`` means nearest to the reference, ``None`` neither.
        digits: after the point.
        help: what it is, for the report.
        brief: whether a terminal's narrow table has it.
    """

    key: str
    label: str
    better: Literal["low", "high", "teacher"] | None
    digits: int
    help: str
    brief: bool = True


ARROWS = {"low": " ↓", "high": " ↑"}
"""Which way is better, behind a label."""
COLUMNS = (
    Column("evaluations", "evals", None, 0, "network evaluations per clip; guidance counts double"),
    Column("seconds", "s/clip", None, 3, "wall time per clip in seconds, on the machine below"),
    Column("frechet", "Fréchet", "low", 2, "distance to the teacher's clips in a judge's features"),
    Column("joint", "joint", "high", 3, "share of clips with all stated attributes right"),
    *(Column(f"accuracy_{name}", name, "high", 3, f"share with the stated {name} right", False) for name in ATTRIBUTES),
    *(
        Column(f"joint_{count}", f"joint of {count}", "high", 3, f"share right where the prompt states {count}", False)
        for count in range(1, max(len(language.attributes) for language in LANGUAGES) + 1)
    ),
    Column("flow", "flow", "teacher", 2, "mean optical flow of the foreground, pixels per frame"),
    Column("flow_ratio", "flow ratio", None, 2, "flow relative to the teacher's", False),
    Column("dynamic_degree", "dynamic", "teacher", 3, "share of clips that move at all", False),
    Column("diversity", "diversity", "teacher", 3, "1 - mean cosine of a prompt's features", False),
    Column("coverage_entropy", "coverage", "high", 3, "evenness of what a prompt leaves open; 1 is the truth"),
    Column("coverage_distance", "TV", "low", 3, "the same as total variation to the truth", False),
    Column("missing_modes", "missing", "low", 3, "share of open values that a prompt never shows"),
    Column("pooled_entropy", "pooled coverage", "high", 3, "evenness over all prompts", False),
    Column("pooled_distance", "pooled TV", "low", 3, "total variation over all prompts", False),
    Column("pooled_missing", "pooled missing", "low", 3, "values missing over all prompts", False),
    Column("brightness", "brightness", "teacher", 3, "mean pixel value", False),
    Column("saturation", "saturation", "teacher", 3, "mean chroma, largest minus smallest channel"),
)
"""What a zoo's judge, motion and colours tell."""

NETWORKS = (
    Column("frechet_{}", "Fréchet {}", "low", 2, "distance to the teacher's clips in {}"),
    Column("diversity_{}", "diversity {}", "high", 3, "1 - mean cosine of a prompt's {}"),
    Column("precision_{}", "precision {}", "high", 3, "share near the teacher's clips", False),
    Column("recall_{}", "recall {}", "high", 3, "share of the teacher's clips that are near", False),
    Column("vendi_{}", "Vendi {}", "teacher", 1, "effective number of clips in {}", False),
)
"""What each named network tells."""
LPIPS = Column("diversity_lpips", "LPIPS", "high", 3, "mean LPIPS between samples of a prompt")
REWARD = Column("reward_{}", "{}", "high", 2, "mean of the reward {}")


def named(column: Column, name: str) -> Column:
    """A column of :data:`NETWORKS`, or :data:`REWARD`, for one network or reward."""
    filled = {part: getattr(column, part).replace("{}", name) for part in ("key", "label", "help")}
    return replace(column, **filled)


def column(key: str) -> Column | None:
    """What a figure of an evaluation is, by its name; ``None`` for one that no evaluation has."""
    if found := next((c for c in (*COLUMNS, LPIPS) if c.key == key), None):
        return found
    for kind in (*NETWORKS, REWARD):
        beginning = kind.key.removesuffix("{}")
        if key.startswith(beginning) and key != beginning:
            return named(kind, key.removeprefix(beginning))
    return None
