"""Train the zoo's SD3 transformer and its three text encoders on latents of the world of pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from raydmd.zoo.fit import fit_flow
from raydmd.zoo.make_experts import TEXT_DIM, TEXT_LENGTH, build_tokenizer
from raydmd.zoo.still import StillCaption

SHIFT = 3.0
"""SD3.5's."""
CLIP_DIM, END = 24, 1


@dataclass(frozen=True)
class TextToImage:
    """What a StableDiffusion3Pipeline has beside scheduler and autoencoder; one tokenizer serves all encoders."""

    transformer: SD3Transformer2DModel
    clip: CLIPTextModelWithProjection
    clip_2: CLIPTextModelWithProjection
    t5: T5EncoderModel
    tokenizer: PreTrainedTokenizerFast


def build_transformer() -> SD3Transformer2DModel:
    """An untrained transformer: 16 tokens per picture beside 16 of text, about 0.6 million parameters."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=5,
        joint_attention_dim=TEXT_DIM,
        caption_projection_dim=80,
        pooled_projection_dim=2 * CLIP_DIM,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )


def build_clip(vocabulary: int) -> CLIPTextModelWithProjection:
    """An untrained CLIP text encoder of two layers; SD3 reads the output of the last but one."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
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
    )


def build_t5(vocabulary: int) -> T5EncoderModel:
    """An untrained one-layer T5 encoder."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=TEXT_DIM,
            d_kv=12,
            d_ff=96,
            num_layers=1,
            num_heads=4,
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def encode_text(parts: nn.ModuleDict, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What StableDiffusion3Pipeline makes of a prompt, with gradient.

    Args:
        parts: the encoders ``clip``, ``clip_2`` and ``t5``.
        ids: tokens, padded, ``(B, L)``; no mask is passed, as the pipeline passes none.

    Returns:
        Embeddings ``(B, 2 L, D)``, both CLIPs' side by side before T5's, and pooled ``(B, P)``.
    """
    clips = [parts[name](ids, output_hidden_states=True) for name in ("clip", "clip_2")]
    side = torch.cat([c.hidden_states[-2] for c in clips], -1)
    t5 = parts["t5"](ids)[0]
    embeds = torch.cat([F.pad(side, (0, t5.shape[-1] - side.shape[-1])), t5], -2)
    return embeds, torch.cat([c.text_embeds for c in clips], -1)


def train_mmdit(latents: Tensor, prompts: list[str], *, minutes: float, seed: int) -> TextToImage:
    """Flow matching on normalised latents, transformer and text encoders together.

    Args:
        latents: normalised, ``(N, 4, 8, 8)``.
        prompts: a caption per latent.
        minutes: wall time to spend.
        seed: of initialisation, batches and noise.

    Returns:
        The networks' moving averages, and the tokenizer.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(StillCaption)
    ids = tokenizer([*prompts, ""], padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").input_ids
    clips = [build_clip(len(tokenizer)) for _ in range(2)]
    parts = nn.ModuleDict(
        {"transformer": build_transformer(), "clip": clips[0], "clip_2": clips[1], "t5": build_t5(len(tokenizer))}
    )

    def predict(x_t: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        embeds, pooled = encode_text(parts, ids[rows])
        velocity: Tensor = parts["transformer"](
            hidden_states=x_t,
            timestep=t * 1000,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        return velocity

    average = fit_flow(parts, predict, latents, stretch=SHIFT, minutes=minutes)
    return TextToImage(**dict(average.items()), tokenizer=tokenizer)
