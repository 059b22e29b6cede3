"""DPG-Bench (ELLA, arXiv:2403.05135): long prompts, questions on each, answered by a VQA model.

Layout of ELLA's README: per file ``prompts/NAME.txt`` one picture ``NAME.png``, a 2x2 grid of 4 samples;
``dpg_bench/compute_dpg_bench.py`` cuts it by ``--resolution``, the side of one sample, so samples are square.

Not confirmed here, for lack of the tool: the order in which it cuts (it does not matter, the four are
averaged), and the wording of its score file, which :meth:`DpgBench.read` takes to hold the sections
``L1 category scores:`` and ``L2 category scores:`` with lines ``name: value``, and ``DPG-Bench score: value``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from raydmd.errors import InputError
from raydmd.evaluation.benchmarks.base import Benchmark, number, read_text, write_image

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

SCORES = "dpg_scores.txt"
"""What :meth:`DpgBench.read` looks for: the ``--res-path`` of ``compute_dpg_bench.py``, or its output."""

_SECTION = re.compile(r"^\s*(L[12]) category scores:\s*$", re.IGNORECASE)
_TOTAL = re.compile(r"DPG-Bench score:\s*(\S+)", re.IGNORECASE)
_LINE = re.compile(r"^\s+(?P<name>[^:]+):\s*(?P<value>\S+)\s*$")


class DpgBench(Benchmark):
    """Adapter.

    Args:
        texts: prompts by the stems of their files.
    """

    samples_per_prompt = 4

    def __init__(self, texts: dict[str, str]) -> None:
        self._texts = dict(sorted(texts.items()))

    @classmethod
    def from_folder(cls, folder: Path) -> DpgBench:
        """The official prompts, from ELLA's ``dpg_bench/prompts``.

        Raises:
            InputError: if the folder holds no ``.txt`` files.
        """
        texts = {path.stem: read_text(path).strip() for path in folder.glob("*.txt")}
        if not texts:
            raise InputError(f"{folder} holds no prompts (*.txt)")
        return cls(texts)

    def prompts(self) -> list[str]:
        """In the order of their files' names; see :meth:`Benchmark.prompts`."""
        return list(self._texts.values())

    def files(self, prompt: int) -> list[str]:
        """See :meth:`Benchmark.files`."""
        return [f"{list(self._texts)[prompt]}.png"]

    def write(self, folder: Path, prompt: int, clips: Tensor) -> None:
        """Write the grid; see :meth:`Benchmark.write`.

        Raises:
            InputError: if clips do not fit or are not square.
        """
        images = self.pixels(prompt, clips, video=False)[:, 0]
        if images.shape[1] != images.shape[2]:
            raise InputError(f"DPG-Bench cuts squares out of its grids, given {images.shape[2]}x{images.shape[1]}")
        rows = [np.concatenate(list(images[start : start + 2]), axis=1) for start in (0, 2)]
        write_image(folder / self.files(prompt)[0], np.concatenate(rows, axis=0))

    def read(self, folder: Path) -> dict[str, float]:
        """Scores from ``dpg_scores.txt``, times 100 as the tool prints them; see :meth:`Benchmark.read`.

        Returns:
            ``overall``, and ``l1/NAME`` and ``l2/NAME`` by category.

        Raises:
            InputError: if the file or its total is missing, or a value is no number.
        """
        path = folder / SCORES
        found: dict[str, float] = {}
        section = None
        for line in read_text(path).splitlines():
            if head := _SECTION.match(line):
                section = head[1].lower()
            elif total := _TOTAL.search(line):
                section, found["overall"] = None, _value(total[1], path)
            elif section and (entry := _LINE.match(line)):
                found[f"{section}/{entry['name'].strip()}"] = _value(entry["value"], path)
            elif line.strip():
                section = None
        if "overall" not in found:
            raise InputError(f"{path} has no line 'DPG-Bench score: VALUE'")
        return found


def _value(text: str, path: Path) -> float:
    try:
        return number(float(text), str(path))
    except ValueError:
        raise InputError(f"{path}: {text!r} is no finite number") from None
