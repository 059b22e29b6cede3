"""The pages: README, docs, cluster and what else is written for readers; their code, links and headings."""

from __future__ import annotations

import itertools
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
MARKDOWN = MarkdownIt("commonmark").enable("table")


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        file: the page.
        line: where it begins.
        language: as it says.
        text: what is in it.
    """

    file: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """Every page that is kept."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    made = ROOT / "docs" / "reference"
    found += [file for file in sorted((ROOT / "docs").rglob("*.md")) if made not in file.parents]
    return found + sorted((ROOT / "cluster").rglob("*.md"))


@cache
def reference() -> dict[Path, str]:
    """Pages that are made of the code, by where they will be."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from make_reference import pages as made
    finally:
        sys.path.remove(str(ROOT / "docs"))
    return {ROOT / "docs" / name: text for name, text in made().items()}


def blocks(*languages: str) -> list[Block]:
    """Blocks of code of all pages."""
    found = []
    for file in pages():
        for token in MARKDOWN.parse(file.read_text(encoding="utf-8")):
            if token.type == "fence" and token.info.strip() in languages:
                found.append(Block(file, (token.map or [0])[0] + 1, token.info.strip(), token.content))
    return found


def spans() -> list[tuple[Path, str]]:
    """Code within text."""
    found = []
    for file in pages():
        for token in MARKDOWN.parse(file.read_text(encoding="utf-8")):
            found += [(file, child.content) for child in token.children or [] if child.type == "code_inline"]
    return found


def links(text: str) -> list[str]:
    """Where a page's links and pictures lead."""
    found = []
    for token in MARKDOWN.parse(text):
        for child in token.children or []:
            if child.type == "link_open":
                found.append(str(child.attrGet("href")))
            elif child.type == "image":
                found.append(str(child.attrGet("src")))
    return found


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub makes them: lower case, dashes between words, a number where one comes again."""
    found: dict[str, int] = {}
    names = set()
    tokens = MARKDOWN.parse(text)
    for opened, inline in itertools.pairwise(tokens):
        if opened.type == "heading_open":
            words = "".join(c.content for c in inline.children or [] if c.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
            names.add(f"{slug}-{found[slug]}" if slug in found else slug)
            found[slug] = found.get(slug, 0) + 1
    return names
