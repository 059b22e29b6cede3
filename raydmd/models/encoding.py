"""Prompts to conditions: encoded once, cached by content, in parts that may be made anywhere."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from raydmd.errors import InputError
from raydmd.models.base import Conditions
from raydmd.models.identity import fingerprint
from raydmd.models.reading import understood

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from raydmd import recipe as recipes

    Spread = Callable[[Sequence[Sequence[str]], Path], None]

NOT_UNDERSTOOD = (ValueError, TypeError, KeyError, IndexError, AttributeError)
"""What tokenizers and text encoders raise over settings that make no sense."""
CHUNK = 64
"""Prompts in one forward of the text encoders."""


class Encoding(ABC):
    """What a family does with prompts."""

    pipeline: Any
    """Its diffusers pipeline class."""
    text_parts: tuple[str, ...]
    """The pipeline's parts that make conditions of prompts, where it has them."""
    part: int = 4096
    """Prompts in one part of a table: what is encoded, and kept, at once."""
    _settings: recipes.Model

    @abstractmethod
    def text_length(self) -> int:
        """Tokens a prompt is padded to, or cut at."""

    @abstractmethod
    def _encode(self, texts: Sequence[str], length: int) -> Conditions:
        """Run the text encoders, fp32; called under ``no_grad``. The first text is the negative prompt."""

    @abstractmethod
    def _text_pipeline(self) -> Any:
        """The stock pipeline with its text parts alone, so that prompts are cut and padded as it does."""

    @abstractmethod
    def _has(self, part: str) -> bool:
        """Whether the pipeline has a part."""

    def encode(self, prompts: Sequence[str], cache: Path, *, spread: Spread | None = None) -> Path:
        """Encode prompts (with the negative prompt as row 0) once; cached by content, and resumable by parts.

        Args:
            prompts: at least one.
            cache: folder of such files.
            spread: does :meth:`encode_part` in a folder for missing parts, in any order or place; default: here.

        Returns:
            The file, of ``1 + len(prompts)`` rows, for :meth:`~raydmd.models.base.Conditions.read`.

        Raises:
            InputError: if parts were made elsewhere, but are not here.
        """
        file = self._encoded(prompts, cache)
        if file.is_file():
            return file
        parts = [list(prompts[i : i + self.part]) for i in range(0, len(prompts), self.part)]
        # A folder of this table alone: another's parts may hold the same prompts.
        folder = file.with_suffix(".parts") if len(parts) > 1 else cache
        missing = [part for part in parts if not self._encoded(part, folder).is_file()]
        (spread or self._here)(missing, folder)
        if file.is_file():  # of one part, or another run with the same prompts was faster
            return file
        files = [self._encoded(part, folder) for part in parts]
        if lost := sum(not part.is_file() for part in files):
            raise InputError(
                f"{lost} of {len(parts)} parts of encoded prompts are not in {folder}: do all nodes share it?"
            )
        _write(Conditions.table([Conditions.read(part) for part in files]), file)
        for part in files:
            part.unlink(missing_ok=True)
        with suppress(OSError):  # another run is at it
            folder.rmdir()
        return file

    def _here(self, parts: Sequence[Sequence[str]], folder: Path) -> None:
        for part in parts:
            self.encode_part(part, folder)

    @torch.no_grad()
    def encode_part(self, prompts: Sequence[str], folder: Path) -> None:
        """Encode prompts at once, unless they are; see :meth:`encode`."""
        file = self._encoded(prompts, folder)
        if not file.is_file():
            with understood(f"model {self._settings.path!r}, its tokenizers or text encoders,", NOT_UNDERSTOOD):
                found = self._encode([self._settings.negative_prompt, *prompts], self.text_length())
            _write(found.to(torch.device("cpu")), file)

    def _encoded(self, prompts: Sequence[str], folder: Path) -> Path:
        texts = [self._settings.negative_prompt, *prompts]
        key = json.dumps([self._read_by, self.text_length(), texts, *self._seen(prompts)]).encode()
        return folder / f"{hashlib.sha256(key).hexdigest()[:24]}.safetensors"

    @cached_property
    def _read_by(self) -> list[Any]:
        """What beside the prompts a table depends on."""
        return [self.pipeline.__name__, fingerprint(self._settings, self.conditioning())]

    def _seen(self, prompts: Sequence[str]) -> list[str]:
        """What beside their texts a table depends on of the prompts."""
        del prompts
        return []

    def _encoders(self) -> Any:
        """The stock pipeline's text parts, on a GPU where there is one."""
        return self._text_pipeline().to("cuda" if torch.cuda.is_available() else "cpu")

    def conditioning(self) -> tuple[str, ...]:
        """Those :attr:`text_parts` that this pipeline has."""
        return tuple(part for part in self.text_parts if self._has(part))


def _write(conditions: Conditions, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    conditions.save(partial)
    partial.replace(file)


def chunks(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts, as many at once as the text encoders take."""
    for i in range(0, len(texts), CHUNK):
        yield list(texts[i : i + CHUNK])
