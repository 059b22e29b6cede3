"""What a folder of noise-image pairs says of itself: where they come from, and which shards there are."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydmd.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

MANIFEST, PROMPTS = "manifest.json", "prompts.json"
FORMAT = 1


class PairsError(InputError):
    """Noise-image pairs can't be used, or can't be gone on with; names the folder, and the file or field."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What decides every bit of the pairs.

    Attributes:
        teacher: digest by file of denoisers and text encoder, see :func:`raydmd.models.identity.fingerprint`.
        boundaries: levels at which the teacher changes its expert.
        text_length: tokens a prompt is padded to.
        precision: of the teacher's forward, ``fp32`` or ``bf16``.
        guidance: its scale, ``uncond + scale * (cond - uncond)``.
        steps: of each walk.
        shift: of its grid.
        solver: of its steps.
        seed: of the noise and of the prompts' order.
        prompts: digest of the negative prompt and the prompts.
        latent: shape of one latent.
        count: pairs.
        shard: pairs in a shard; the last may have fewer.
        request: pairs in one request to the teacher.
        noise: digest of the first pair's noise: another torch might draw other numbers from the same seed.
    """

    teacher: dict[str, str]
    boundaries: tuple[float, ...]
    text_length: int
    precision: str
    guidance: float
    steps: int
    shift: float
    solver: str
    seed: int
    prompts: str
    latent: tuple[int, ...]
    count: int
    shard: int
    request: int
    noise: str

    @property
    def shards(self) -> int:
        """How many there are when all are made."""
        return -(-self.count // self.shard)

    def indices(self, shard: int) -> range:
        """The pairs of a shard."""
        return range(shard * self.shard, min((shard + 1) * self.shard, self.count))


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file.

    Attributes:
        file: its name.
        pairs: in it.
        size: bytes.
        sha256: of its bytes.
    """

    file: str
    pairs: int
    size: int
    sha256: str

    @classmethod
    def of(cls, file: Path, pairs: int) -> Shard:
        """The entry of a file that was just written."""
        return cls(file=file.name, pairs=pairs, size=file.stat().st_size, sha256=_sha256(file))

    def check(self, folder: Path, *, whole: bool) -> None:
        """Refuse a file that is not what was written.

        Args:
            folder: it lies in.
            whole: compare the checksum too, not the size alone.

        Raises:
            PairsError: naming the file and what is wrong.
        """
        file = folder / self.file
        if not file.is_file():
            raise PairsError(f"pairs in {folder}: shard {self.file} is missing")
        if (size := file.stat().st_size) != self.size:
            raise PairsError(f"pairs in {folder}: shard {self.file} has {size} bytes, and was written with {self.size}")
        if whole and _sha256(file) != self.sha256:
            raise PairsError(f"pairs in {folder}: shard {self.file} is corrupt, its checksum is not the manifest's")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A folder's manifest.

    Attributes:
        origin: of the pairs.
        shards: those that are finished, in order.
    """

    origin: Origin
    shards: tuple[Shard, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether all pairs are there."""
        return len(self.shards) == self.origin.shards

    def write(self, folder: Path) -> None:
        """Put it into a folder, at once or not at all."""
        write_text(folder / MANIFEST, json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read a folder's.

        Raises:
            PairsError: if there is none, or it is none of this version's.
        """
        file = folder / MANIFEST
        if not file.is_file():
            raise PairsError(f"no noise-image pairs in {folder}; 'raydmd pairs RECIPE --count N' makes them")
        try:
            tree = json.loads(file.read_text(encoding="utf-8"))
            if tree["format"] != FORMAT:
                raise PairsError(f"{file} is of format {tree['format']}, this raydmd reads {FORMAT}")
            origin, shards = Origin(**tree["origin"]), tuple(Shard(**s) for s in tree["shards"])
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise PairsError(f"{file} is not readable: {type(error).__name__}: {error}") from None
        if odd := next((s.file for s in shards if Path(s.file).name != s.file), None):
            raise PairsError(f"{file} names {odd!r}, which is not in its folder")
        lists = {f.name: tuple(v) for f in fields(origin) if isinstance(v := getattr(origin, f.name), list)}
        return cls(origin=Origin(**{**asdict(origin), **lists}), shards=shards)


def refuse_other(folder: Path, found: Origin, wanted: Origin, names: Sequence[str] | None = None) -> None:
    """Refuse pairs of another origin.

    Args:
        folder: for the message.
        found: what the manifest says.
        wanted: what the recipe says.
        names: fields that must agree; default: all.

    Raises:
        PairsError: naming the first field that differs, and both values; of the teacher the file.
    """
    for name in names or [f.name for f in fields(Origin)]:
        old, new = getattr(found, name), getattr(wanted, name)
        if old == new:
            continue
        if name == "teacher":
            raise PairsError(f"pairs in {folder} are of another teacher: {_other_files(old, new)}")
        if name == "noise":
            raise PairsError(
                f"pairs in {folder}: noise differs: this torch draws other numbers from seed {found.seed} than the one "
                "that made them, so they can't be used here"
            )
        raise PairsError(f"pairs in {folder}: {name} differs: they were made with {old!r}, the recipe has {new!r}")


def write_text(file: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def prompts_digest(negative: str, prompts: Sequence[str]) -> str:
    """Digest of the texts that an origin names."""
    return hashlib.sha256(json.dumps([negative, *prompts]).encode()).hexdigest()


def write_prompts(folder: Path, negative: str, prompts: Sequence[str]) -> None:
    """Keep the texts beside the pairs."""
    write_text(folder / PROMPTS, json.dumps({"negative": negative, "prompts": list(prompts)}, indent=1) + "\n")


def read_prompts(folder: Path, origin: Origin) -> list[str]:
    """The prompts of a folder's pairs.

    Raises:
        PairsError: if the file is missing or not the one that was written.
    """
    file = folder / PROMPTS
    try:
        tree: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        negative, prompts = str(tree["negative"]), [str(p) for p in tree["prompts"]]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise PairsError(f"{file} is not readable: {type(error).__name__}: {error}") from None
    if prompts_digest(negative, prompts) != origin.prompts:
        raise PairsError(f"{file} does not hold the prompts that {folder / MANIFEST} names")
    return prompts


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _other_files(old: dict[str, str], new: dict[str, str]) -> str:
    differs = [f"{f} differs" for f in sorted(old.keys() & new.keys()) if old[f] != new[f]]
    gone = [f"{f} is not in the recipe's model" for f in sorted(old.keys() - new.keys())]
    added = [f"{f} was not in theirs" for f in sorted(new.keys() - old.keys())]
    named = [*differs, *gone, *added]
    return ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
