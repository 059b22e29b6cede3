"""One loop for whatever the zoo trains by flow matching: a given time, one rate cycle, a moving average."""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

PEAK_RATE = 1.5e-3


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


def _line(seen: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.4f}" for name, value in seen.items())
