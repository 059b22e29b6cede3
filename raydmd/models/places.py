"""Where a model named in a recipe lies, and what its folder or hub id says about itself.

A zoo name stands for package data, or for a pipeline with random weights that is made on first use, and is looked up
in every process anew, so that a recipe means the same on every node. A pipeline's folder may hold ``raydmd.json`` with
defaults for what the diffusers format does not say: frames, height, width, and the names of a prompt file and two
judges beside it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydmd.errors import InputError
from raydmd.recipe_io import nearest_name

if TYPE_CHECKING:
    from raydmd.recipe import Model

ZOO = Path(__file__).parent.parent / "zoo" / "data"
UNTRAINED = "-untrained"
"""How the names of pipelines with random weights end."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A model's whereabouts.

    Attributes:
        settings: the recipe's ``model`` section with path and sizes filled in.
        prompts: prompts that come with it.
        judge: weights of a judge that knows its world, for evaluation.
        reward: of another judge, for training: what a student is rewarded by must not measure it.
    """

    settings: Model
    prompts: Path | None = None
    judge: Path | None = None
    reward: Path | None = None


def in_zoo(model: str) -> bool:
    """Whether ``model`` names a pipeline that ships with the package, or one that it makes on first use."""
    plain = model not in ("", ".", "..") and "/" not in model
    return plain and ((ZOO / model).is_dir() or model.endswith(UNTRAINED))


def locate(settings: Model) -> Place:
    """Find a model; a zoo name becomes a folder, anything else stays what it is."""
    named = ZOO / settings.path
    is_name = "/" not in settings.path and settings.path not in ("", ".", "..")
    folder = named if is_name and named.is_dir() else Path(settings.path)
    if is_name and settings.path.endswith(UNTRAINED) and not folder.is_dir():
        from raydmd.models.untrained import kept  # heavy

        folder = kept(settings.path.removesuffix(UNTRAINED), like=ZOO / "wan22-tiny" / "prompts.txt")
    about = folder / "raydmd.json"
    if not about.is_file():
        return Place(settings=settings)
    facts = _read_json(about)
    sizes: dict[str, Any] = {
        k: facts[k] for k in ("frames", "height", "width") if getattr(settings, k) is None and k in facts
    }
    files = {k: facts[k] for k in ("prompts", "judge", "reward") if k in facts}
    counts = all(isinstance(v, int) and v > 0 for v in sizes.values())
    if not counts or not all(isinstance(v, str) for v in files.values()):
        raise InputError(f"{about} is not readable: sizes must be whole numbers above 0, files must be names")
    for (
        name
    ) in files.values():  # a stranger's folder says what is read, shown and sent to MLflow: nothing outside of it
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{about} names {name!r}, which is not in its folder")
    places = {k: folder / name for k, name in files.items()}
    return Place(settings=settings.model_copy(update={"path": str(folder), **sizes}), **places)


def read_index(settings: Model) -> dict[str, Any]:
    """A pipeline's ``model_index.json``.

    Raises:
        InputError: if there is no such folder or hub id, or it holds no pipeline.
    """
    folder = Path(settings.path)
    if folder.is_dir() or folder.is_absolute() or settings.path.startswith("."):
        file = folder / "model_index.json"
        if not folder.is_dir():
            raise InputError(f"model folder {settings.path!r} does not exist")
        if not file.is_file():
            raise InputError(f"model folder {settings.path!r} has no model_index.json: it is no diffusers pipeline")
    elif "/" not in settings.path:
        zoo = sorted(f.name for f in ZOO.iterdir() if f.is_dir())
        near = nearest_name(settings.path, zoo)
        hint = f"did you mean {near!r}?" if near else f"the zoo has {', '.join(zoo)}; ids on the hub are OWNER/NAME"
        raise InputError(f"model {settings.path!r} is neither a zoo name nor a folder; {hint}")
    else:
        from huggingface_hub import hf_hub_download  # only where there is something to fetch

        try:
            file = Path(hf_hub_download(settings.path, "model_index.json", revision=settings.revision))
        except Exception as error:  # the hub client raises a dozen unrelated types; all mean the same here
            raise InputError(
                f"model {settings.path!r} is neither a zoo name nor a folder, and the hub does not give it: "
                f"{type(error).__name__}: {str(error).splitlines()[0]}"
            ) from None
    return _read_json(file)


def check_part(path: str, part: str) -> None:
    """See that a part of a pipeline's folder has its settings: without them libraries build some default of theirs.

    Raises:
        InputError: if it has none that can be read.
    """
    if Path(path).is_dir():
        _read_json(Path(path) / part / "config.json")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is not readable: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{file} is not readable: it holds no mapping")
    return found
