"""Distil a pipeline, then sample the student with stock diffusers.

    python docs/gallery/distil_and_sample.py

Phased DMD of the zoo's wan22-tiny (two experts, 9 frames of 32x32) on a Ray of its own. Writes two pictures: what the
student draws, and how training went. With a model and prompts of your own only ``RECIPE`` differs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import torch
from diffusers import WanPipeline

from raydmd.recipe import Recipe, derive
from raydmd.training.run import run
from raydmd.zoo.settings import TRAINING

if TYPE_CHECKING:
    from collections.abc import Sequence

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the backend is chosen

RECIPE: dict[str, Any] = {
    "name": "gallery-distil",
    "model.path": "wan22-tiny",
    "method": {"name": "phased", "steps": 4, "shift": 5.0, "boundaries": [0.875], "guidance": 4.0},
    "training": {**TRAINING, "batch": 48, "report_every": 2},  # rates of a model of half a million parameters
    "placement": {"workers": 1, "teachers": 2, "teacher_cpus": 0.25},
    "evaluation": {"samples": 128},
}
PROMPTS = (
    "a red sneaker moving left fast",
    "a blue bag moving up",
    "a green coat moving right slowly",
    "a yellow boot",
)


def main() -> None:
    """Train, unless the run is finished, and write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=160, help="student updates, over both phases")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="the run goes here")
    parser.add_argument("--pictures", type=Path, default=Path(__file__).parent, help="the pictures go here")
    args = parser.parse_args()
    recipe = derive(Recipe(), {**RECIPE, "training.cycles": args.cycles, "output": args.output})
    run(recipe)  # of a finished run: says so and returns
    args.pictures.mkdir(parents=True, exist_ok=True)
    drawn(sample(recipe.folder / "pipeline"), args.pictures / "distil_and_sample.png")
    curves(recipe.folder / "metrics.jsonl", args.pictures / "distil_and_sample_curves.png")


def sample(pipeline: Path) -> list[np.ndarray]:
    """Clips ``(frames, height, width, 3)`` of the prompts: four evaluations each, no guidance, nothing of raydmd."""
    pipe = WanPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    size = {"num_frames": 9, "height": 32, "width": 32, "max_sequence_length": 8}
    clips = []
    for prompt in PROMPTS:
        torch.manual_seed(0)
        clips.append(np.asarray(pipe(prompt, num_inference_steps=4, guidance_scale=1.0, **size).frames[0]))
    return clips


def drawn(clips: Sequence[np.ndarray], file: Path) -> None:
    """Every other frame of each clip, a row for each prompt."""
    shown = range(0, len(clips[0]), 2)
    figure, axes = plt.subplots(len(clips), len(shown), figsize=(1.15 * len(shown) + 2.6, 1.2 * len(clips)))
    for row, prompt, clip in zip(axes, PROMPTS, clips, strict=True):
        for place, frame in zip(row, shown, strict=True):
            place.imshow(np.clip(clip[frame], 0, 1), interpolation="nearest")
            place.set_axis_off()
        row[0].text(
            -0.1, 0.5, prompt.replace(" moving", "\nmoving"), transform=row[0].transAxes, ha="right", va="center"
        )
    figure.subplots_adjust(left=0.3, right=0.99, top=0.98, bottom=0.02, wspace=0.04, hspace=0.06)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def curves(metrics: Path, file: Path) -> None:
    """What to watch: the student's gradient, the fake score's loss, and the spread of the samples."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    titles = {
        "student/gradient": "student: gradient norm",
        "fake/loss": "fake score: loss",
        "student/x0_std": "spread of the samples (dotted: the teacher's)",
    }
    figure, axes = plt.subplots(1, len(titles), figsize=(12, 2.9), layout="constrained")
    for place, (key, title) in zip(axes, titles.items(), strict=True):
        place.plot(*series(rows, key), lw=1.5)
        if key != "student/x0_std":
            place.set_yscale("log")
        else:
            place.plot(*series(rows, "teacher/x0_std"), lw=1.2, ls=":", color="black")
        place.set_title(title, fontsize=9)
        place.set_xlabel("cycle", fontsize=9)
        place.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def series(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Cycles, and a metric at them."""
    found = [(row["cycle"], row[key]) for row in rows if key in row]
    return [x for x, _ in found], [y for _, y in found]


if __name__ == "__main__":
    main()
