"""DMD2 on SD3.5's architecture in plain PyTorch and diffusers, one file, one process, nothing of raydmd.

Written to be compared with: the step that raydmd takes (arXiv:2405.14867, section 4: backward simulation, a guided
teacher, several fake updates per student update), as anyone would write it for one model.
"""

from __future__ import annotations

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


class Loop:
    """Student, fake score and teacher, and a step.

    Args:
        pipeline: folder of a StableDiffusion3Pipeline.
        conditions: safetensors of ``embeds`` and ``pooled``; row 0 is the negative prompt.
        batch: samples per update.
        steps: of the student.
        latent: shape of one latent.
    """

    def __init__(self, pipeline: Path, conditions: Path, *, batch: int, steps: int, latent: tuple[int, ...]) -> None:
        def load() -> SD3Transformer2DModel:
            return SD3Transformer2DModel.from_pretrained(pipeline, subfolder="transformer")

        self.student, self.fake, self.teacher = load().train(), load().train(), load().eval().requires_grad_(False)
        self.by = {
            "student": torch.optim.AdamW(self.student.parameters(), lr=5e-5, betas=(0.0, 0.999), fused=True),
            "fake": torch.optim.AdamW(self.fake.parameters(), lr=4e-7, betas=(0.0, 0.999), fused=True),
        }
        table = load_file(conditions)
        self.embeds, self.pooled = table["embeds"], table["pooled"]
        raw = torch.linspace(1, 0, steps + 1)
        self.grid = (SHIFT * raw / (1 + (SHIFT - 1) * raw)).tolist()
        self.batch, self.latent = batch, latent
        self.draw = torch.Generator().manual_seed(0)

    def step(self, exits: list[int]) -> None:
        """One student update and the fake updates; ``exits`` says where each rollout leaves, the student's first."""
        rows = self.rows()
        x0 = self.rollout(rows, exits[0], grad=True)
        t = self.times()
        with torch.no_grad():
            x_t = self.noised(x0, t)
            twice = torch.cat([rows, torch.zeros_like(rows)])
            cond, uncond = self.x0(self.teacher, torch.cat([x_t, x_t]), torch.cat([t, t]), twice).chunk(2)
            real = uncond + GUIDANCE * (cond - uncond)
        for exit_step in exits[1:]:
            self.train_fake(exit_step)
        with torch.no_grad():
            fake = self.x0(self.fake, x_t, t, rows)
            scale = (x0 - real).abs().flatten(1).mean(1).clamp(min=1e-4).view(-1, 1, 1, 1)
            target = x0 - (fake - real) / scale
        self.update("student", self.student, 0.5 * F.mse_loss(x0, target))

    def train_fake(self, exit_step: int) -> None:
        """One update of the fake score on a sample of the student."""
        rows = self.rows()
        with torch.no_grad():
            x0 = self.rollout(rows, exit_step, grad=False)
        t, noise = self.times(), torch.randn(x0.shape, generator=self.draw)
        s = t.view(-1, 1, 1, 1)
        output = self.network(self.fake, (1 - s) * x0 + s * noise, t, rows)
        self.update("fake", self.fake, F.mse_loss(output, noise - x0))

    def rollout(self, rows: Tensor, exit_step: int, *, grad: bool) -> Tensor:
        """The student's sample, which leaves at a step with a jump to clean."""
        x = torch.randn(len(rows), *self.latent, generator=self.draw)
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
