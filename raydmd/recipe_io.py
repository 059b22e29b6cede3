"""Reading what people write: YAML files, dotted overrides, misspelt names.

Which keys there are and what they may hold is :mod:`raydmd.recipe`'s business.
"""

from __future__ import annotations

import difflib
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import BaseModel, ValidationError

from raydmd.errors import InputError
from raydmd.redact import hidden

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Mapping

ALIASES = {
    "accelerator": "placement.worker_gpus",
    "batch_size": "training.batch",
    "boundary": "method.boundaries",
    "boundary_ratio": "method.boundaries",
    "buckets": "data.sizes",
    "cfg": "method.guidance",
    "cfg_scale": "method.guidance",
    "checkpointing_steps": "checkpoints.every",
    "clip_grad": "training.student.clip",
    "data_path": "data.prompts",
    "dfake_gen_update_ratio": "training.fake_updates",
    "dtype": "training.precision",
    "ema_decay": "training.ema",
    "epochs": "training.cycles",
    "fake_lr": "training.fake.rate",
    "flow_shift": "method.shift",
    "fsdp": "training.sharding",
    "gan_loss_weight": "method.gan.weight",
    "gen_cls_loss_weight": "method.gan.weight",
    "generator_lr": "training.student.rate",
    "gpus": "placement.worker_gpus",
    "grad_clip": "training.student.clip",
    "guidance_cls_loss_weight": "method.gan.critic_weight",
    "guidance_scale": "method.guidance",
    "inference_steps": "method.steps",
    "iterations": "training.cycles",
    "learning_rate": "training.student.rate",
    "log_every": "training.report_every",
    "lora_alpha": "training.student.lora.alpha",
    "lora_rank": "training.student.lora.rank",
    "lr": "training.student.rate",
    "max_grad_norm": "training.student.clip",
    "max_steps": "training.cycles",
    "max_train_steps": "training.cycles",
    "mixed_precision": "training.precision",
    "mlflow_uri": "tracking.uri",
    "num_frames": "model.frames",
    "num_gpus": "placement.worker_gpus",
    "num_inference_steps": "method.steps",
    "num_steps": "method.steps",
    "num_train_steps": "training.cycles",
    "num_workers": "placement.workers",
    "num_gpus_per_worker": "placement.worker_gpus",
    "out": "output",
    "output_dir": "output",
    "phases": "method.boundaries",
    "pretrained_model_name_or_path": "model.path",
    "prompt_file": "data.prompts",
    "rank": "training.student.lora.rank",
    "rate": "training.student.rate",
    "resolutions": "data.sizes",
    "run_name": "name",
    "save_every": "checkpoints.every",
    "save_steps": "checkpoints.every",
    "tracking_uri": "tracking.uri",
    "train_batch_size": "training.batch",
    "train_steps": "training.cycles",
    "ttur": "training.fake_updates",
    "update_ratio": "training.fake_updates",
    "warmup_steps": "training.warmup",
}
"""What other code bases call a setting, and where it is here."""


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key may stand only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key_node.start_mark)
            line = key_node.start_mark.line + 1
            if key_node.value in seen:
                where = f"in lines {seen[key_node.value]} and {line}"
                raise yaml.MarkedYAMLError(problem=f"key '{key_node.value}' stands twice, {where}")
            seen[key_node.value] = line
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """The value of a YAML text; a key that stands twice in one mapping is refused.

    Raises:
        yaml.YAMLError: if the text is no such YAML.
    """
    return yaml.load(text, _StrictLoader)


def read_changes(path: Path, whole: Collection[str]) -> dict[str, Any]:
    """What a YAML file sets, by dotted key; not yet checked against a recipe.

    Raises:
        InputError: naming the file, if it is missing, a folder, not UTF-8, no YAML, no mapping,
            or sets a key twice.
    """
    where = f"recipe file {path}"
    try:
        tree = read_yaml(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{where} does not exist") from None
    except IsADirectoryError:
        raise InputError(f"{where} is a folder, not a file") from None
    except UnicodeDecodeError as error:
        bad = f"byte {error.object[error.start]:#04x} at offset {error.start}"
        raise InputError(f"{where} is not UTF-8 text ({bad})") from None
    except OSError as error:
        raise InputError(f"{where} can't be read: {error.strerror}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{where} is no YAML: {_one_line(error)}") from None
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else f"a {type(tree).__name__}"
        raise InputError(f"{where} holds {found}, not a mapping of keys to values")
    try:
        return flatten(tree, whole)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def split_override(text: str) -> tuple[str, str]:
    """Split ``a.b.c=value`` into key and value, both without outer blanks.

    Raises:
        InputError: if there is no ``=``, no key or no value.
    """
    key, sign, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not sign or not key:
        raise InputError(f"override {text!r} is not of the form key.subkey=value")
    if not value:
        raise InputError(f"override '{key}=' has no value; write null to unset, or \"''\" for an empty text")
    return key, value


def read_value(key: str, value: str, *, text: bool) -> Any:
    """What an override's value means: YAML, or for a ``text`` setting the words as they stand.

    Raises:
        InputError: if the value is no YAML.
    """
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if text and not quoted and value not in ("null", "~"):
        return value
    try:
        return read_yaml(value)
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"override '{key}={value}': the value is no YAML: {_one_line(error)}") from None


def flatten(changes: Mapping[Any, Any], whole: Collection[str]) -> dict[str, Any]:
    """Dotted keys to values; keys in ``whole`` keep a mapping as their value, as do empty mappings.

    Raises:
        InputError: if two spellings (nested and dotted) set the same key.
    """
    leaves: dict[str, Any] = {}

    def visit(tree: Mapping[Any, Any], prefix: str) -> None:
        for name, value in tree.items():
            key = f"{prefix}{name}"
            if isinstance(value, dict) and value and key not in whole:
                visit(value, f"{key}.")
            elif key in leaves:
                raise InputError(f"recipe key '{key}' is given twice")
            else:
                leaves[key] = value

    visit(changes, "")
    return leaves


def put(tree: dict[str, Any], key: str, value: Any, whole: Collection[str]) -> None:
    """Set a dotted key in nested mappings; sections on the way that are None are switched on.

    Raises:
        InputError: if a section on the way was set to something else.
    """
    node, (*path, last) = tree, key.split(".")
    for depth, part in enumerate(path, start=1):
        if node.get(part) is None:
            node[part] = {}
        if not isinstance(node[part], dict):
            section = ".".join(path[:depth])
            raise InputError(f"'{section}' is set to {node[part]!r}, so '{key}' can't be set too")
        node = node[part]
    if value != {} or key in whole:
        node[last] = value
    elif node.get(last) is None:
        node[last] = {}


def nearest(word: str, keys: Collection[str]) -> str | None:
    """The key that was most likely meant by ``word``, or None."""
    word = word.strip("-. ").replace("-", "_").lower()
    section, _, last = word.rpartition(".")
    by_name: dict[str, list[str]] = {}
    for key in sorted(keys, key=lambda k: (k.count("."), k)):
        by_name.setdefault(key.rpartition(".")[2], []).append(key)
    alias = ALIASES.get(word) or (ALIASES.get(last) if last not in by_name else None)
    if alias:  # 'training.fake.lr' means the fake's rate, though 'lr' alone means the student's
        here = f"{section}.{alias.rpartition('.')[2]}"
        found = next((k for k in (here, alias) if k in keys), None)
        if found:
            return found
    if last in by_name:  # the right name in the wrong section
        return max(by_name[last], key=lambda k: difflib.SequenceMatcher(None, word, k).ratio())
    close = difflib.get_close_matches(word, keys, n=1, cutoff=0.75)
    if close:
        return close[0]
    close = difflib.get_close_matches(last, by_name, n=1, cutoff=0.7)  # a slip in the last part
    return by_name[close[0]][0] if close else None


def nearest_name(word: str, names: Collection[str]) -> str | None:
    """The name, of a file or whatever else people call as they like, that was most likely meant, or None."""
    return next(iter(difflib.get_close_matches(word, sorted(names), n=1)), None)


def members(annotation: Any) -> list[Any]:
    """The plain types in an annotation, looking through Optional, Union and Annotated."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [m for arg in typing.get_args(annotation) for m in members(arg)]
    if typing.get_origin(annotation) is Annotated:
        return members(typing.get_args(annotation)[0])
    return [annotation]


def keys_of(section: type[BaseModel], prefix: str = "") -> dict[str, bool]:
    """Every dotted key of a section and of those in it, and whether its value is plain text."""
    found: dict[str, bool] = {}
    for name, field in section.model_fields.items():
        kinds = members(field.annotation)
        found[prefix + name] = str in kinds or Path in kinds
        sections = _sections(field.annotation)
        if any(k not in sections and k is not type(None) for k in kinds):
            sections = []  # a number or a mapping: given whole
        for inner in sections:
            found |= keys_of(inner, f"{prefix}{name}.")
    return found


def switched_off(section: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of the sections that are null, with the value it would have; ``...`` where it must be given."""
    found: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            found |= switched_off(value, f"{prefix}{name}.")
        elif value is None:
            for inner in _sections(field.annotation):
                found |= _defaults(inner, f"{prefix}{name}.")
    return found


def _defaults(section: type[BaseModel], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        value = ... if field.is_required() else field.get_default(call_default_factory=True)
        if isinstance(value, BaseModel):
            value = value.model_dump(mode="json")
        found[prefix + name] = value
        if value is None:
            for inner in _sections(field.annotation):
                found |= _defaults(inner, f"{prefix}{name}.")
    return found


def _sections(annotation: Any) -> list[type[BaseModel]]:
    return [k for k in members(annotation) if isinstance(k, type) and issubclass(k, BaseModel)]


def mixed_keys(section: type[BaseModel], prefix: str = "") -> set[str]:
    """Keys of a section, and of those in it, that take a plain value as well as a mapping."""
    found: set[str] = set()
    for name, field in section.model_fields.items():
        kinds = [k for k in members(field.annotation) if k is not type(None)]
        inner = _sections(field.annotation)
        if inner and len(inner) < len(kinds):
            found.add(prefix + name)
        else:
            for k in inner:
                found |= mixed_keys(k, f"{prefix}{name}.")
    return found


def explain(error: ValidationError) -> str:
    """A refusal in our words: each key, what is wrong with it, what was given."""
    lines = []
    for item in error.errors():
        key = ".".join(str(p) for p in item["loc"])
        message = str(item["msg"]).removeprefix("Value error, ")
        given = "" if isinstance(item["input"], dict) else f", given {hidden(repr(item['input']))}"
        lines.append(f"{key}: {message}{given}" if key else message)
    return "; ".join(lines)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
