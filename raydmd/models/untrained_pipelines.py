"""Untrained pipelines, one of every family; each is whole, with a tokenizer that knows the words it is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)

from raydmd.models.untrained_parts import CLIP, CLIP_2, PAD, WIDTH, clip, image_vae, t5, word_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence


def wan(
    words: Sequence[str],
    *,
    experts: int = 2,
    heads: int = 2,
    layers: int = 2,
    boundary: float = 0.875,
    pictures: bool = False,
) -> Any:
    """A WanPipeline, of one expert (2.1) or two (2.2); with ``pictures`` a WanImageToVideoPipeline."""
    tokenizer = word_tokenizer(words)
    transformers = [
        WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=heads,
            attention_head_dim=12,
            in_channels=16 + (16 + 4 if pictures else 0),
            out_channels=16,
            text_dim=WIDTH,
            freq_dim=32,
            ffn_dim=32,
            num_layers=layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=64,
        )
        for _ in range(experts)
    ]
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return (WanImageToVideoPipeline if pictures else WanPipeline)(
        tokenizer=tokenizer,
        text_encoder=t5(tokenizer, UMT5EncoderModel, UMT5Config),
        vae=vae,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
        transformer=transformers[0],
        transformer_2=transformers[1] if experts == 2 else None,
        boundary_ratio=boundary if experts == 2 else None,
    )


def sd3(words: Sequence[str], *, heads: int = 2, layers: int = 2, with_t5: bool = True) -> Any:
    """A StableDiffusion3Pipeline, with T5 or without."""
    tokenizer = word_tokenizer(words)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=layers,
        attention_head_dim=12,
        num_attention_heads=heads,
        joint_attention_dim=WIDTH,
        caption_projection_dim=12 * heads,
        pooled_projection_dim=CLIP + CLIP_2,
        pos_embed_max_size=6,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),  # as SD3.5-medium has them
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(levels=2, channels=8),
        text_encoder=clip(CLIPTextModelWithProjection, tokenizer, CLIP),
        tokenizer=tokenizer,
        text_encoder_2=clip(CLIPTextModelWithProjection, tokenizer, CLIP_2),
        tokenizer_2=tokenizer,
        text_encoder_3=t5(tokenizer) if with_t5 else None,
        tokenizer_3=tokenizer if with_t5 else None,
    )


def _unet(**settings: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        **settings,
    )


def _betas(**settings: Any) -> DDIMScheduler:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1, **settings)


def sd15(words: Sequence[str], *, prediction: str = "epsilon") -> Any:
    """A StableDiffusionPipeline: 1.5's, or 2.x's with ``v_prediction``."""
    tokenizer = word_tokenizer(words)
    return StableDiffusionPipeline(
        vae=image_vae(levels=2),
        text_encoder=clip(CLIPTextModel, tokenizer, CLIP_2),
        tokenizer=tokenizer,
        unet=_unet(cross_attention_dim=CLIP_2, attention_head_dim=4),
        scheduler=_betas(prediction_type=prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(words: Sequence[str]) -> Any:
    """A StableDiffusionXLPipeline."""
    tokenizer = word_tokenizer(words)
    unet = _unet(
        cross_attention_dim=CLIP + CLIP_2,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + CLIP_2,
    )
    return StableDiffusionXLPipeline(
        vae=image_vae(levels=2, latents_mean=[0.1, -0.2, 0.0, 0.3], latents_std=[1.2, 0.8, 1.0, 1.1]),
        text_encoder=clip(CLIPTextModel, tokenizer, CLIP),
        tokenizer=tokenizer,
        text_encoder_2=clip(CLIPTextModelWithProjection, tokenizer, CLIP_2),
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=_betas(),
        add_watermarker=False,
    )


def lumina2(words: Sequence[str]) -> Any:
    """A Lumina2Pipeline."""
    tokenizer = word_tokenizer(words, length=48)  # behind a system prompt of some thirty words
    encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            sliding_window=16,
            pad_token_id=PAD,
        )
    )
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        ffn_dim_multiplier=None,
        norm_eps=1e-5,
        scaling_factor=1.0,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 128, 128),
        cap_feat_dim=WIDTH,
    )
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=image_vae(levels=4),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )


def qwen_image(words: Sequence[str]) -> Any:
    """A QwenImagePipeline."""
    tokenizer = word_tokenizer(words, length=1024)
    size = len(tokenizer)
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": size + 8,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
                "rope_theta": 1e6,
            },
            vision_config={
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 16,
                "fullatt_block_indexes": [1],
            },
            image_token_id=size + 1,
            video_token_id=size + 2,
            vision_start_token_id=size + 3,
            vision_end_token_id=size + 4,
            vision_token_id=size + 5,
        )
    )
    vae = AutoencoderKLQwenImage(
        base_dim=12,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.1, 0.2, 0.0],
        latents_std=[1.2, 0.8, 1.0, 1.1],
    )
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def z_image(words: Sequence[str]) -> Any:
    """A ZImagePipeline."""
    tokenizer = word_tokenizer(words, length=16)
    encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        qk_norm=True,
        cap_feat_dim=WIDTH,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 64, 64],
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(levels=2),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def flux(words: Sequence[str], *, guidance_embeds: bool = False) -> Any:
    """A FluxPipeline; with ``guidance_embeds`` a guidance-distilled one, like FLUX.1-dev."""
    tokenizer = word_tokenizer(words)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=CLIP,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=image_vae(levels=2),
        text_encoder=clip(CLIPTextModel, tokenizer, CLIP),
        tokenizer=tokenizer,
        text_encoder_2=t5(tokenizer),
        tokenizer_2=tokenizer,
        transformer=transformer,
    )


def edm(words: Sequence[str], *, classes: int = 10) -> Any:
    """A ConsistencyModelPipeline of pictures of 16x16 pixels, in classes whose numbers are its prompts."""
    del words
    unet = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=classes,
        norm_num_groups=8,
        attention_head_dim=8,
    )
    return ConsistencyModelPipeline(unet=unet, scheduler=CMStochasticIterativeScheduler())


def dit(words: Sequence[str], *, flow: bool = False) -> Any:
    """A DiTPipeline in ImageNet's thousand classes, whose numbers are its prompts; with ``flow`` a SiT."""
    del words
    transformer = DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,  # with a variance that nothing reads
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
    )
    if flow:
        from diffusers import FlowMapEulerDiscreteScheduler  # which older versions lack

        scheduler: Any = FlowMapEulerDiscreteScheduler()
    else:
        scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    return DiTPipeline(transformer=transformer, vae=image_vae(levels=2), scheduler=scheduler)
