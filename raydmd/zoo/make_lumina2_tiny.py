"""Make ``lumina2-tiny``: a trained Lumina2Pipeline, one stream of text and picture, of the pictures of ``sd35-tiny``.

    python -m raydmd.zoo.make_lumina2_tiny --work /tmp/lumina2-tiny --minutes 30 --threads 2

Needs Debian's package ``dataset-fashion-mnist``. Judges and prompts are those of ``sd35-tiny``. Stages keep their
results in ``--work`` and are not repeated: autoencoder, transformer with text encoder. The autoencoder begins with the
outer levels of that of ``sd35-tiny``: the stock pipeline wants a level more. The result goes to
``raydmd/zoo/data/lumina2-tiny`` in diffusers' own format, weights in fp16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline

from raydmd.zoo.make_single_stream import SHIFT, TextToImage, train_single_stream
from raydmd.zoo.make_vae import build_deeper_vae
from raydmd.zoo.making import DATA, autoencoder, read_autoencoder, read_judges, start, text_to_image, write
from raydmd.zoo.still import StillWorld

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

SHARES = {"vae": 1 / 3, "transformer": 2 / 3}
SOURCE = DATA / "sd35-tiny"


def main() -> None:
    """Run the stages that are not done yet and write the pipeline."""
    args, world = start(__doc__, "lumina2-tiny", 30.0, StillWorld)
    minutes = {stage: share * args.minutes for stage, share in SHARES.items()}

    def build() -> AutoencoderKL:
        return build_deeper_vae(read_autoencoder(SOURCE / "vae"))

    vae = autoencoder(args.work, build, world, minutes=minutes["vae"])
    parts = text_to_image(
        args.work / "transformer", TextToImage, train_single_stream, vae, world, minutes=minutes["transformer"]
    )
    pipeline = Lumina2Pipeline(
        transformer=parts.transformer.half(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae.half(),
        text_encoder=parts.text_encoder.half(),
        tokenizer=parts.tokenizer,
    )
    write(args.target, pipeline, read_judges(SOURCE))


if __name__ == "__main__":
    main()
