"""Make ``wan22-tiny``: a trained two-expert WanPipeline of moving Fashion-MNIST items.

    python -m raydmd.zoo.make_wan22_tiny --work /tmp/wan22-tiny --minutes 90

Needs Debian's package ``dataset-fashion-mnist``. Stages keep their results in ``--work`` and are not
repeated: autoencoder, its decoder alone, experts with text encoder, judge. The result goes to
``raydmd/zoo/data/wan22-tiny`` in diffusers' own format, weights in fp16.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from raydmd.zoo.judge import AttributeJudge, train_judge
from raydmd.zoo.make_experts import BOUNDARY, SHIFT, train_experts
from raydmd.zoo.make_vae import (
    LATENT_NOISE,
    build_vae,
    encode_clips,
    fix_latent_statistics,
    train_vae,
)
from raydmd.zoo.world import FRAMES, SIZE, World, sample_captions

TARGET = Path(__file__).parent / "data" / "wan22-tiny"
SHARES = {"vae": 0.28, "decoder": 0.16, "experts": 0.5, "judge": 0.06}
CLIPS = 12_288


def main() -> None:
    """Run the stages that are not done yet and write the pipeline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the stages' results")
    parser.add_argument("--minutes", type=float, default=90.0, help="wall time for all stages (default 90)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--target", type=Path, default=TARGET)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    try:
        world = World(args.data)
    except FileNotFoundError as error:
        sys.exit(str(error))
    minutes = {stage: share * args.minutes for stage, share in SHARES.items()}
    args.work.mkdir(parents=True, exist_ok=True)
    vae = autoencoder(args.work, world, minutes)
    high, low, text, tokenizer = experts(args.work, vae, world, minutes["experts"])
    judge = attribute_judge(args.work, vae, world, minutes["judge"])
    write(args.target, vae, high, low, text, tokenizer, judge)
    total = sum(f.stat().st_size for f in args.target.rglob("*") if f.is_file())
    print(f"wrote {args.target}: {total / 1e6:.1f} MB")


def autoencoder(work: Path, world: World, minutes: dict[str, float]) -> AutoencoderKLWan:
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
    work: Path, vae: AutoencoderKLWan, world: World, minutes: float
) -> tuple[WanTransformer3DModel, WanTransformer3DModel, UMT5EncoderModel, PreTrainedTokenizerFast]:
    """Experts, text encoder and tokenizer on encoded clips."""
    done = work / "experts"
    if not done.is_dir():
        latents, prompts = encoded(work, vae, world)
        high, low, text, tokenizer = train_experts(latents, prompts, minutes=minutes, seed=0)
        for name, part in (("high", high), ("low", low), ("text", text), ("tokenizer", tokenizer)):
            part.save_pretrained(done / name)
    return (
        WanTransformer3DModel.from_pretrained(done / "high"),
        WanTransformer3DModel.from_pretrained(done / "low"),
        UMT5EncoderModel.from_pretrained(done / "text"),
        PreTrainedTokenizerFast.from_pretrained(done / "tokenizer"),
    )


def encoded(work: Path, vae: AutoencoderKLWan, world: World) -> tuple[Tensor, list[str]]:
    """Normalised latents of rendered clips, and their captions."""
    file = work / "latents.pt"
    if not file.is_file():
        latents, prompts, _ = encode_clips(vae, world, count=CLIPS, seed=7)
        torch.save((latents, prompts), file)
    latents, prompts = torch.load(file, weights_only=True)
    view = (1, -1, 1, 1, 1)
    mean, std = (torch.tensor(v).view(view) for v in (vae.config.latents_mean, vae.config.latents_std))
    return (latents - mean) / std, prompts


def attribute_judge(work: Path, vae: AutoencoderKLWan, world: World, minutes: float) -> AttributeJudge:
    """The judge, trained on real clips and on what the autoencoder makes of them."""
    done = work / "judge.safetensors"
    if not done.is_file():

        @torch.no_grad()
        def render(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            seed = int(torch.randint(2**31, (), generator=generator))
            clips, labels = world.clips(sample_captions(batch, seed=seed, keep=0.0), generator=generator)
            half = batch // 2
            z = vae.encode(clips[:half]).latent_dist.mode()
            clips[:half] = vae.decode(z + LATENT_NOISE * torch.randn(z.shape, generator=generator)).sample
            return (clips.permute(0, 2, 1, 3, 4) / 2 + 0.5).clamp(0, 1), labels

        train_judge(render, minutes=minutes, seed=0).save(done)
    return AttributeJudge.load(done)


def write(
    target: Path,
    vae: AutoencoderKLWan,
    high: WanTransformer3DModel,
    low: WanTransformer3DModel,
    text: UMT5EncoderModel,
    tokenizer: PreTrainedTokenizerFast,
    judge: AttributeJudge,
) -> None:
    """Write the folder."""
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text.half(),
        vae=vae.half(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT),
        transformer=high.half(),
        transformer_2=low.half(),
        boundary_ratio=BOUNDARY,
    ).save_pretrained(target)
    for file in target.glob("*/config.json"):  # diffusers notes where a part was loaded from: folders of this machine
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    judge.save(target / "judge.safetensors")
    prompts = [c.text for c in sample_captions(2048, seed=11)]
    (target / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    about = {
        "frames": FRAMES,
        "height": SIZE,
        "width": SIZE,
        "prompts": "prompts.txt",
        "judge": "judge.safetensors",
    }
    (target / "raydmd.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
