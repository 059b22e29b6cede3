"""What every benchmark's adapter offers, and the files they are made of."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from PIL import Image

from raydmd.errors import InputError, NonFiniteError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor


class Benchmark(ABC):
    """A list of prompts, how their samples lie on disk, and how scores are read.

    Samples may be written prompt by prompt, in any order and by many processes: each prompt's files are
    its own, and none is there before it is whole. ``missing`` says what a resumed run still has to make.

    Attributes:
        samples_per_prompt: how many clips :meth:`write` takes; :meth:`samples_of` where prompts differ.
    """

    samples_per_prompt: int

    @abstractmethod
    def prompts(self) -> list[str]:
        """All prompts in the benchmark's order."""

    @abstractmethod
    def files(self, prompt: int) -> list[str]:
        """Paths below the folder of all files of one prompt.

        Args:
            prompt: its index in :meth:`prompts`.
        """

    @abstractmethod
    def write(self, folder: Path, prompt: int, clips: Tensor) -> None:
        """Write one prompt's samples.

        Args:
            folder: of the whole benchmark.
            prompt: its index in :meth:`prompts`.
            clips: ``(R, F, 3, H, W)`` in [0, 1], R the samples of this prompt; F is 1 for images.

        Raises:
            InputError: if number or shape of the clips is not what the benchmark expects.
            NonFiniteError: if a clip is not finite; names the prompt.
        """

    @abstractmethod
    def read(self, folder: Path) -> dict[str, float]:
        """Read the scores that the benchmark's own tool left.

        Args:
            folder: with its output; see the adapter for the files' names.

        Returns:
            Figures by name, in the tool's own scale.

        Raises:
            InputError: if a file or the score of a sample is missing or not readable; names it.
        """

    def samples_of(self, prompt: int) -> int:
        """How many samples one prompt has, by its index."""
        del prompt
        return self.samples_per_prompt

    def missing(self, folder: Path) -> list[int]:
        """Indices of the prompts of which a file is not there yet."""
        return [p for p in range(len(self.prompts())) if not all((folder / name).is_file() for name in self.files(p))]

    def check(self, folder: Path) -> None:
        """Refuse a folder that the benchmark's tool would score without noticing what lacks.

        Raises:
            InputError: if a prompt's file is missing; names the first.
        """
        if absent := self.missing(folder):
            first = next(name for name in self.files(absent[0]) if not (folder / name).is_file())
            raise InputError(
                f"{folder}: {len(absent)} of {len(self.prompts())} prompts are not complete; "
                f"the first file missing is {first} ({self.prompts()[absent[0]]!r})"
            )

    def pixels(self, prompt: int, clips: Tensor, *, video: bool) -> NDArray[np.uint8]:
        """One prompt's clips as bytes ``(R, F, H, W, 3)``.

        Args:
            prompt: its index.
            clips: ``(R, F, 3, H, W)`` in [0, 1].
            video: whether several frames are expected, or one.

        Raises:
            InputError: if number or shape do not fit.
            NonFiniteError: if a clip is not finite.
        """
        what = f"{type(self).__name__}, prompt {prompt} ({self.prompts()[prompt]!r})"
        count = self.samples_of(prompt)
        fits = clips.ndim == 5 and len(clips) == count and clips.shape[2] == 3 and (clips.shape[1] > 1) == video
        if not fits:
            frames = "F > 1" if video else "1"
            raise InputError(f"{what}: clips must be ({count}, {frames}, 3, H, W), given {tuple(clips.shape)}")
        if not bool(clips.isfinite().all()):
            raise NonFiniteError(f"{what}: a sample is not finite")
        grey = (clips.detach().float().clamp(0, 1) * 255).round().byte()
        return np.ascontiguousarray(grey.permute(0, 1, 3, 4, 2).cpu().numpy())


def write_image(path: Path, image: NDArray[np.uint8]) -> None:
    """Write an image ``(H, W, 3)`` in the format its name ends with, JPEG at quality 95."""

    def save(to: Path) -> None:
        Image.fromarray(image).save(to, quality=95)

    _whole(path, save)


def write_text(path: Path, text: str) -> None:
    """Write a text file, UTF-8."""

    def save(to: Path) -> None:
        to.write_text(text, encoding="utf-8")

    _whole(path, save)


def write_video(path: Path, frames: NDArray[np.uint8], *, fps: float) -> None:
    """Write frames ``(F, H, W, 3)`` as MPEG-4 in an mp4, by OpenCV.

    Its loss is mostly that of halved chroma: on a panning photograph 33.3 dB, against 34.0 dB of the
    4:2:0 sampling that every common mp4 has.

    Args:
        path: ends with ``.mp4``.
        frames: bytes; height and width must be even.
        fps: frames per second.

    Raises:
        InputError: if a side is odd, or this OpenCV cannot write mp4.
    """
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise InputError(f"{path.name}: an mp4 needs even sides, given {width}x{height}")

    def save(to: Path) -> None:
        code = cv2.VideoWriter.fourcc(*"mp4v")
        writer = cv2.VideoWriter(str(to), cv2.CAP_FFMPEG, code, fps, (width, height))
        if not writer.isOpened():
            raise InputError(f"{path}: this OpenCV cannot write mp4; PyPI's opencv-python-headless can")
        for frame in frames:
            writer.write(np.ascontiguousarray(frame[..., ::-1]))
        writer.release()

    _whole(path, save)


def read_json(path: Path) -> Any:
    """The contents of a JSON file.

    Raises:
        InputError: if it is missing or no JSON.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is no JSON: {error}") from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file with one JSON object per line.

    Raises:
        InputError: if it is missing or a line is no object; names the line.
    """
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: no JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: no JSON object")
        rows.append(row)
    return rows


def read_text(path: Path) -> str:
    """The contents of a text file, UTF-8.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def number(value: Any, where: str) -> float:
    """A finite score.

    Args:
        value: what a tool wrote.
        where: file and entry, for the message.

    Raises:
        InputError: if it is no finite number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{where}: {value!r} is no finite number")
    return float(value)


def _whole(path: Path, save: Callable[[Path], None]) -> None:
    """Write beside the file and move it into place, so that a killed run leaves no half sample."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The ending stays, for writers choose their format by it; the rest is short, for names may be at the
    # file system's limit, and always the same, so that a resumed run replaces what a killed one left.
    draft = path.with_name(f".{hashlib.sha256(path.name.encode()).hexdigest()[:16]}{path.suffix}")
    try:
        save(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
