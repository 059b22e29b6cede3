"""Train the zoo's Lumina2 transformer and its text encoder on latents of the world of pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from raydmd.zoo.fit import fit_flow
from raydmd.zoo.make_experts import TEXT_DIM, TEXT_LENGTH, build_tokenizer
from raydmd.zoo.still import StillCaption

SHIFT = 6.0
"""Lumina-Image 2.0's."""
TRAINING_SHIFT = 3.0
"""Of the times in training, as the other pipelines of these pictures have it."""
HEAD, END = 12, 1


@dataclass(frozen=True)
class TextToImage:
    """What a Lumina2Pipeline has beside scheduler and autoencoder."""

    transformer: Lumina2Transformer2DModel
    text_encoder: Gemma2Model
    tokenizer: PreTrainedTokenizerFast


def preface() -> str:
    """What the stock pipeline puts before a prompt, but not before a negative one."""
    nothing = dict.fromkeys(("transformer", "scheduler", "vae", "text_encoder", "tokenizer"))
    return f"{Lumina2Pipeline(**nothing).system_prompt} <Prompt Start>"


def build_transformer() -> Lumina2Transformer2DModel:
    """An untrained transformer: 16 tokens per picture beside up to 8 of text, about 0.6 million parameters."""
    return Lumina2Transformer2DModel(
        sample_size=4,
        # The latent's side is an eighth of the picture's, and 4 tokens would be too few to place an item with.
        patch_size=1,
        in_channels=16,
        out_channels=16,
        hidden_size=96,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=8,
        ffn_dim_multiplier=0.5,
        axes_dim_rope=(8, 8, 8),
        axes_lens=(64, 16, 16),
        cap_feat_dim=TEXT_DIM,
    )


def build_text_encoder(vocabulary: int) -> Gemma2Model:
    """An untrained Gemma2 of two layers; Lumina reads the output of the last but one."""
    return Gemma2Model(
        Gemma2Config(
            vocab_size=vocabulary,
            hidden_size=TEXT_DIM,
            intermediate_size=2 * TEXT_DIM,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=HEAD,
            query_pre_attn_scalar=HEAD,
            sliding_window=64,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=END,
            eos_token_id=END,
            use_cache=False,
        )
    )


def train_single_stream(latents: Tensor, prompts: list[str], *, minutes: float, seed: int) -> TextToImage:
    """Flow matching on normalised latents, transformer and text encoder together.

    Args:
        latents: normalised, ``(N, 16, 4, 4)``.
        prompts: a caption per latent.
        minutes: wall time to spend.
        seed: of initialisation, batches and noise.

    Returns:
        The networks' moving averages, and the tokenizer.
    """
    torch.manual_seed(seed)
    before = preface()
    tokenizer = build_tokenizer(StillCaption, preface=before)
    tokens = tokenizer(
        [*(f"{before} {prompt}" for prompt in prompts), ""],
        padding="max_length",
        max_length=TEXT_LENGTH,
        return_tensors="pt",
    )
    ids, mask = tokens.input_ids, tokens.attention_mask
    parts = nn.ModuleDict({"transformer": build_transformer(), "text_encoder": build_text_encoder(len(tokenizer))})

    def predict(x_t: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        states = parts["text_encoder"](ids[rows], attention_mask=mask[rows], output_hidden_states=True).hidden_states
        # Lumina's time runs from noise at 0 to pictures at 1, and so does its velocity.
        velocity: Tensor = parts["transformer"](
            hidden_states=x_t,
            timestep=1 - t,
            encoder_hidden_states=states[-2],
            encoder_attention_mask=mask[rows].bool(),
            return_dict=False,
        )[0]
        return -velocity

    average = fit_flow(parts, predict, latents, stretch=TRAINING_SHIFT, minutes=minutes)
    return TextToImage(**dict(average.items()), tokenizer=tokenizer)
