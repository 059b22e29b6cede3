"""GenEval (arXiv:2310.11513): images of counted, coloured and placed objects, checked by a detector.

Layout of its README: ``00000/metadata.jsonl``, the prompt's own line, and ``00000/samples/0000.png`` to
``0003.png``; its ``evaluate_images.py`` writes one line per image, and its ``summary_scores.py`` averages
them as :meth:`GenEval.read` does. Its generator also writes ``grid.png``, which the evaluation does not
read and which is left out here. Not confirmed here against a copy of the tool.
"""

from __future__ import annotations

import json
from statistics import fmean
from typing import TYPE_CHECKING, Any

from raydmd.errors import InputError
from raydmd.evaluation.benchmarks.base import Benchmark, read_rows, write_image, write_text

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

RESULTS = "results.jsonl"
"""What :meth:`GenEval.read` looks for: the ``--outfile`` of ``evaluate_images.py``."""


class GenEval(Benchmark):
    """Adapter.

    Args:
        metadata: the lines of ``prompts/evaluation_metadata.jsonl`` of GenEval's repository, read by
            :meth:`from_metadata`.

    Raises:
        InputError: if a line lacks ``prompt`` or ``tag``; names it.
    """

    samples_per_prompt = 4

    def __init__(self, metadata: list[dict[str, Any]]) -> None:
        for index, row in enumerate(metadata):
            if not isinstance(row.get("prompt"), str) or not isinstance(row.get("tag"), str):
                raise InputError(f"GenEval's metadata, line {index + 1}: 'prompt' and 'tag' must be texts, given {row}")
        self._metadata = list(metadata)

    @classmethod
    def from_metadata(cls, path: Path) -> GenEval:
        """The official prompts, from ``evaluation_metadata.jsonl``.

        Raises:
            InputError: if the file is missing or a line is of another form.
        """
        return cls(read_rows(path))

    def prompts(self) -> list[str]:
        """See :meth:`Benchmark.prompts`."""
        return [str(row["prompt"]) for row in self._metadata]

    def files(self, prompt: int) -> list[str]:
        """See :meth:`Benchmark.files`."""
        return [f"{prompt:05d}/metadata.jsonl", *self._images(prompt)]

    def write(self, folder: Path, prompt: int, clips: Tensor) -> None:
        """Write images and metadata; see :meth:`Benchmark.write`.

        Raises:
            InputError: if clips do not fit.
        """
        for name, frames in zip(self._images(prompt), self.pixels(prompt, clips, video=False), strict=True):
            write_image(folder / name, frames[0])
        write_text(folder / f"{prompt:05d}" / "metadata.jsonl", json.dumps(self._metadata[prompt]) + "\n")

    def read(self, folder: Path) -> dict[str, float]:
        """Scores from ``results.jsonl``; see :meth:`Benchmark.read`.

        Returns:
            Per tag the share of right images; ``overall``, the mean of the tags; ``images_correct``
            and ``prompts_correct``, the shares over all images, and of prompts with any right image.

        Raises:
            InputError: if the file is missing, a line is of another form, or an image has no score.
        """
        path, right = folder / RESULTS, {}
        for line, row in enumerate(read_rows(path), start=1):
            if not isinstance(row.get("filename"), str) or not isinstance(row.get("correct"), bool):
                raise InputError(f"{path}, row {line}: 'filename' must be a text and 'correct' true or false")
            # The tool writes the path it was given; its end is what it shares with ours.
            right["/".join(row["filename"].replace("\\", "/").split("/")[-3:])] = row["correct"]
        tags: dict[str, list[bool]] = {}
        anywhere = []
        for prompt, about in enumerate(self._metadata):
            for name in self._images(prompt):
                if name not in right:
                    raise InputError(f"{path} has no score of {name} ({about['prompt']!r})")
            hits = [right[name] for name in self._images(prompt)]
            tags.setdefault(about["tag"], []).extend(hits)
            anywhere.append(any(hits))
        scores = {tag: fmean(hits) for tag, hits in tags.items()}
        return scores | {
            "overall": fmean(scores.values()),
            "images_correct": fmean(hit for hits in tags.values() for hit in hits),
            "prompts_correct": fmean(anywhere),
        }

    def _images(self, prompt: int) -> list[str]:
        return [f"{prompt:05d}/samples/{index:04d}.png" for index in range(self.samples_per_prompt)]
