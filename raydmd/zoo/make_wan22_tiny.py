"""Make ``wan22-tiny``: a trained two-expert WanPipeline of moving Fashion-MNIST items.

    python -m raydmd.zoo.make_wan22_tiny --work /tmp/wan22-tiny --minutes 90

Needs Debian's package ``dataset-fashion-mnist``. Stages keep their results in ``--work`` and are not
repeated: autoencoder, its decoder alone, experts with text encoder, judges. The result goes to
``raydmd/zoo/data/wan22-tiny`` in diffusers' own format, weights in fp16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from raydmd.zoo.make_experts import BOUNDARY, SHIFT, train_experts
from raydmd.zoo.make_vae import build_vae, fix_latent_statistics, train_vae
from raydmd.zoo.making import attribute_judges, encoded, start, write
from raydmd.zoo.world import Items, World

if TYPE_CHECKING:
    from pathlib import Path

SHARES = {"vae": 0.28, "decoder": 0.16, "experts": 0.46, "judges": 0.1}
CLIPS = 12_288


def main() -> None:
    """Run the stages that are not done yet and write the pipeline."""
    args, world = start(__doc__, "wan22-tiny", 90.0, World)
    minutes = {stage: share * args.minutes for stage, share in SHARES.items()}
    vae = autoencoder(args.work, world, minutes)
    high, low, text, tokenizer = experts(args.work, vae, world, minutes["experts"])
    judges = attribute_judges(args.work, vae, world, minutes=minutes["judges"])
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text.half(),
        vae=vae.half(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT),
        transformer=high.half(),
        transformer_2=low.half(),
        boundary_ratio=BOUNDARY,
    )
    write(args.target, pipeline, judges)


def autoencoder(work: Path, world: Items, minutes: dict[str, float]) -> AutoencoderKLWan:
    """Both stages of the autoencoder."""
    for stage in ("vae", "decoder"):
        done = work / stage
        if not done.is_dir():
            vae = build_vae() if stage == "vae" else AutoencoderKLWan.from_pretrained(work / "vae")
            psnr = train_vae(vae, world, minutes=minutes[stage], seed=0, decoder_only=stage == "decoder")
            print(f"{stage}: {psnr:.2f} dB")
            if stage == "vae":
                fix_latent_statistics(vae, world, seed=5)
            vae.save_pretrained(done)
    return AutoencoderKLWan.from_pretrained(work / "decoder").eval().requires_grad_(False)


def experts(
    work: Path, vae: AutoencoderKLWan, world: Items, minutes: float
) -> tuple[WanTransformer3DModel, WanTransformer3DModel, UMT5EncoderModel, PreTrainedTokenizerFast]:
    """Experts, text encoder and tokenizer on encoded clips."""
    done = work / "experts"
    if not done.is_dir():
        latents, prompts = encoded(work, vae, world, count=CLIPS)
        view = (1, -1, 1, 1, 1)
        mean, std = (torch.tensor(v).view(view) for v in (vae.config.latents_mean, vae.config.latents_std))
        high, low, text, tokenizer = train_experts((latents - mean) / std, prompts, minutes=minutes, seed=0)
        for name, part in (("high", high), ("low", low), ("text", text), ("tokenizer", tokenizer)):
            part.save_pretrained(done / name)
    return (
        WanTransformer3DModel.from_pretrained(done / "high"),
        WanTransformer3DModel.from_pretrained(done / "low"),
        UMT5EncoderModel.from_pretrained(done / "text"),
        PreTrainedTokenizerFast.from_pretrained(done / "tokenizer"),
    )


if __name__ == "__main__":
    main()
