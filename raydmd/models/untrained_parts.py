"""What untrained pipelines are made of: a tokenizer, text encoders and an autoencoder of a few thousand weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from diffusers import AutoencoderKL
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTForImageClassification,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

WIDTH = 24
"""Of every text encoder but CLIP's."""
CLIP, CLIP_2 = 8, 12
PAD, END = 0, 1


def word_tokenizer(words: Sequence[str], *, length: int | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, others are all the same to it; prompts are as long as few words need."""
    length = length or max(6, min(16, len(words)))
    known = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *words])}
    raw = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def clip(kind: Any, tokenizer: PreTrainedTokenizerFast, width: int) -> Any:
    """A CLIP text encoder of two layers."""
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=16,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            pad_token_id=PAD,
            bos_token_id=END,
            eos_token_id=END,
        )
    )


def t5(tokenizer: PreTrainedTokenizerFast, kind: Any = T5EncoderModel, config: Any = T5Config) -> Any:
    """A T5 encoder of one layer, or its multilingual kin."""
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return kind(config(vocab_size=len(tokenizer), **sizes, is_encoder_decoder=False, use_cache=False))


def image_vae(*, levels: int, channels: int = 4, **settings: Any) -> AutoencoderKL:
    """An AutoencoderKL that scales by ``2 ** (levels - 1)``."""
    return AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=8 * 2 ** (levels - 1),
        scaling_factor=1.5,
        **({"shift_factor": 0.06} | settings),
    )


def classifier(folder: Path, *, classes: int) -> None:
    """Write an image classifier of one layer, with its picture settings."""
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    ViTForImageClassification(ViTConfig(**sizes, num_attention_heads=2, num_labels=classes)).save_pretrained(folder)
    half = [0.5, 0.5, 0.5]
    pictures = {"size": {"height": 16, "width": 16}, "resample": 2, "image_mean": half, "image_std": half}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures), encoding="utf-8")
