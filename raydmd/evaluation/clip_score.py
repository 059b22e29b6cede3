"""CLIP score: how well pictures fit their prompts (Hessel et al., arXiv:2104.08718).

Scale: ``100 * max(cos, 0)``, as torchmetrics and the FID tables of DMD2 have it; the paper's own weight
is 2.5. Videos get the mean over their frames.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydmd.errors import InputError
from raydmd.evaluation.features import Preparation, read_preparation, read_pretrained

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class ClipScore(nn.Module):
    """Scores clips against prompts, in evaluation mode and without gradients.

    Args:
        model: a ``CLIPModel``.
        tokenizer: its tokenizer; prompts beyond its length are cut, as everywhere with CLIP.
        preparation: of pictures.
    """

    def __init__(self, model: Any, tokenizer: Any, preparation: Preparation) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.preparation = preparation

    @torch.no_grad()
    def forward(self, clips: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score each clip against its prompt.

        Args:
            clips: ``(N, F, 3, H, W)`` in [0, 1].
            prompts: ``N`` prompts.

        Returns:
            ``(N,)`` in [0, 100], float32, on the CPU.

        Raises:
            InputError: if clips and prompts differ in number.
        """
        if clips.ndim != 5 or len(clips) != len(prompts):
            raise InputError(
                f"clips must be (N, F, 3, H, W) for N prompts, given {tuple(clips.shape)} and {len(prompts)}"
            )
        parameter = next(self.model.parameters())
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, return_tensors="pt", return_token_type_ids=False
        )
        words = self.model.text_model(**tokens.to(parameter.device)).pooler_output
        texts = F.normalize(self.model.text_projection(words).float(), dim=-1)
        pixels = self.preparation(clips.flatten(0, 1).to(parameter.device)).to(parameter.dtype)
        seen = self.model.vision_model(pixel_values=pixels).pooler_output
        images = F.normalize(self.model.visual_projection(seen).float(), dim=-1)
        per_frame: Tensor = (images.view(*clips.shape[:2], -1) * texts[:, None]).sum(-1)
        return (100 * per_frame.clamp(min=0)).mean(1).cpu()


def load_clip_score(
    source: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> ClipScore:
    """A CLIP with both towers, frozen.

    Args:
        source: a folder or a name on the Hugging Face hub; DMD2's tables use OpenCLIP's bigG,
            ``laion/CLIP-ViT-bigG-14-laion2B-39B-b160k``.
        device: where it runs.
        dtype: of its weights.

    Raises:
        InputError: if model, tokenizer or preparation cannot be read.
    """
    from transformers import AutoTokenizer, CLIPModel

    model = read_pretrained(CLIPModel, source, dtype=dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InputError(f"no tokenizer can be read from {source}: {error}") from None
    # transformers makes an empty tokenizer where files are absent, and any text is then the same.
    words = model.config.text_config.vocab_size
    if len(tokenizer) != words:
        raise InputError(f"{source}: the tokenizer knows {len(tokenizer)} tokens, the model {words}")
    score = ClipScore(model.to(device), tokenizer, read_preparation(source))
    return score.eval().requires_grad_(False)
