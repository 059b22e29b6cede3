"""The page of a comparison: one file that needs nothing else."""

from __future__ import annotations

import html
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from raydmd.comparing.document import for_page

if TYPE_CHECKING:
    from collections.abc import Mapping

SCRIPTS = ("basics.js", "scales.js", "table.js", "front.js", "curves.js", "parallel.js", "rest.js", "main.js")
"""In the order that they go into the page: one function around all of them."""


def page(document: Mapping[str, Any]) -> str:
    """The page as HTML.

    Args:
        document: see :func:`raydmd.comparing.document.document`.
    """
    parts = files("raydmd.comparing") / "page"

    def read(name: str) -> str:
        return (parts / name).read_text(encoding="utf-8")

    filled = {
        "TITLE": html.escape(str(document["title"])),
        "STYLE": read("style.css"),
        "SCRIPT": '"use strict";\n(() => {\n' + "\n".join(read(name) for name in SCRIPTS) + "\n})();",
        "DATA": for_page(document),
    }
    made = read("page.html")
    # One pass from the left, so that nothing that was filled in is filled in again.
    first, *rest = made.split("@@")
    return first + "".join(filled[part] if i % 2 == 0 else part for i, part in enumerate(rest))
