"""The reference pages, made of the code: recipe keys, commands, modules. ``conf.py`` writes them at every build."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import json
import os
import pkgutil
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import to_jsonable_python

import raydmd
from raydmd.cli import main
from raydmd.recipe import Recipe
from raydmd.recipe_method import PRESETS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {"cluster/README.md": "reference/cluster.md"}
"""Pages that stand beside what they are about, and where these pages have them too."""
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s]+)")
WIDTH = 100
"""Of a command's help."""
BUILT = "<!-- made by docs/make_reference.py; changes here are lost -->\n"


def write(folder: Path) -> None:
    """Write all pages below ``folder``."""
    for name, text in pages().items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.is_file() or file.read_text(encoding="utf-8") != text:  # Sphinx reads again what is newer
            file.write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """Every page by its path below docs."""
    rooms = modules()
    api = {f"reference/api/{room}.md": api_page(room, names) for room, names in rooms.items()}
    index = "\n".join(f"api/{room}" for room in rooms)
    listed = f"# Modules\n\nMade of the docstrings.\n\n```{{toctree}}\n:maxdepth: 1\n\n{index}\n```\n"
    found = {"reference/recipe.md": recipe_page(), "reference/commands.md": commands_page(), "reference/api.md": listed}
    found |= {kept: rebased(ROOT / name, ROOT / "docs" / kept) for name, kept in ELSEWHERE.items()}
    return {name: BUILT + text for name, text in (found | api).items()}


def rebased(file: Path, to: Path) -> str:
    """A page as it must be to stand at another place: its links lead where they did."""
    return LINK.sub(lambda m: f"]({led(m[1], file.parent, to)}", file.read_text(encoding="utf-8"))


def led(link: str, folder: Path, page: Path) -> str:
    """Where a link of a page in ``folder`` leads, as ``page`` has to say it."""
    path, sign, heading = link.partition("#")
    target = Path(os.path.normpath(folder / path))
    for name, kept in ELSEWHERE.items():
        target = ROOT / "docs" / kept if target == ROOT / name else target
    return os.path.relpath(target, page.parent) + sign + heading


# --- recipe keys


def recipe_page() -> str:
    """Every key of a recipe with its type, default and meaning, section by section."""
    schema = Recipe.model_json_schema()
    lines = [
        "# Recipe keys\n",
        "Any key is a flag of `raydmd run` and of every experiment, in either form: `--training.student.rate 1e-5`, "
        "`training.student.rate=1e-5`. `raydmd recipe` prints them all, `raydmd recipe method.name=dmd2` with another "
        "method's settings. An unknown key is refused with the nearest right one. `null` stands for nothing.\n",
    ]
    for title, words, rows in sections(Recipe, schema, schema):
        lines += [f"## {title or 'The run'}\n", f"{words}\n"]
        lines += ["| key | type | default | |", "|---|---|---|---|"]
        lines += [f"| `{key}` | {cell(kind)} | {cell(default)} | {cell(doc)} |" for key, kind, default, doc in rows]
        lines.append("")
    lines += [
        "## Presets\n",
        "What `method.name` fills in where a key is not given:\n",
        "| preset | settings |",
        "|---|---|",
    ]
    for name, given in PRESETS.items():
        leaves = ", ".join(f"`{k}: {json.dumps(v)}`" for k, v in given.items())
        lines.append(f"| `{name}` | {leaves} |")
    return "\n".join(lines) + "\n"


def sections(
    model: type[BaseModel],
    part: Mapping[str, Any],
    schema: Mapping[str, Any],
    prefix: str = "",
    given: BaseModel | None = None,
) -> Iterator[tuple[str, str, list[tuple[str, str, str, str]]]]:
    """Sections in the order of the recipe, the ones within after the one around them.

    Args:
        model: the class of the section.
        part: its schema.
        schema: the recipe's, with all definitions.
        prefix: of its keys.
        given: the section as it is by default, where it is more than the defaults of its class.

    Yields:
        The section's key, what its class says, and per key of its own: key, type, default, meaning.
    """
    docs = {name: text for kind in reversed(model.__mro__) for name, text in attribute_docs(kind).items()}
    rows, inner = [], []
    for name, field in model.model_fields.items():
        one = part["properties"][name]
        section = section_of(field.annotation)
        doc = docs.get(name, "")
        if section is not None:
            off = (getattr(given, name) if given else field.default) is None
            inner.append((f"{prefix}{name}", section))
            rows.append((f"{prefix}{name}", "section below", "off" if off else "on", doc or first(section)))
            continue
        known = given is not None or not field.is_required()
        value = getattr(given, name) if given else field.get_default(call_default_factory=True)
        rows.append((f"{prefix}{name}", shown(one, schema), shown_default(value) if known else "must be given", doc))
    yield prefix.removesuffix("."), prose(inspect.getdoc(model) or ""), rows
    for key, section in inner:
        name = key.removeprefix(prefix)
        value = getattr(given, name) if given else model.model_fields[name].get_default(call_default_factory=True)
        # Of a section that is off there is none; the method's is its preset's, which has a table of its own.
        value = value if isinstance(value, section) and name != "method" else None
        yield from sections(section, definition(section, schema), schema, f"{key}.", value)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The one section that a key holds, alone or as ``SECTION | None``; weights and lists are values."""
    from raydmd.recipe_types import Section

    kinds = [k for k in getattr(annotation, "__args__", (annotation,)) if k is not type(None)]
    alone = len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], Section)
    plain = annotation is kinds[0] or type(annotation).__name__ in ("UnionType", "_UnionGenericAlias", "Union")
    return kinds[0] if alone and plain else None


def definition(section: type[BaseModel], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """A section's part of the schema."""
    found: Mapping[str, Any] = schema["$defs"][section.__name__]
    return found


def attribute_docs(kind: type) -> dict[str, str]:
    """The strings below a class's fields."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[kind.__module__]))
    except (OSError, TypeError, KeyError):
        return {}
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef) or node.name != kind.__name__:
            continue
        for field, below in zip(node.body, node.body[1:], strict=False):
            named = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            if named and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                found[field.target.id] = prose(inspect.cleandoc(str(below.value.value)))  # type: ignore[union-attr]
    return found


def prose(text: str) -> str:
    """A docstring as Markdown: one line, code in single backticks, roles as code."""
    for role in ("class", "func", "mod", "meth", "data"):
        text = text.replace(f":{role}:`~", "`").replace(f":{role}:`", "`")
    return " ".join(text.replace("``", "`").split())


def first(kind: type[BaseModel]) -> str:
    """The first line of a class's docstring."""
    return prose((inspect.getdoc(kind) or "").split("\n\n")[0])


def shown(part: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """A type in words, from its JSON schema."""
    if "$ref" in part:
        inner = schema["$defs"][part["$ref"].rpartition("/")[2]]
        keys = ", ".join(inner["properties"])
        return f"`{{{keys}}}`"
    if "anyOf" in part:
        return " or ".join(dict.fromkeys(shown(p, schema) for p in part["anyOf"]))
    if "enum" in part or "const" in part:
        return ", ".join(f"`{v}`" for v in part.get("enum", [part.get("const")]))
    kind = part.get("type")
    if kind == "array":
        if "prefixItems" in part:
            return "[" + ", ".join(shown(p, schema) for p in part["prefixItems"]) + "]"
        return f"list of {shown(part.get('items', {}), schema)}"
    if kind == "object":
        return f"mapping to {shown(part.get('additionalProperties', {}), schema)}"
    bounds = [("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<")]
    limits = ", ".join(f"{sign} {part[name]:g}" for name, sign in bounds if name in part and abs(part[name]) < 1e18)
    words = {"integer": "whole number", "number": "number", "boolean": "yes or no", "string": "text", "null": "`null`"}
    word = "path" if part.get("format") == "path" else words.get(str(kind), str(kind))
    return f"{word} {limits}".strip()


def shown_default(value: Any) -> str:
    """A default as YAML would have it."""
    return f"`{json.dumps(to_jsonable_python(value))}`"


def cell(text: str) -> str:
    """Text within a table."""
    return text.replace("|", "\\|").replace("\n", " ")


# --- commands


def commands_page() -> str:
    """What every command says to ``--help``."""
    lines = [
        "# Commands\n",
        "What each says to `--help`. Every script in `experiments/` takes the same flags as `raydmd run`.\n",
    ]
    for words in commands():
        lines += [f"## {' '.join(['raydmd', *words])}\n", "```text", help_of(*words).strip(), "```", ""]
    return "\n".join(lines)


def commands() -> Iterator[tuple[str, ...]]:
    """Every command, those of groups included, as the program itself lists them."""
    yield ()
    for name in listed():
        inner = listed(name)
        yield (name,)
        yield from ((name, below) for below in inner)


def listed(*words: str) -> list[str]:
    """Names below ``Commands:`` in a command's help."""
    _, found, rest = help_of(*words).partition("\nCommands:\n")
    lines = rest.split("\n\n")[0].splitlines() if found else []
    return [line.split()[0] for line in lines if line.startswith("  ") and not line.startswith("   ")]


def help_of(*words: str) -> str:
    """A command's help, as wide as these pages."""
    before, out = os.environ.get("COLUMNS"), io.StringIO()
    os.environ["COLUMNS"] = str(WIDTH)
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            main([*words, "--help"])
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
    return out.getvalue()


# --- modules


def modules() -> dict[str, list[str]]:
    """Modules by room; those at the top are ``raydmd`` itself."""
    rooms: dict[str, list[str]] = {"raydmd": []}
    for found in pkgutil.walk_packages(raydmd.__path__, "raydmd."):
        parts = found.name.split(".")
        if parts[-1] == "__main__" or (parts[1] == "zoo" and parts[-1].startswith("make_")):
            continue
        room = parts[1] if len(parts) > 2 or found.ispkg else "raydmd"
        rooms.setdefault(room, []).append(found.name)
    return {room: sorted(names) for room, names in rooms.items()}


def api_page(room: str, names: list[str]) -> str:
    """A room's modules with what their docstrings say."""
    lines = [f"# {room}\n"]
    for name in names:
        lines += [f"## {name}\n", "```{eval-rst}", f".. automodule:: {name}", "   :members:", "```", ""]
    return "\n".join(lines)
