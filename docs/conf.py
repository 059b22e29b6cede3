"""Sphinx: how the pages of this folder are built. `make docs` writes them to build/docs/."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from make_reference import ELSEWHERE, LINK, led, modules, write  # noqa: E402  # beside this file

from raydmd import __version__  # noqa: E402

# All at once and first: autodoc writes into the annotations of pydantic's base class as it documents its children, and
# what is imported after that (MLflow) can't be.
for names in modules().values():
    for name in names:
        import_module(name)
write(HERE)  # the reference is made of the code at every build, and kept nowhere

project = "raydmd"
release = version = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
# Annotations are strings here (imports for types alone are never made), and some names are two classes' in two rooms:
# a signature's link to one of them is a guess, which is no fault of a page.
suppress_warnings = ["ref.python"]
html_theme = "furo"
html_title = f"raydmd {__version__}"
html_show_sourcelink = False
html_copy_source = False
html_show_copyright = html_show_sphinx = False
html_math_renderer = "mathml"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
copybutton_exclude = ".linenos, .gp, .go"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_ivar = True  # dataclasses list their fields under Attributes; as members they would be there twice
napoleon_numpy_docstring = False


def mathml(writer: Any, node: nodes.Element) -> None:
    """Write a formula as MathML, which browsers draw by themselves: no script, no network."""
    block = isinstance(node, nodes.math_block)
    formula = convert(node.astext(), display="block" if block else "inline")
    writer.body.append(f'<div class="math">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def elsewhere(_: Any, name: str, source: list[str]) -> None:
    """Lead links to pages outside of this folder to where they are in it."""
    page = HERE / f"{name}.md"
    names = {file.rpartition("/")[2] for file in ELSEWHERE}
    source[0] = LINK.sub(
        lambda m: f"]({led(m[1], page.parent, page)}" if Path(m[1].partition("#")[0]).name in names else m[0], source[0]
    )


def setup(app: Any) -> None:
    """Tell Sphinx."""
    app.connect("source-read", elsewhere)
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
