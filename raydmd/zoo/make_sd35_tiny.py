"""Make ``sd35-tiny``: a trained StableDiffusion3Pipeline of Fashion-MNIST items at a place, in a size.

    python -m raydmd.zoo.make_sd35_tiny --work /tmp/sd35-tiny --minutes 50

Needs Debian's package ``dataset-fashion-mnist``. Stages keep their results in ``--work`` and are not
repeated: autoencoder, transformer with text encoders, judges. The result goes to
``raydmd/zoo/data/sd35-tiny`` in diffusers' own format, weights in fp16.
"""

from __future__ import annotations

from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from raydmd.zoo.make_mmdit import SHIFT, TextToImage, train_mmdit
from raydmd.zoo.make_vae import build_image_vae
from raydmd.zoo.making import attribute_judges, autoencoder, start, text_to_image, write
from raydmd.zoo.still import StillWorld

SHARES = {"vae": 0.25, "transformer": 0.6, "judges": 0.15}


def main() -> None:
    """Run the stages that are not done yet and write the pipeline."""
    args, world = start(__doc__, "sd35-tiny", 50.0, StillWorld)
    minutes = {stage: share * args.minutes for stage, share in SHARES.items()}
    vae = autoencoder(args.work, build_image_vae, world, minutes=minutes["vae"])

    parts = text_to_image(
        args.work / "transformer", TextToImage, train_mmdit, vae, world, minutes=minutes["transformer"]
    )
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


if __name__ == "__main__":
    main()
