"""Make ``sd35-tiny``: a trained StableDiffusion3Pipeline of Fashion-MNIST items at a place, in a size.

    python -m raydmd.zoo.make_sd35_tiny --work /tmp/sd35-tiny --minutes 50

Needs Debian's package ``dataset-fashion-mnist``. Stages keep their results in ``--work`` and are not
repeated: autoencoder, transformer with text encoders, judges. The result goes to
``raydmd/zoo/data/sd35-tiny`` in diffusers' own format, weights in fp16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5EncoderModel

from raydmd.zoo.make_mmdit import SHIFT, TextToImage, train_mmdit
from raydmd.zoo.make_vae import build_image_vae, fix_latent_statistics, train_vae
from raydmd.zoo.making import attribute_judges, encoded, start, write
from raydmd.zoo.still import StillWorld

if TYPE_CHECKING:
    from pathlib import Path

    from raydmd.zoo.world import Items

SHARES = {"vae": 0.25, "transformer": 0.6, "judges": 0.15}
PICTURES = 32_768


def main() -> None:
    """Run the stages that are not done yet and write the pipeline."""
    args, world = start(__doc__, "sd35-tiny", 50.0, StillWorld)
    minutes = {stage: share * args.minutes for stage, share in SHARES.items()}
    vae = autoencoder(args.work, world, minutes["vae"])
    parts = text_to_image(args.work, vae, world, minutes["transformer"])
    judges = attribute_judges(args.work, vae, world, minutes=minutes["judges"])
    pipeline = StableDiffusion3Pipeline(
        transformer=parts.transformer.half(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae.half(),
        text_encoder=parts.clip.half(),
        tokenizer=parts.tokenizer,
        text_encoder_2=parts.clip_2.half(),
        tokenizer_2=parts.tokenizer,
        text_encoder_3=parts.t5.half(),
        tokenizer_3=parts.tokenizer,
    )
    write(args.target, pipeline, judges)


def autoencoder(work: Path, world: Items, minutes: float) -> AutoencoderKL:
    """The autoencoder, in one stage."""
    done = work / "vae"
    if not done.is_dir():
        vae = build_image_vae()
        print(f"vae: {train_vae(vae, world, minutes=minutes, seed=0, batch=16):.2f} dB")
        fix_latent_statistics(vae, world, seed=5)
        vae.save_pretrained(done)
    return AutoencoderKL.from_pretrained(done).eval().requires_grad_(False)


def text_to_image(work: Path, vae: AutoencoderKL, world: Items, minutes: float) -> TextToImage:
    """Transformer, text encoders and tokenizer on encoded pictures."""
    done = work / "transformer"
    if not done.is_dir():
        latents, prompts = encoded(work, vae, world, count=PICTURES)
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        parts = train_mmdit(latents, prompts, minutes=minutes, seed=0)
        for name, part in vars(parts).items():
            part.save_pretrained(done / name)
    return TextToImage(
        SD3Transformer2DModel.from_pretrained(done / "transformer"),
        CLIPTextModelWithProjection.from_pretrained(done / "clip"),
        CLIPTextModelWithProjection.from_pretrained(done / "clip_2"),
        T5EncoderModel.from_pretrained(done / "t5"),
        PreTrainedTokenizerFast.from_pretrained(done / "tokenizer"),
    )


if __name__ == "__main__":
    main()
