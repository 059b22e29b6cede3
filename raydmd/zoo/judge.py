"""Networks that look at clips and pictures: features for distances, predictions of the zoo's attributes."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raydmd.errors import InputError, NonFiniteError
from raydmd.zoo.still import StillCaption
from raydmd.zoo.world import SIZE, Caption, MovingCaption

if TYPE_CHECKING:
    from pathlib import Path

Render = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
"""Batch size and generator to clips ``(B, F, 3, 32, 32)`` in [0, 1] and labels ``(B, 4)``; a picture has one frame."""

LANGUAGES: tuple[type[Caption], ...] = (MovingCaption, StillCaption)
"""The zoo's worlds, by their captions."""

Body = Literal["conv", "attention"]
"""How a judge looks: through convolutions, or as a small vision transformer. Two kinds share fewer blind spots."""

BATCH = 64
PEAK_RATE = 2e-3
FEATURES = 64
_CHUNK = 128
_WARM = 0.25
"""Share of the time in which the rate rises."""


class Judge(ABC):
    """What metrics need of a network that has seen real clips.

    Attributes:
        language: the captions of the world it knows.
    """

    language: type[Caption] = MovingCaption

    @abstractmethod
    def features(self, clips: Tensor) -> Tensor:
        """Features in which distances mean something.

        Args:
            clips: ``(N, F, 3, H, W)`` in [0, 1].

        Returns:
            ``(N, D)``, float.
        """

    @abstractmethod
    def predict(self, clips: Tensor) -> dict[str, Tensor]:
        """The value of every attribute of the zoo's world.

        Args:
            clips: ``(N, F, 3, H, W)`` in [0, 1].

        Returns:
            For each of the language's attributes the values' indices, ``(N,)``, int64.
        """


class AttributeJudge(Judge, nn.Module):
    """A small network that names the attributes of a clip or a picture.

    It takes clips of 9 frames, or 1, of 32x32 pixels. Time and space stay resolved until one linear layer,
    because where an item is when is what tells direction and speed, and where it is at all its place.

    Args:
        language: the captions of the world it judges.
        body: the kind of network.
    """

    def __init__(self, language: type[Caption] = MovingCaption, body: Body = "conv") -> None:
        super().__init__()
        self.language = language
        self.body, width = _convolutions(language.frames) if body == "conv" else _attention(language.frames)
        self.penultimate = nn.Linear(width, FEATURES)
        attributes = language.attributes
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, len(values)) for name, values in attributes.items()})

    def forward(self, clips: Tensor) -> dict[str, Tensor]:
        """Logits per attribute, ``(N, values)``, of clips ``(N, F, 3, 32, 32)`` in [0, 1].

        Raises:
            InputError: if the clips have another shape.
        """
        return self._classify(self._embed(clips))

    @torch.no_grad()
    def features(self, clips: Tensor) -> Tensor:
        """Features before the heads' activation, ``(N, 64)``; see :meth:`Judge.features`.

        Raises:
            InputError: if the clips have another shape than ``(N, F, 3, 32, 32)``, F as the world has it.
        """
        return torch.cat([self._embed(part) for part in torch.split(clips.float(), _CHUNK)])

    @torch.no_grad()
    def predict(self, clips: Tensor) -> dict[str, Tensor]:
        """Most likely values; see :meth:`Judge.predict`.

        Raises:
            InputError: if the clips have another shape than ``(N, F, 3, 32, 32)``, F as the world has it.
        """
        logits = self._classify(self.features(clips))
        return {name: values.argmax(1) for name, values in logits.items()}

    def save(self, path: Path) -> None:
        """Write the weights as safetensors."""
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, path)

    @classmethod
    def load(cls, path: Path) -> AttributeJudge:
        """Read what :meth:`save` wrote; in evaluation mode, on the CPU.

        Raises:
            InputError: if the file is missing or holds no judge of this shape.
        """
        try:
            with safe_open(path, framework="pt") as file:
                keys = set(file.keys())
            heads = {key.split(".")[1] for key in keys if key.startswith("heads.")}
            body: Body = "attention" if any(key.startswith("body.places") for key in keys) else "conv"
            # A file of no world's attributes is refused by the next line, and says what is missing.
            judge = cls(next((lang for lang in LANGUAGES if set(lang.attributes) == heads), MovingCaption), body)
            judge.load_state_dict(load_file(path))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise InputError(f"no attribute judge can be read from {path}: {error}") from None
        return judge.eval().requires_grad_(False)

    def _embed(self, clips: Tensor) -> Tensor:
        wanted = (self.language.frames, 3, SIZE, SIZE)
        if clips.ndim != 5 or clips.shape[1:] != wanted:
            raise InputError(
                f"the judge reads clips of shape (N, {', '.join(map(str, wanted))}), given {tuple(clips.shape)}"
            )
        features: Tensor = self.penultimate(self.body(clips.transpose(1, 2) * 2 - 1))
        return features

    def _classify(self, features: Tensor) -> dict[str, Tensor]:
        hidden = F.silu(features)
        return {name: head(hidden) for name, head in self.heads.items()}


def train_judge(
    render: Render,
    *,
    minutes: float,
    seed: int,
    language: type[Caption] = MovingCaption,
    body: Body = "conv",
    clock: Callable[[], float] = time.monotonic,
) -> AttributeJudge:
    """Train a judge for a given time on endless rendered clips.

    AdamW with one rate cycle over the time, not over steps, so the result depends on the machine's
    speed. Clips are blurred and noised at random, for a VAE's softness must not look like a fault.

    Args:
        render: makes clips ``(B, F, 3, 32, 32)`` in [0, 1] and labels ``(B, 4)`` in the order of the
            language's attributes.
        minutes: how long; at least one step is taken.
        seed: of the initial weights, the clips and the augmentation.
        language: the captions of the world that ``render`` shows.
        body: the kind of network.
        clock: seconds that pass; tests give their own.

    Returns:
        The judge in evaluation mode.

    Raises:
        InputError: if ``minutes`` is not positive.
        NonFiniteError: if the loss is not finite.
    """
    if not minutes > 0:
        raise InputError(f"minutes must be positive, given {minutes}")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = AttributeJudge(language, body).train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=PEAK_RATE, weight_decay=0.01)
    start, done, step = clock(), 0.0, 0
    while done < 1 or step == 0:
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * _one_cycle(done)
        clips, labels = render(BATCH, generator)
        logits = judge(_soften(clips, generator))
        losses = [F.cross_entropy(logits[name], labels[:, column]) for column, name in enumerate(language.attributes)]
        loss = torch.stack(losses).sum()
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(f"the judge's loss is not finite at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not type it
        optimizer.step()
        step += 1
        done = (clock() - start) / (60 * minutes)
    return judge.eval().requires_grad_(False)


class _Attention(nn.Module):
    """Patches of 4x4 pixels, and of 3 frames where there is motion, that look at each other in two layers."""

    def __init__(self, frames: int) -> None:
        super().__init__()
        depth, width, heads = 3 if frames > 1 else 1, 48, 4
        tokens = frames // depth * (SIZE // 4) ** 2
        self.patches = nn.Conv3d(3, width, (depth, 4, 4), stride=(depth, 4, 4))
        self.places = nn.Parameter(0.02 * torch.randn(tokens, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.narrow = nn.Linear(width, 12)
        self.outputs = 12 * tokens

    def forward(self, clips: Tensor) -> Tensor:
        """``(B, 3, F, H, W)`` in [-1, 1] to ``(B, outputs)``."""
        tokens = self.patches(clips).flatten(2).transpose(1, 2) + self.places
        narrowed: Tensor = self.narrow(self.layers(tokens))
        return narrowed.flatten(1)


def _attention(frames: int) -> tuple[nn.Module, int]:
    body = _Attention(frames)
    return body, body.outputs


def _convolutions(frames: int) -> tuple[nn.Module, int]:
    moves = frames > 1
    blocks = nn.Sequential(
        _block(3, 24, (1, 2, 2), time=moves),
        _block(24, 48, (2, 2, 2), time=moves),
        _block(48, 48, (2, 2, 2), time=moves),
        nn.Flatten(),
    )
    return blocks, 48 * math.ceil(frames / 4) * 4 * 4


def _block(inputs: int, outputs: int, stride: tuple[int, int, int], *, time: bool) -> nn.Sequential:
    size = (3 if time else 1, 3, 3)
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, size, stride=stride, padding=(size[0] // 2, 1, 1)),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
    )


def _one_cycle(done: float) -> float:
    """Rate relative to its peak, by the share of the time that is done: up and down by cosines."""
    if done < _WARM:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * done / _WARM)) / 2
    return (1 + math.cos(math.pi * min(1.0, (done - _WARM) / (1 - _WARM)))) / 2


def _soften(clips: Tensor, generator: torch.Generator) -> Tensor:
    """Each clip blurred by 3x3 and noised by up to 0.06, both by an amount of its own."""
    batch, flat = clips.shape[0], clips.flatten(0, 1)
    blurred = F.avg_pool2d(flat, 3, stride=1, padding=1).view_as(clips)
    amount = torch.rand(2, batch, 1, 1, 1, 1, generator=generator)
    mixed = torch.lerp(clips, blurred, amount[0])
    noise = torch.randn(clips.shape, generator=generator)
    return (mixed + 0.06 * amount[1] * noise).clamp(0, 1)
