"""Pages lead somewhere: every local link, picture and anchor; and the reference leaves nothing out."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import pytest

from raydmd.recipe import known_keys
from tests.pages import ROOT, anchors, links, pages, reference

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.unit
DOCS = ROOT / "docs"
FIGURE = re.compile(r"-?\d+\.\d+ ± \d+\.\d+")


def faults(file: Path, text: str) -> list[str]:
    """Links of a page that lead nowhere."""
    found = []
    for link in links(text):
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        path = unquote(parts.path)
        target = (file.parent / path).resolve() if path else file
        made = reference().get(target)
        if made is None and not target.exists():
            found.append(f"{link}: there is no {target}")
        elif DOCS in file.parents and not known_to_sphinx(target):
            found.append(f"{link}: Sphinx knows no pages or folders outside of docs; name it without a link")
        elif parts.fragment and target.suffix == ".md":
            whole = target.read_text(encoding="utf-8") if made is None else made
            if unquote(parts.fragment) not in anchors(whole):
                found.append(f"{link}: no such heading; there are {', '.join(sorted(anchors(whole)))}")
    return found


def known_to_sphinx(target: Path) -> bool:
    """Whether a page of docs may link to it."""
    if DOCS in target.parents or target == ROOT / "cluster" / "README.md":
        return True
    return target.suffix != ".md" and not target.is_dir()


@pytest.mark.parametrize("file", pages(), ids=lambda file: str(file.relative_to(ROOT)))
def test_every_local_link_leads_somewhere(file: Path) -> None:
    assert faults(file, file.read_text(encoding="utf-8")) == []


def test_a_broken_link_is_seen() -> None:
    text = (
        "[a](docs/nothing.md) [b](README.md#no-such-heading) ![c](docs/none.png) [d](docs/log.md) [e](#one)\n\n# One\n"
    )
    broken = [fault.split(":")[0] for fault in faults(ROOT / "README.md", text)]
    assert broken == ["docs/nothing.md", "README.md#no-such-heading", "docs/none.png", "#one"]
    assert len(faults(DOCS / "step.md", "[a](../README.md) [b](../raydmd) [c](../raydmd/recipe.py)")) == 2


def test_headings_get_the_anchors_of_github() -> None:
    assert anchors("# A `b`: c, d\n\n## Same\n\n## Same\n") == {"a-b-c-d", "same", "same-1"}


def test_no_page_is_left_out() -> None:
    """Every page of docs can be reached from its index, as a reader goes."""
    seen, waiting = set(), [ROOT / "README.md"]
    while waiting:
        file = waiting.pop()
        if file in seen or file.suffix != ".md":
            continue
        seen.add(file)
        text = reference().get(file) or file.read_text(encoding="utf-8")
        there = [(file.parent / unquote(urlsplit(link).path)).resolve() for link in links(text) if "://" not in link]
        waiting += [path for path in there if path.is_file() or path in reference()]
    assert {file for file in pages() if file.is_relative_to(ROOT / "docs")} - seen == {ROOT / "docs" / "index.md"}


def test_every_page_has_its_place_in_the_tables_of_contents() -> None:
    """Sphinx fails over one that has none, but takes a minute to say so: name it in a toctree of docs/index.md."""
    placed = set()
    for file in DOCS.rglob("*.md"):
        for block in re.findall(r"```{toctree}\n(.*?)```", file.read_text(encoding="utf-8"), re.S):
            names = [line.strip() for line in block.splitlines() if line.strip() and not line.startswith(":")]
            placed |= {(file.parent / f"{name}.md").resolve() for name in names}
    assert {file for file in pages() if DOCS in file.parents} - placed == {DOCS / "index.md"}
    assert all(file.is_file() or file in reference() for file in placed)


def test_figures_of_the_methods_are_those_that_were_measured() -> None:
    measured = (ROOT / "benchmarks" / "results" / "methods.md").read_text(encoding="utf-8")
    found = {(file.name, figure) for file in pages() for figure in FIGURE.findall(file.read_text(encoding="utf-8"))}
    assert len(found) > 100
    assert sorted(pair for pair in found if f" {pair[1]} |" not in measured) == []


def test_the_reference_has_every_key_of_a_recipe_and_what_it_means() -> None:
    rows = {}
    for line in reference()[ROOT / "docs" / "reference" / "recipe.md"].splitlines():
        if line.startswith("| `"):
            key, *_, meaning = line.replace("\\|", "/").strip("| ").split(" | ")
            rows.setdefault(key.strip("`"), meaning)
    missing = [key for key in known_keys() if key not in rows]
    assert missing == []
    assert [key for key in known_keys() if rows[key] in ("", "|")] == []


def test_the_reference_has_every_command() -> None:
    text = reference()[ROOT / "docs" / "reference" / "commands.md"]
    for command in ("run", "pairs", "sample", "compare", "track", "top", "recipe", "sweep run", "sweep front"):
        assert f"## raydmd {command}\n" in text
    assert "Usage: raydmd sweep stop" in text
