"""Tiny random pipelines, as strangers would have them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

if TYPE_CHECKING:
    from pathlib import Path


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Eight words; every prompt is padded to six."""
    words = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", "a", "cat", "dog", "runs", "jumps"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=6,
    )


def wan_pipeline(folder: Path, *, experts: int = 2, heads: int = 2, layers: int = 2, boundary: float = 0.875) -> Path:
    """Write a WanPipeline with random weights and return its folder."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=8,
            d_model=16,
            d_kv=8,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            is_encoder_decoder=False,
        )
    )
    transformers = [
        WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=heads,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=16,
            freq_dim=32,
            ffn_dim=32,
            num_layers=layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )
        for _ in range(experts)
    ]
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
        transformer=transformers[0],
        transformer_2=transformers[1] if experts == 2 else None,
        boundary_ratio=boundary if experts == 2 else None,
    ).save_pretrained(folder)
    return folder


def sd3_pipeline(folder: Path, *, heads: int = 2, layers: int = 2, t5: bool = True) -> Path:
    """Write a StableDiffusion3Pipeline of 16x16 pixels with random weights, with T5 or without; its folder."""
    torch.manual_seed(0)

    def clip(width: int) -> CLIPTextModelWithProjection:
        return CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=8,
                hidden_size=width,
                intermediate_size=16,
                projection_dim=width,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=6,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=1,
            )
        )

    encoder = T5EncoderModel(
        T5Config(
            vocab_size=8,
            d_model=24,
            d_kv=8,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=layers,
        attention_head_dim=12,
        num_attention_heads=heads,
        joint_attention_dim=24,
        caption_projection_dim=12 * heads,
        pooled_projection_dim=8 + 12,
        pos_embed_max_size=6,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),  # as SD3.5-medium has them
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=4,
        sample_size=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5,
        shift_factor=0.06,
    )
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clip(8),
        tokenizer=word_tokenizer(),
        text_encoder_2=clip(12),
        tokenizer_2=word_tokenizer(),
        text_encoder_3=encoder if t5 else None,
        tokenizer_3=word_tokenizer() if t5 else None,
    ).save_pretrained(folder)
    return folder
