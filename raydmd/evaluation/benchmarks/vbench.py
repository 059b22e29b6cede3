"""VBench (arXiv:2311.17982): videos in, one score per dimension out.

Layout and names are those of its prompt suite's README: ``{prompt}-{index}.mp4``, 5 per prompt, in one
folder, with 25 for the prompts of ``temporal_flickering``, whose filter drops what moves. Scores are
read from the ``*_eval_results.json`` of ``evaluate.py``: dimension to ``[score, list per video]``.

Not confirmed here, for lack of the tool: the number 25 (known from its README), and that its reader
takes MPEG-4 part 2. The leaderboard's totals need normalising constants: ``scripts/cal_final_score.py`` of
VBench makes them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raydmd.errors import InputError
from raydmd.evaluation.benchmarks.base import Benchmark, number, read_json, write_video

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

FLICKERING = "temporal_flickering"
_LONGEST = 255
"""Bytes of a file's name on common file systems."""


class VBench(Benchmark):
    """Adapter; make it with :meth:`from_info` to have the 25 samples where they are due.

    Args:
        prompts: texts, which become file names.
        fps: frames per second of the videos.
        many: indices of the prompts that need 25 samples.

    Raises:
        InputError: if a prompt occurs twice or cannot be a file's name.
    """

    samples_per_prompt = 5

    def __init__(self, prompts: list[str], *, fps: float = 16.0, many: frozenset[int] = frozenset()) -> None:
        seen: set[str] = set()
        for index, prompt in enumerate(prompts):
            if prompt in seen:
                raise InputError(f"VBench names files after prompts, and prompt {index} occurs twice: {prompt!r}")
            seen.add(prompt)
            if not prompt or "/" in prompt or "\0" in prompt or len(f"{prompt}-24.mp4".encode()) > _LONGEST:
                raise InputError(f"prompt {index} cannot be a file's name: {prompt!r}")
        self._prompts = list(prompts)
        self._fps = fps
        self._many = many

    @classmethod
    def from_info(cls, path: Path, *, fps: float = 16.0, dimensions: frozenset[str] | None = None) -> VBench:
        """The official prompts.

        Args:
            path: ``VBench_full_info.json`` of the ``vbench`` package: objects with ``prompt_en`` and
                ``dimension``, a list.
            fps: frames per second of the videos.
            dimensions: only prompts of these; default: all.

        Raises:
            InputError: if the file is missing or of another form, or no prompt is left.
        """
        kept: dict[str, set[str]] = {}
        try:
            for row in read_json(path):
                if dimensions is None or dimensions & set(row["dimension"]):
                    kept.setdefault(row["prompt_en"], set()).update(row["dimension"])
        except (KeyError, TypeError) as error:
            raise InputError(f"{path} is no VBench_full_info.json: {error!r}") from None
        if not kept:
            raise InputError(f"{path} has no prompts of the dimensions {sorted(dimensions or ())}")
        flickers = dimensions is None or FLICKERING in dimensions
        many = frozenset(i for i, of in enumerate(kept.values()) if flickers and FLICKERING in of)
        return cls(list(kept), fps=fps, many=many)

    def prompts(self) -> list[str]:
        """See :meth:`Benchmark.prompts`."""
        return list(self._prompts)

    def samples_of(self, prompt: int) -> int:
        """See :meth:`Benchmark.samples_of`."""
        return 25 if prompt in self._many else self.samples_per_prompt

    def files(self, prompt: int) -> list[str]:
        """See :meth:`Benchmark.files`."""
        return [f"{self._prompts[prompt]}-{index}.mp4" for index in range(self.samples_of(prompt))]

    def write(self, folder: Path, prompt: int, clips: Tensor) -> None:
        """Write videos; see :meth:`Benchmark.write`.

        Raises:
            InputError: if clips do not fit, or have odd sides.
        """
        for name, frames in zip(self.files(prompt), self.pixels(prompt, clips, video=True), strict=True):
            write_video(folder / name, frames, fps=self._fps)

    def read(self, folder: Path) -> dict[str, float]:
        """Scores by dimension, from all ``*_eval_results.json``; see :meth:`Benchmark.read`.

        Raises:
            InputError: if there is none, one is of another form, or two disagree on a dimension.
        """
        found: dict[str, float] = {}
        paths = sorted(folder.glob("*_eval_results.json"))
        if not paths:
            raise InputError(f"{folder} holds no *_eval_results.json; VBench's evaluate.py writes it")
        for path in paths:
            content = read_json(path)
            if not isinstance(content, dict):
                raise InputError(f"{path} is no object of dimensions")
            for dimension, entry in content.items():
                if not isinstance(entry, list) or not entry:
                    raise InputError(f"{path}, {dimension}: expected [score, list per video]")
                score = number(entry[0], f"{path}, {dimension}")
                if found.setdefault(dimension, score) != score:
                    raise InputError(f"{path}, {dimension}: another file of {folder} has another score; remove one")
        return found
