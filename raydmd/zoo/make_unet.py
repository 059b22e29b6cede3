"""Train the zoo's SDXL U-Net and its two text encoders on latents of the world of pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerFast

from raydmd.process import VariancePreserving
from raydmd.zoo.fit import DROP, fit
from raydmd.zoo.make_experts import TEXT_LENGTH, build_tokenizer
from raydmd.zoo.still import StillCaption

if TYPE_CHECKING:
    from collections.abc import Sequence

PROCESS = VariancePreserving()
CLIP_DIM, END = 32, 1
SIZES = 8
"""Width of the embedding of each of the six sizes."""


@dataclass(frozen=True)
class TextToImage:
    """What a StableDiffusionXLPipeline has beside scheduler and autoencoder; one tokenizer serves both encoders."""

    unet: UNet2DConditionModel
    clip: CLIPTextModel
    clip_2: CLIPTextModelWithProjection
    tokenizer: PreTrainedTokenizerFast


def build_unet() -> UNet2DConditionModel:
    """An untrained U-Net on 8x8 latents, about a million parameters."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1),
        attention_head_dim=(2, 6),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=SIZES,
        projection_class_embeddings_input_dim=6 * SIZES + CLIP_DIM,
        cross_attention_dim=2 * CLIP_DIM,
        norm_num_groups=16,
    )


def build_clip(vocabulary: int) -> CLIPTextConfig:
    """Of a CLIP text encoder of two layers; SDXL reads the output of the last but one."""
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=CLIP_DIM,
        intermediate_size=2 * CLIP_DIM,
        projection_dim=CLIP_DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        pad_token_id=0,
        bos_token_id=END,
        eos_token_id=END,
    )


def train_unet(latents: Tensor, prompts: Sequence[str], *, side: int, minutes: float, seed: int) -> TextToImage:
    """Epsilon prediction on normalised latents, U-Net and text encoders together.

    Args:
        latents: normalised, ``(N, 4, 8, 8)``.
        prompts: a caption per latent.
        side: of a picture, pixels.
        minutes: wall time to spend.
        seed: of initialisation, batches and noise.

    Returns:
        The networks' moving averages, and the tokenizer.
    """
    torch.manual_seed(seed)
    batch, tokenizer = 64, build_tokenizer(StillCaption)
    ids = tokenizer(list(prompts), padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").input_ids
    config = build_clip(len(tokenizer))
    parts = nn.ModuleDict(
        {"unet": build_unet(), "clip": CLIPTextModel(config), "clip_2": CLIPTextModelWithProjection(config)}
    )
    sizes = torch.tensor([side, side, 0, 0, side, side], dtype=torch.float32).expand(batch, -1)

    def loss(_: int) -> tuple[str, Tensor]:
        rows = torch.randint(len(latents), (batch,))
        x0, noise = latents[rows], torch.randn(batch, *latents.shape[1:])
        t = torch.randint(1, PROCESS.entries + 1, (batch,)) / PROCESS.entries
        found = [parts[name](ids[rows], output_hidden_states=True) for name in ("clip", "clip_2")]
        kept = (torch.rand(batch) >= DROP).float()  # the pipeline's empty prompt is zeros
        out = parts["unet"](
            sample=PROCESS.add_noise(x0, noise, t),
            timestep=PROCESS.index(t),
            encoder_hidden_states=torch.cat([f.hidden_states[-2] for f in found], -1) * kept.view(-1, 1, 1),
            added_cond_kwargs={"text_embeds": found[1].text_embeds * kept[:, None], "time_ids": sizes},
            return_dict=False,
        )[0]
        return "epsilon", F.mse_loss(out, noise)

    average = fit(parts, loss, minutes=minutes)
    return TextToImage(average["unet"], average["clip"], average["clip_2"], tokenizer)
