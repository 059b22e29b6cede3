"""Make ``sdxl-tiny``: a trained StableDiffusionXLPipeline of the pictures of ``sd35-tiny``.

    python -m raydmd.zoo.make_sdxl_tiny --work /tmp/sdxl-tiny --minutes 30

Needs Debian's package ``dataset-fashion-mnist``. Autoencoder, judges and prompts are those of ``sd35-tiny``; U-Net and
text encoders are trained, and kept in ``--work``. The result goes to ``raydmd/zoo/data/sdxl-tiny`` in diffusers' own
format, weights in fp16.
"""

from __future__ import annotations

from functools import partial

from diffusers import DDIMScheduler, StableDiffusionXLPipeline

from raydmd.zoo.make_unet import PROCESS, TextToImage, train_unet
from raydmd.zoo.making import DATA, read_autoencoder, read_judges, start, text_to_image, write
from raydmd.zoo.still import StillWorld
from raydmd.zoo.world import SIZE

SOURCE = DATA / "sd35-tiny"


def main() -> None:
    """Train what is not trained yet and write the pipeline."""
    args, world = start(__doc__, "sdxl-tiny", 30.0, StillWorld)
    vae = read_autoencoder(SOURCE / "vae")

    parts = text_to_image(
        args.work / "parts", TextToImage, partial(train_unet, side=SIZE), vae, world, minutes=args.minutes
    )
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
    pipeline = StableDiffusionXLPipeline(
        vae=vae.half(),
        text_encoder=parts.clip.half(),
        text_encoder_2=parts.clip_2.half(),
        tokenizer=parts.tokenizer,
        tokenizer_2=parts.tokenizer,
        unet=parts.unet.half(),
        scheduler=scheduler,
        add_watermarker=False,
    )
    write(args.target, pipeline, read_judges(SOURCE))


if __name__ == "__main__":
    main()
