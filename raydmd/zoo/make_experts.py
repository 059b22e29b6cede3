"""Train the zoo's two Wan experts and their text encoder on latents of the world."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from raydmd.process import shift
from raydmd.zoo.fit import DROP, fit
from raydmd.zoo.world import Caption, MovingCaption

BOUNDARY, SHIFT, TEXT_LENGTH, TEXT_DIM = 0.875, 5.0, 8, 48


def build_tokenizer(language: type[Caption] = MovingCaption, *, preface: str = "") -> PreTrainedTokenizerFast:
    """One token per word of a world's captions, and one that ends a prompt.

    Args:
        language: the captions of the world.
        preface: what a pipeline puts before every prompt; one token too, however long.
    """
    words = sorted({w for c in language.every() for w in c.text.split()})
    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    if preface:
        tokenizer.add_special_tokens([preface])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_LENGTH,
    )


def build_text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """An untrained one-layer UMT5 encoder."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary,
            d_model=TEXT_DIM,
            d_kv=12,
            d_ff=96,
            num_layers=1,
            num_heads=4,
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
            tie_word_embeddings=False,
        )
    )


def build_expert() -> WanTransformer3DModel:
    """An untrained expert: 12 tokens per clip, about half a million parameters.

    A token is a patch of 64 numbers, most of them noise: a network of that width has no room beside them.
    """
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=6,
        attention_head_dim=16,
        in_channels=16,
        out_channels=16,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=256,
        num_layers=3,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


def encode_text(encoder: UMT5EncoderModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Embeddings ``(B, L, D)``, zero past the prompt's end as WanPipeline makes them."""
    embeds: Tensor = encoder(ids, mask).last_hidden_state * mask[..., None]
    return embeds


def train_experts(
    latents: Tensor, prompts: list[str], *, minutes: float, seed: int, batch: int = 64
) -> tuple[WanTransformer3DModel, WanTransformer3DModel, UMT5EncoderModel, PreTrainedTokenizerFast]:
    """Flow matching on normalised latents, both experts in turn, the text encoder with both.

    Args:
        latents: normalised, ``(N, 16, 3, 4, 4)``.
        prompts: a caption per latent.
        minutes: wall time to spend.
        seed: of initialisation, batches and noise.
        batch: samples per update.

    Returns:
        High-noise expert, low-noise expert, text encoder (all moving averages), tokenizer.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    tokens = tokenizer([*prompts, ""], padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
    ids, mask = tokens.input_ids, tokens.attention_mask
    parts = nn.ModuleDict({"text": build_text_encoder(len(tokenizer)), "high": build_expert(), "low": build_expert()})
    split = BOUNDARY / (SHIFT - (SHIFT - 1) * BOUNDARY)

    def loss(step: int) -> tuple[str, Tensor]:
        name = "high" if step % 4 == 0 else "low"  # the low-noise expert has the harder task
        low, high = (split, 1.0) if name == "high" else (0.0, split)
        rows = torch.randint(len(latents), (batch,))
        prompt = torch.where(torch.rand(batch) < DROP, len(prompts), rows)
        x0, noise = latents[rows], torch.randn(batch, *latents.shape[1:])
        t = shift(low + (high - low) * torch.rand(batch), SHIFT)
        x_t = torch.lerp(x0, noise, t.view(-1, 1, 1, 1, 1))
        cond = encode_text(parts["text"], ids[prompt], mask[prompt])
        out = parts[name](x_t, t * 1000, cond, return_dict=False)[0]
        return name, F.mse_loss(out, noise - x0)

    average = fit(parts, loss, minutes=minutes)
    return average["high"], average["low"], average["text"], tokenizer
