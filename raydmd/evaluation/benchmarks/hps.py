"""Human preference scores: HPSv2.1 (arXiv:2306.09341) by style, and HPSv3 (arXiv:2508.03789) by sample.

HPSv2's README has the layout: a folder per style, ``anime``, ``concept-art``, ``paintings``, ``photo``, with
``00000.jpg`` and so on; ``hpsv2.evaluate(FOLDER, hps_version="v2.1")`` prints, per style, mean times 100 and
standard deviation. It leaves no file, so its output is to be kept as ``hpsv2.txt``.

HPSv3 scores lists of prompts and paths. ``samples.jsonl`` holds them, and this makes ``scores.jsonl``::

    import json, pathlib, sys
    from hpsv3 import HPSv3RewardInferencer
    folder, judge = pathlib.Path(sys.argv[1]), HPSv3RewardInferencer(device="cuda")
    rows = [json.loads(line) for line in (folder / "samples.jsonl").open()]
    with (folder / "scores.jsonl").open("w") as out:
        for r in rows:
            mu = judge.reward(prompts=[r["prompt"]], image_paths=[str(folder / r["path"])])[0][0].item()
            print(json.dumps({"path": r["path"], "score": mu}), file=out)

Not confirmed here, for lack of the tools: the exact wording of HPSv2's lines, taken to be
``[model] style mean [tab] deviation``, the JPEG quality its examples have, and HPSv3's call as above.
"""

from __future__ import annotations

import json
import re
from statistics import fmean
from typing import TYPE_CHECKING

from raydmd.errors import InputError
from raydmd.evaluation.benchmarks.base import (
    Benchmark,
    number,
    read_json,
    read_rows,
    read_text,
    write_image,
    write_text,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

STYLES = ("anime", "concept-art", "paintings", "photo")
"""HPSv2's."""


class HpsV2(Benchmark):
    """Adapter for HPSv2.1.

    Args:
        styles: prompts by style, each in the benchmark's order: ``hpsv2.benchmark_prompts("all")``.
    """

    samples_per_prompt = 1

    def __init__(self, styles: Mapping[str, Sequence[str]]) -> None:
        self._entries = [(style, place, text) for style, texts in styles.items() for place, text in enumerate(texts)]
        self._styles = tuple(styles)

    @classmethod
    def from_folder(cls, folder: Path) -> HpsV2:
        """The official prompts, from ``benchmark/STYLE.json`` of the data set HPDv2: lists of texts.

        Raises:
            InputError: if a style's file is missing or no list of texts.
        """
        styles = {}
        for style in STYLES:
            texts = read_json(folder / f"{style}.json")
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise InputError(f"{folder / style}.json is no list of texts")
            styles[style] = texts
        return cls(styles)

    def prompts(self) -> list[str]:
        """Style by style; see :meth:`Benchmark.prompts`."""
        return [text for _, _, text in self._entries]

    def files(self, prompt: int) -> list[str]:
        """See :meth:`Benchmark.files`."""
        style, place, _ = self._entries[prompt]
        return [f"{style}/{place:05d}.jpg"]

    def write(self, folder: Path, prompt: int, clips: Tensor) -> None:
        """Write one image; see :meth:`Benchmark.write`.

        Raises:
            InputError: if the clip does not fit.
        """
        write_image(folder / self.files(prompt)[0], self.pixels(prompt, clips, video=False)[0, 0])

    def read(self, folder: Path) -> dict[str, float]:
        """Scores by style and their mean, ``overall``, from ``hpsv2.txt``; see :meth:`Benchmark.read`.

        Raises:
            InputError: if the file or a style's line is missing.
        """
        path = folder / "hpsv2.txt"
        text, scores = read_text(path), {}
        for style in self._styles:
            lines = re.findall(rf"(?m)^(?:.*\s)?{re.escape(style)}\s+(-?\d+(?:\.\d+)?)\s+\d+(?:\.\d+)?\s*$", text)
            if not lines:
                raise InputError(
                    f"{path} has no line '{style} MEAN DEVIATION'; it must hold what hpsv2.evaluate prints"
                )
            scores[style] = float(lines[-1])
        return scores | {"overall": fmean(scores.values())}


class HpsV3(Benchmark):
    """Adapter for HPSv3, for any prompts.

    Args:
        prompts: texts.
        samples_per_prompt: images of each.
    """

    def __init__(self, prompts: Sequence[str], *, samples_per_prompt: int = 1) -> None:
        self._prompts = list(prompts)
        self.samples_per_prompt = samples_per_prompt

    def prompts(self) -> list[str]:
        """See :meth:`Benchmark.prompts`."""
        return list(self._prompts)

    def files(self, prompt: int) -> list[str]:
        """See :meth:`Benchmark.files`."""
        return [f"images/{prompt:05d}-{index}.png" for index in range(self.samples_per_prompt)]

    def write(self, folder: Path, prompt: int, clips: Tensor) -> None:
        """Write images; see :meth:`Benchmark.write`.

        Raises:
            InputError: if clips do not fit.
        """
        for name, frames in zip(self.files(prompt), self.pixels(prompt, clips, video=False), strict=True):
            write_image(folder / name, frames[0])

    def write_list(self, folder: Path) -> None:
        """Write ``samples.jsonl``, rows of ``prompt`` and ``path``, once all images are there.

        Raises:
            InputError: if an image is missing.
        """
        self.check(folder)
        rows = [{"prompt": text, "path": name} for i, text in enumerate(self._prompts) for name in self.files(i)]
        write_text(folder / "samples.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def read(self, folder: Path) -> dict[str, float]:
        """``overall``, the mean over all samples, from ``scores.jsonl``; see :meth:`Benchmark.read`.

        Raises:
            InputError: if the file or a sample's score is missing.
        """
        path = folder / "scores.jsonl"
        scores = {row.get("path"): row.get("score") for row in read_rows(path)}
        found = []
        for prompt in range(len(self._prompts)):
            for name in self.files(prompt):
                if name not in scores:
                    raise InputError(f"{path} has no score of {name} ({self._prompts[prompt]!r})")
                found.append(number(scores[name], f"{path}, {name}"))
        if not found:
            raise InputError("there are no prompts")
        return {"overall": fmean(found)}
