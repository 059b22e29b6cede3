"""What every reward is, and the checked way to ask one.

The convention of this room: a higher value is better. Rewards are judged, never differentiated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from raydmd.errors import InputError, NonFiniteError, RewardError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Reward(ABC):
    """Rates samples against their prompts.

    Attributes:
        name: in messages, metrics and the names of compositions.
    """

    name: str

    @abstractmethod
    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rate a batch; callers use :meth:`score`, which checks both ends.

        Args:
            pixels: ``(B, frames, 3, H, W)`` in [0, 1], fp32, on any device; an image is one frame.
            prompts: B of them.

        Returns:
            ``(B,)``, fp32, without gradient, on the reward's own device.
        """

    def score(self, pixels: Tensor, prompts: Sequence[str], ids: Sequence[int | str]) -> Tensor:
        """Rate a batch, and refuse what no training step may see.

        A composition overrides this, so that a message names the part at fault.

        Args:
            pixels: as for calling the reward.
            prompts: B of them.
            ids: what messages call the samples, e.g. their global indices; B of them.

        Returns:
            ``(B,)``, fp32, finite, without gradient, on the reward's own device.

        Raises:
            InputError: if pixels, prompts and ids do not belong together, or pixels leave [0, 1].
            RewardError: if the reward answers with another shape than ``(B,)``.
            NonFiniteError: if a value is not finite; names reward, sample and prompt.
        """
        self._check_inputs(pixels, prompts, ids)
        with torch.no_grad():
            values = self(pixels, prompts)
        if values.shape != (len(prompts),):
            raise RewardError(
                f"reward {self.name!r} gave {values.numel()} values of shape {tuple(values.shape)} "
                f"for {len(prompts)} samples, {ids[0]} to {ids[-1]}"
            )
        self._refuse_non_finite(values, pixels, prompts, ids)
        return values.float()

    def _check_inputs(self, pixels: Tensor, prompts: Sequence[str], ids: Sequence[int | str]) -> None:
        size = len(prompts)
        if pixels.ndim != 5 or pixels.shape[2] != 3 or 0 in pixels.shape:
            raise InputError(
                f"reward {self.name!r} reads pixels of shape (B, frames, 3, H, W), given {tuple(pixels.shape)}"
            )
        if pixels.shape[0] != size or len(ids) != size:
            raise InputError(
                f"reward {self.name!r}: {pixels.shape[0]} samples, {size} prompts and {len(ids)} ids "
                "do not belong together"
            )
        low, high = (float(v) for v in pixels.aminmax())
        # Written so that NaN passes: its message comes with the sample's name, below.
        if low < 0 or high > 1:
            raise InputError(f"reward {self.name!r} reads pixels in [0, 1], given [{low:.4g}, {high:.4g}]")

    def _refuse_non_finite(
        self, values: Tensor, pixels: Tensor, prompts: Sequence[str], ids: Sequence[int | str]
    ) -> None:
        bad = (~values.isfinite()).nonzero().flatten().tolist()
        if not bad:
            return
        i = bad[0]
        came = "" if pixels[i].isfinite().all() else "; its pixels were not finite already"
        raise NonFiniteError(
            f"reward {self.name!r}, sample {ids[i]} (prompt {prompts[i]!r}): the value is {float(values[i])}; "
            f"bad samples of this batch: {[ids[k] for k in bad]}{came}",
            tuple(bad),
        )
