"""Samples of several runs on the same prompts and seeds, taken from the pages of their reports. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from raydmd.comparing.runs import Run

PICTURE = re.compile(r"data:image/(png|webp|jpeg);base64,[A-Za-z0-9+/=]+")
SEEDS = (
    "model.path",
    "model.frames",
    "model.height",
    "model.width",
    "evaluation.seed",
    "evaluation.samples",
    "evaluation.per_prompt",
)
"""Keys that, beside the prompts, decide the noise of a report's samples."""


@dataclass(frozen=True)
class Shot:
    """One sample.

    Attributes:
        still: the picture, or frames of the clip side by side, as a data URI.
        moving: the clip, or empty.
        width: of a frame, pixels.
        height: of a frame, pixels.
    """

    still: str
    moving: str
    width: int
    height: int


@dataclass
class Sheet:
    """A report's samples.

    Attributes:
        heads: titles of the samplers, the teacher's first and the student's last.
        prompts: one a row.
        shots: by row and sampler.
    """

    heads: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    shots: list[list[Shot]] = field(default_factory=list)


@dataclass
class Group:
    """Runs whose samples are of the same prompts and seeds.

    Attributes:
        prompts: of the columns.
        seed: of the evaluation.
        model: of the runs.
        teachers: titles and samples; several if the runs' teachers sample differently.
        students: places of the runs and their samples.
    """

    prompts: list[str]
    seed: Any
    model: Any
    teachers: list[tuple[str, list[Shot]]] = field(default_factory=list)
    students: list[tuple[int, list[Shot]]] = field(default_factory=list)


def sheet_of(html: str) -> Sheet | None:
    """The samples of a report's page; ``None`` if it has none."""
    reader = _Reader()
    reader.feed(html)
    sheet = reader.sheet
    if not sheet.heads or not sheet.shots or any(len(row) != len(sheet.heads) for row in sheet.shots):
        return None
    return sheet


def groups(runs: Sequence[Run], sheets: Mapping[int, Sheet]) -> list[Group]:
    """The runs' samples, those of the same prompts and seeds together; the largest group first.

    Args:
        runs: that are compared.
        sheets: by the place of their run, in the order to show.
    """
    found: dict[str, Group] = {}
    for place, sheet in sheets.items():
        recipe = runs[place].recipe
        key = repr((sheet.prompts, [recipe.get(k) for k in SEEDS]))
        group = found.setdefault(key, Group(sheet.prompts, recipe.get("evaluation.seed"), recipe.get("model.path")))
        group.students.append((place, [row[-1] for row in sheet.shots]))
        teacher = [row[0] for row in sheet.shots]
        if len(sheet.heads) > 1 and all(shots != teacher for _, shots in group.teachers):
            group.teachers.append((sheet.heads[0], teacher))
    return sorted(found.values(), key=lambda g: -len(g.students))


class _Reader(HTMLParser):
    """Reads the table of samples of :data:`raydmd.evaluation.page.PAGE`."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.sheet = Sheet()
        self._inside = False
        self._text: list[str] | None = None
        self._cells = 0
        self._shot: dict[str, dict[str, str]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {k: v or "" for k, v in attrs}
        if tag == "table":
            self._inside = found.get("class") == "sheet"
        if not self._inside:
            return
        if tag == "tr":
            self._cells = 0
        if tag in ("th", "td"):
            self._text, self._shot = [], {}
        if tag == "img" and PICTURE.fullmatch(found.get("src", "")):
            self._shot[found.get("class", "")] = found

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._inside = False
        if not self._inside or tag not in ("th", "td") or self._text is None:
            return
        text, self._text = "".join(self._text).strip(), None
        self._cells += 1
        if tag == "th" and self._cells > 1:
            self.sheet.heads.append(text)
        elif tag == "td" and self._cells == 1:
            self.sheet.prompts.append(text)
            self.sheet.shots.append([])
        elif tag == "td" and "strip" in self._shot:
            still, moving = self._shot["strip"], self._shot.get("moving", {})
            size = moving or still
            self.sheet.shots[-1].append(
                Shot(still["src"], moving.get("src", ""), _number(size.get("width")), _number(size.get("height")))
            )

    def handle_data(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data)


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 64
