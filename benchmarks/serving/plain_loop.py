"""DMD2 and DP-DMD on SD3.5's architecture in plain PyTorch and diffusers, one file, one process, nothing of raydmd.

Written to be compared with: the step that raydmd takes (arXiv:2405.14867, section 4: backward simulation, a guided
teacher, several fake updates per student update; arXiv:2602.03139, section 3: the student's steps unrolled, the first
of them led by the teacher's first ones), as anyone would write it for one model.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor

if TYPE_CHECKING:
    from pathlib import Path

GUIDANCE = 3.5
SHIFT = 3.0
ANCHOR, OF, WEIGHT = 5, 30, 0.05
"""Steps of the teacher that a first step follows, of so many from noise to clean; and the weight of that."""


class Loop:
    """Student, fake score and teacher, and a step.

    Args:
        pipeline: folder of a StableDiffusion3Pipeline.
        conditions: safetensors of ``embeds`` and ``pooled``; row 0 is the negative prompt.
        batch: samples per update.
        steps: of the student.
        latent: shape of one latent.
        anchored: DP-DMD, else DMD2.
    """

    def __init__(
        self, pipeline: Path, conditions: Path, *, batch: int, steps: int, latent: tuple[int, ...], anchored: bool
    ) -> None:
        def load() -> SD3Transformer2DModel:
            return SD3Transformer2DModel.from_pretrained(pipeline, subfolder="transformer")

        self.student, self.fake, self.teacher = load().train(), load().train(), load().eval().requires_grad_(False)
        self.by = {
            "student": torch.optim.AdamW(self.student.parameters(), lr=5e-5, betas=(0.0, 0.999), fused=True),
            "fake": torch.optim.AdamW(self.fake.parameters(), lr=4e-7, betas=(0.0, 0.999), fused=True),
        }
        table = load_file(conditions)
        self.embeds, self.pooled = table["embeds"], table["pooled"]
        self.grid, self.walked = times(steps), times(OF)[: ANCHOR + 1]
        self.batch, self.latent, self.anchored = batch, latent, anchored
        self.draw = torch.Generator().manual_seed(0)

    def step(self, exits: list[int]) -> None:
        """One student update and the fake updates; ``exits`` says where each rollout leaves, the student's first."""
        rows = self.rows()
        noise = torch.randn(len(rows), *self.latent, generator=self.draw)
        x0, first = (
            self.unroll(rows, noise) if self.anchored else (self.rollout(rows, exits[0], noise, grad=True), None)
        )
        t = self.times()
        with torch.no_grad():
            x_t = self.noised(x0, t)
            real = self.guided(x_t, t, rows)
            target = self.anchor(rows, noise) if self.anchored else None
        for exit_step in exits[1:]:
            self.train_fake(exit_step)
        with torch.no_grad():
            fake = self.x0(self.fake, x_t, t, rows)
            scale = (x0 - real).abs().flatten(1).mean(1).clamp(min=1e-4).view(-1, 1, 1, 1)
            matched = x0 - (fake - real) / scale
        loss = 0.5 * F.mse_loss(x0, matched)
        if first is not None and target is not None:
            loss = loss + WEIGHT * F.mse_loss(first, target)
        self.update("student", self.student, loss)

    def train_fake(self, exit_step: int) -> None:
        """One update of the fake score on a sample of the student."""
        rows = self.rows()
        with torch.no_grad():
            start = torch.randn(len(rows), *self.latent, generator=self.draw)
            x0 = self.unroll(rows, start)[0] if self.anchored else self.rollout(rows, exit_step, start, grad=False)
        t, noise = self.times(), torch.randn(x0.shape, generator=self.draw)
        s = t.view(-1, 1, 1, 1)
        output = self.network(self.fake, (1 - s) * x0 + s * noise, t, rows)
        self.update("fake", self.fake, F.mse_loss(output, noise - x0))

    def unroll(self, rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The student's sample by all of its steps, and its first prediction, at which the sample's gradient ends."""
        first = x0 = self.x0(self.student, x, self.filled(self.grid[0]), rows)
        x = self.euler(x, first.detach(), self.grid[0], self.grid[1])
        for i in range(1, len(self.grid) - 1):
            x0 = self.x0(self.student, x, self.filled(self.grid[i]), rows)
            x = self.euler(x, x0, self.grid[i], self.grid[i + 1])
        return x, first

    def anchor(self, rows: Tensor, noise: Tensor) -> Tensor:
        """What a first step should predict: where the line to the teacher's latent after its first steps ends."""
        x = noise
        for now, after in itertools.pairwise(self.walked):
            x = self.euler(x, self.guided(x, self.filled(now), rows), now, after)
        return noise - (noise - x) / (1 - self.walked[-1])

    def guided(self, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        """The teacher's clean prediction."""
        twice = torch.cat([rows, torch.zeros_like(rows)])
        cond, uncond = self.x0(self.teacher, torch.cat([x, x]), torch.cat([t, t]), twice).chunk(2)
        return uncond + GUIDANCE * (cond - uncond)

    @staticmethod
    def euler(x: Tensor, x0: Tensor, now: float, after: float) -> Tensor:
        """A step along the straight line to a clean latent."""
        return x0 + after / now * (x - x0)

    def rollout(self, rows: Tensor, exit_step: int, x: Tensor, *, grad: bool) -> Tensor:
        """The student's sample, which leaves at a step with a jump to clean."""
        for i in range(exit_step):
            with torch.no_grad():
                x0 = self.x0(self.student, x, self.filled(self.grid[i]), rows)
            x = self.noised(x0, self.filled(self.grid[i + 1]))
        with torch.set_grad_enabled(grad):
            return self.x0(self.student, x, self.filled(self.grid[exit_step]), rows)

    def update(self, name: str, network: SD3Transformer2DModel, loss: Tensor) -> None:
        """Backward, clip, step."""
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise RuntimeError(f"{name}: gradient {norm}")
        self.by[name].step()
        self.by[name].zero_grad(set_to_none=True)

    def network(self, network: SD3Transformer2DModel, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        """The raw prediction."""
        output: Tensor = network(
            hidden_states=x,
            encoder_hidden_states=self.embeds[rows],
            pooled_projections=self.pooled[rows],
            timestep=t * 1000,
            return_dict=False,
        )[0]
        return output

    def x0(self, network: SD3Transformer2DModel, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        """The clean prediction."""
        return x - t.view(-1, 1, 1, 1) * self.network(network, x, t, rows)

    def noised(self, x0: Tensor, t: Tensor) -> Tensor:
        """A clean latent with fresh noise."""
        s = t.view(-1, 1, 1, 1)
        return (1 - s) * x0 + s * torch.randn(x0.shape, generator=self.draw)

    def rows(self) -> Tensor:
        """Prompts of a batch."""
        return torch.randint(1, len(self.embeds), (self.batch,), generator=self.draw)

    def times(self) -> Tensor:
        """Levels of a batch."""
        u = 0.02 + 0.96 * torch.rand(self.batch, generator=self.draw)
        return SHIFT * u / (1 + (SHIFT - 1) * u)

    def filled(self, t: float) -> Tensor:
        """One time for a batch."""
        return torch.full((self.batch,), t)


def times(steps: int) -> list[float]:
    """So many steps from noise to clean."""
    raw = torch.linspace(1, 0, steps + 1)
    shifted: list[float] = (SHIFT * raw / (1 + (SHIFT - 1) * raw)).tolist()
    return shifted
