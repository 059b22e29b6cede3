"""Make ``sdxl-tiny``: a trained StableDiffusionXLPipeline of the pictures of ``sd35-tiny``.

    python -m raydmd.zoo.make_sdxl_tiny --work /tmp/sdxl-tiny --minutes 30

Needs Debian's package ``dataset-fashion-mnist``. Autoencoder, judges and prompts are those of ``sd35-tiny``; U-Net and
text encoders are trained, and kept in ``--work``. The result goes to ``raydmd/zoo/data/sdxl-tiny`` in diffusers' own
format, weights in fp16.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerFast

from raydmd.zoo.make_unet import PROCESS, TextToImage, train_unet
from raydmd.zoo.making import DATA, encoded, start
from raydmd.zoo.still import StillWorld
from raydmd.zoo.world import SIZE

if TYPE_CHECKING:
    from pathlib import Path

    from raydmd.zoo.world import Items

PICTURES = 32_768
SOURCE = DATA / "sd35-tiny"


def main() -> None:
    """Train what is not trained yet and write the pipeline."""
    args, world = start(__doc__, "sdxl-tiny", 30.0, StillWorld)
    vae = AutoencoderKL.from_pretrained(SOURCE / "vae").float().eval().requires_grad_(False)
    parts = text_to_image(args.work, vae, world, args.minutes)
    # An SDXL pipeline knows a centre per channel where an SD3 one has a shift.
    centre, channels = vae.config.shift_factor, vae.config.latent_channels
    vae.register_to_config(shift_factor=None, latents_mean=[centre] * channels, latents_std=[1.0] * channels)
    scheduler = DDIMScheduler(
        beta_start=PROCESS.beta_start,
        beta_end=PROCESS.beta_end,
        beta_schedule=PROCESS.schedule,
        num_train_timesteps=PROCESS.entries,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    StableDiffusionXLPipeline(
        vae=vae.half(),
        text_encoder=parts.clip.half(),
        text_encoder_2=parts.clip_2.half(),
        tokenizer=parts.tokenizer,
        tokenizer_2=parts.tokenizer,
        unet=parts.unet.half(),
        scheduler=scheduler,
        add_watermarker=False,
    ).save_pretrained(args.target, safe_serialization=True)
    for name in ("judge.safetensors", "reward.safetensors", "prompts.txt", "raydmd.json"):
        shutil.copyfile(SOURCE / name, args.target / name)


def text_to_image(work: Path, vae: AutoencoderKL, world: Items, minutes: float) -> TextToImage:
    """U-Net, text encoders and tokenizer on encoded pictures."""
    done = work / "parts"
    if not done.is_dir():
        latents, prompts = encoded(work, vae, world, count=PICTURES)
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        parts = train_unet(latents, prompts, side=SIZE, minutes=minutes, seed=0)
        for name, part in vars(parts).items():
            part.save_pretrained(done / name)
    return TextToImage(
        UNet2DConditionModel.from_pretrained(done / "unet"),
        CLIPTextModel.from_pretrained(done / "clip"),
        CLIPTextModelWithProjection.from_pretrained(done / "clip_2"),
        PreTrainedTokenizerFast.from_pretrained(done / "tokenizer"),
    )


if __name__ == "__main__":
    main()
