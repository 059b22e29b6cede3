"""One loop for whatever the zoo trains by flow matching: a given time, one rate cycle, a moving average."""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydmd.process import shift

if TYPE_CHECKING:
    from collections.abc import Callable

PEAK_RATE = 1.5e-3
DROP = 0.1
"""Share of the samples that are trained on the empty prompt."""


def fit(parts: nn.ModuleDict, loss: Callable[[int], tuple[str, Tensor]], *, minutes: float) -> nn.ModuleDict:
    """Train for a fixed wall time with AdamW; the rate falls linearly over it.

    Args:
        parts: what is trained, in place.
        loss: of an update, by its number: a name for the progress line, and a scalar with gradient.
        minutes: wall time to spend.

    Returns:
        The parts' moving average, without gradient.
    """
    average = copy.deepcopy(parts).requires_grad_(False)
    optimizer = torch.optim.AdamW(parts.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    start, step, seen = time.monotonic(), 0, dict[str, float]()
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * min(1.0, (step + 1) / 200) * (1 - done) + 1e-6
        name, value = loss(step)
        optimizer.zero_grad()
        torch.autograd.backward(value)
        nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (step + 1) / (step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(parts.parameters()), 1 - decay)
        now = float(value.detach())
        seen[name] = 0.98 * seen.get(name, now) + 0.02 * now
        if step % 300 == 0:
            print(f"step {step} {done:.0%} {_line(seen)}", flush=True)
        step += 1
    print(f"done after {step} steps: {_line(seen)}", flush=True)
    return average


def fit_flow(
    parts: nn.ModuleDict,
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    latents: Tensor,
    *,
    stretch: float,
    minutes: float,
    batch: int = 64,
) -> nn.ModuleDict:
    """Flow matching of latents with prompts, network and text encoders together.

    Args:
        parts: what is trained, in place.
        predict: velocity towards noise, of noisy latents, their times in [0, 1] and rows of prompts ``(B,)``; row
            ``len(latents)`` is the empty prompt.
        latents: normalised, ``(N, *latent)``.
        stretch: the times' shift.
        minutes: wall time to spend.
        batch: samples per update.

    Returns:
        The parts' moving average, without gradient.
    """

    def loss(_: int) -> tuple[str, Tensor]:
        rows = torch.randint(len(latents), (batch,))
        prompt = torch.where(torch.rand(batch) < DROP, len(latents), rows)
        x0, noise = latents[rows], torch.randn(batch, *latents.shape[1:])
        t = shift(torch.rand(batch), stretch)
        x_t = torch.lerp(x0, noise, t.view(-1, *[1] * (latents.ndim - 1)))
        return "flow", F.mse_loss(predict(x_t, t, prompt), noise - x0)

    return fit(parts, loss, minutes=minutes)


def _line(seen: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.4f}" for name, value in seen.items())
