"""Ask a pool of teachers and a pool of rewards from a script of your own.

    python docs/gallery/serve_teacher_and_rewards.py

Starts a Ray, two replicas of the zoo's sd35-tiny and one of its reward model. The teacher walks eight noises to clean
latents in one call, says what it makes of one of them at five noise levels, and the rewards judge every picture for
every prompt. Requests are pure: a replica that dies costs a retry. Writes a picture of all three answers.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import ray
import torch

from raydmd.guidance import Guidance
from raydmd.models import load_family
from raydmd.process import step_grid
from raydmd.recipe import Recipe, derive
from raydmd.serving.messages import RewardRequest, ScoreRequest, WalkRequest
from raydmd.serving.pool_client import PoolClient
from raydmd.training.cluster import connect
from raydmd.training.pools import reward_pool, teacher_pool
from raydmd.training.prepare import quiet

if TYPE_CHECKING:
    from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the backend is chosen

PROMPTS = [
    *("a red bag top left", "a blue boot bottom right", "a green coat", "a yellow sandal small"),
    *("a red dress bottom left", "a blue trouser top right", "a green sneaker small", "a yellow shirt"),
]
LEVELS = (1.0, 0.9, 0.75, 0.5, 0.25)


def main() -> None:
    """Serve, ask, and draw what was answered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs"), help="encoded prompts go here")
    parser.add_argument("--pictures", type=Path, default=Path(__file__).parent, help="the picture goes here")
    args = parser.parse_args()
    quiet()
    settings = {
        "name": "gallery-serve",
        "output": args.output.absolute(),
        "model.path": "sd35-tiny",
        "method": {"name": "amd", "steps": 4, "shift": 3.0},  # the method whose rewards are asked
        "placement": {"teachers": 2, "teacher_cpus": 0.25, "reward_cpus": 0.25},
    }
    recipe = derive(Recipe(), settings)
    family = load_family(recipe.model)
    table = family.encode(PROMPTS, recipe.output / "conditions")  # encoded once; row 0 is the negative prompt
    latent, rows = family.shape().latent, tuple(range(1, len(PROMPTS) + 1))
    noise = torch.randn(len(PROMPTS), *latent, generator=torch.Generator().manual_seed(1))
    guided = Guidance(3.5)
    connect()
    try:
        with contextlib.ExitStack() as open_pools:
            teachers = open_pools.enter_context(teacher_pool(recipe, family, table, latent))
            judges = open_pools.enter_context(reward_pool(recipe, family, PROMPTS))
            teacher, judge = (PoolClient(p.client_spec(), "script") for p in (teachers, judges))
            grid = tuple(step_grid(20, recipe.method.shift))
            walk = WalkRequest(x_t=noise, grid=grid, conditions=rows, guidance=guided, name="walk")
            clean = teacher.submit(walk).result().answer.value
            # One question a noise level, all under way at once; the replicas share them.
            noisy = [family.process.add_noise(clean[:1], noise[:1], torch.tensor([t])) for t in LEVELS]
            expert = family.routing().expert
            asked = [
                ScoreRequest(x_t=x, t=torch.tensor([t]), conditions=rows[:1], guidance=guided, expert=expert(t))
                for x, t in zip(noisy, LEVELS, strict=True)
            ]
            pending = [teacher.submit(request) for request in asked]
            guesses = torch.cat([answer.result().answer.value for answer in pending])
            every = tuple(row for row in rows for _ in rows)
            rewards = judge.submit(RewardRequest(x_t=clean.repeat(len(rows), 1, 1, 1), conditions=every, name="all"))
            judged = rewards.result().answer.value.view(len(rows), len(rows))  # prompt by picture
    finally:
        ray.shutdown()
    right = int((judged.argmax(0) == torch.arange(len(rows))).sum())
    print(f"for {right} of {len(rows)} pictures the reward is highest for their own prompt")
    args.pictures.mkdir(parents=True, exist_ok=True)
    draw(family.decode(torch.cat(noisy)), family.decode(guesses), family.decode(clean), judged, args.pictures)


def draw(noisy: Tensor, guesses: Tensor, clean: Tensor, judged: Tensor, folder: Path) -> None:
    """What was sent and answered: guesses by noise level, and rewards by prompt and picture."""
    figure = plt.figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.25))
    axes = left.subplots(2, len(LEVELS))
    for row, title, clips in ((0, "sent: x_t", noisy), (1, "answered: guess of x0", guesses)):
        for place, t, clip in zip(axes[row], LEVELS, clips, strict=True):
            place.imshow(clip[0].permute(1, 2, 0), interpolation="nearest")
            place.set_xticks([])
            place.set_yticks([])
            place.set_title(f"t = {t:g}" if row == 0 else "", fontsize=9)
        axes[row][0].set_ylabel(title, fontsize=9)
    left.suptitle(f"teacher: {PROMPTS[0]!r}", fontsize=10)
    place = right.subplots()
    shown = place.imshow(judged, cmap="viridis", vmin=float(judged.quantile(0.05)), aspect="auto")
    place.set_yticks(range(len(PROMPTS)), PROMPTS, fontsize=8)
    place.set_xticks([])
    for column, clip in enumerate(clean):
        small = place.inset_axes((column / len(clean), -0.2, 1 / len(clean), 0.18))
        small.imshow(clip[0].permute(1, 2, 0), interpolation="nearest")
        small.set_axis_off()
    right.colorbar(shown, ax=place, label="reward", pad=0.01)
    right.suptitle("rewards: every prompt (rows) with every picture (columns)", fontsize=10)
    figure.savefig(folder / "serve_teacher_and_rewards.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
