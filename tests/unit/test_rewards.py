"""Rewards with tiny random models: loading, closed forms, conversion of published formats, errors."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForImageTextRetrieval,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from raydmd.errors import InputError, NonFiniteError
from raydmd.recipe_method import Reward as RewardSpec
from raydmd.rewards.build import build
from raydmd.rewards.classifier import ClassifierReward
from raydmd.rewards.clip import ClipEncoder, ClipScore
from raydmd.rewards.convert import clip_from_open_clip, image_reward_from_original
from raydmd.rewards.heads import MEAN, STD, ImageReward, ImageRewardNet
from raydmd.rewards.pictures import Preprocess
from raydmd.zoo.judge import AttributeJudge
from raydmd.zoo.world import ATTRIBUTES

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.unit

PROMPTS = ["a red bag", "a dog that runs over the beach", "x"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "bag", "dog", "that", "runs"]
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}


def clips(batch: int = 3, frames: int = 2, size: int = 40) -> Tensor:
    """Noise around a colour of each frame's own, so that frames score differently."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(batch, frames, 3, 1, 1, generator=generator)
    return 0.8 * colours + 0.2 * torch.rand(batch, frames, 3, size, size + 10, generator=generator)


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's own class over single bytes: every character is a token, with ``</w>`` at a word's end."""
    letters = [chr(k) for k in range(ord("a"), ord("z") + 1)]
    words = [*letters, *[k + "</w>" for k in letters], "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


def clip_config() -> CLIPConfig:
    ends = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    return CLIPConfig(
        text_config={**TEXT, "vocab_size": 54, "max_position_embeddings": 16, "hidden_act": "gelu", **ends},
        vision_config={**VISION, "image_size": 16, "patch_size": 8, "hidden_act": "gelu"},
        projection_dim=20,
    )


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    model = CLIPModel(clip_config())
    with torch.no_grad():
        for weight in model.parameters():  # transformers' own start is so small that all cosines are alike
            weight.add_(0.2 * torch.randn_like(weight))
        model.logit_scale.fill_(3.0)
    model.save_pretrained(folder)
    clip_tokenizer(folder).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessorPil(**sizes).save_pretrained(folder)
    return folder


def reference_logits(folder: Path, pixels: Tensor) -> Tensor:
    """transformers' whole path over 8-bit pictures, ``(B, F)`` of logit_scale * cos, pictures by their own prompt."""
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    rows = []
    for clip, prompt in zip(pixels, PROMPTS, strict=True):
        pictures = [(f.permute(1, 2, 0) * 255).round().numpy().astype(np.uint8) for f in clip]
        ready = processor(pictures, return_tensors="pt").pixel_values
        # One prompt at a time, so that nothing is padded.
        tokens = tokenizer([prompt], truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            rows.append(model(pixel_values=ready, **tokens).logits_per_image[:, 0])
    return torch.stack(rows)


def test_clip_rewards_equal_transformers(clip_folder: Path, tmp_path: Path) -> None:
    pixels = clips()
    logits = reference_logits(clip_folder, pixels)
    cosines = logits / torch.tensor(3.0).exp()
    # The test means something only if samples differ, and if one has frames on both sides of zero.
    assert logits.std() > 0.5
    assert ((cosines.amin(1) < -0.005) & (cosines.amax(1) > 0.005)).any(), cosines
    for kind, wanted in {
        "clip": 100 * cosines.clamp(min=0).mean(1),
        "pick": logits.mean(1),
        "hps": logits.mean(1),
    }.items():
        reward = build([RewardSpec(kind=kind, path=str(clip_folder), frames=2)])
        values = reward.score(pixels, PROMPTS, range(3))
        assert reward.name == kind
        assert (values.dtype, values.requires_grad) == (torch.float32, False)
        torch.testing.assert_close(values, wanted, rtol=1e-4, atol=1e-4)
    # One picture is the clip's middle frame; tokenizer and picture settings may lie elsewhere.
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((clip_folder / name).read_bytes())
    single = build([RewardSpec(kind="pick", path=str(tmp_path), processor=str(clip_folder), frames=1)])
    torch.testing.assert_close(single(pixels, PROMPTS), logits[:, 1], rtol=1e-4, atol=1e-4)


def test_clip_folders_that_cannot_serve_are_refused(clip_folder: Path, tmp_path: Path) -> None:
    def load(folder: Path | str, kind: str = "pick") -> None:
        build([RewardSpec(kind=kind, path=str(folder))])

    for missing in (tmp_path / "none", "./none", "a/b/c"):
        with pytest.raises(InputError, match="no folder"):
            load(missing)
    with pytest.raises(InputError, match=r"config\.json"):
        load(tmp_path)
    with pytest.raises(InputError, match="'clip', not 'blip'"):
        load(clip_folder, "image_reward")
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((clip_folder / name).read_bytes())
    with pytest.raises(InputError, match="tokenizer"):
        load(tmp_path)
    CLIPTokenizer.from_pretrained(clip_folder).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no CLIPModel"):
        load(tmp_path)
    weights = load_file(clip_folder / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 weights.*text_projection"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="no CLIPModel"):
        load(tmp_path)


class OpenClipBlock(nn.Module):
    """A residual block with open_clip's names, around torch's own attention."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, inner), "c_proj": nn.Linear(inner, width)})

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class OpenClipTower(nn.Module):
    """open_clip's Transformer: blocks under ``resblocks``."""

    def __init__(self, hidden_size: int, intermediate_size: int, num_hidden_layers: int, num_attention_heads: int):
        super().__init__()
        blocks = [OpenClipBlock(hidden_size, num_attention_heads, intermediate_size) for _ in range(num_hidden_layers)]
        self.resblocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class OpenClipVision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width = VISION["hidden_size"]
        self.conv1 = nn.Conv2d(3, width, 8, stride=8, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(5, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = OpenClipTower(**VISION)
        self.proj = nn.Parameter(torch.randn(width, 20))

    def forward(self, pictures: Tensor) -> Tensor:
        patches = self.conv1(pictures).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(pictures), 1, -1), patches], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """CLIP as open_clip writes it: its names and its forward, at a toy's size."""

    def __init__(self) -> None:
        super().__init__()
        width = TEXT["hidden_size"]
        self.visual = OpenClipVision()
        self.transformer = OpenClipTower(**TEXT)
        self.token_embedding = nn.Embedding(54, width)
        self.positional_embedding = nn.Parameter(torch.randn(16, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, 20))
        self.logit_scale = nn.Parameter(torch.tensor(2.5))

    def forward(self, pictures: Tensor, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = torch.full((length, length), -torch.inf).triu(1)
        x = self.transformer(self.token_embedding(tokens) + self.positional_embedding[:length], mask)
        texts = self.ln_final(x)[torch.arange(len(x)), tokens.argmax(1)] @ self.text_projection
        return self.logit_scale.exp() * F.cosine_similarity(self.visual(pictures)[:, None], texts[None], dim=-1)


def test_an_open_clip_checkpoint_becomes_the_same_model() -> None:
    torch.manual_seed(0)
    theirs, ours = OpenClip().eval(), CLIPModel(clip_config()).eval()
    ours.load_state_dict(clip_from_open_clip({f"module.{k}": v for k, v in theirs.state_dict().items()}))
    pictures, tokens = torch.randn(2, 3, 16, 16), torch.tensor([[52, 3, 7, 30, 53], [52, 9, 1, 40, 53]])
    with torch.no_grad():
        wanted = theirs(pictures, tokens)
        found = ours(pixel_values=pictures, input_ids=tokens).logits_per_image
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    for strange in ("transformer.resblocks.0.ln_3.weight", "visual.attnpool.weight"):
        with pytest.raises(InputError, match=strange):
            clip_from_open_clip({strange: torch.zeros(1)})


@pytest.fixture(scope="module")
def image_reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("image_reward")
    torch.manual_seed(0)
    config = BlipConfig(
        text_config={**TEXT, "vocab_size": 16, "max_position_embeddings": 35, "bos_token_id": 2, "sep_token_id": 3},
        vision_config={**VISION, "image_size": 16, "patch_size": 8},
    )
    net = ImageRewardNet(config)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    config.save_pretrained(folder)
    save_file(net.state_dict(), folder / "model.safetensors")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessorPil(**sizes).save_pretrained(folder)
    return folder


def test_image_reward_equals_transformers_matching_head(image_reward_folder: Path) -> None:
    """The MLP has no activations, so it is one affine map, which BLIP's own matching head can carry."""
    config = BlipConfig.from_pretrained(image_reward_folder)
    state = load_file(image_reward_folder / "model.safetensors")
    matrix, bias = torch.eye(TEXT["hidden_size"], dtype=torch.float64), torch.zeros(TEXT["hidden_size"]).double()
    for layer in range(5):
        weight, shift = (state[f"head.{layer}.{k}"].double() for k in ("weight", "bias"))
        matrix, bias = weight @ matrix, weight @ bias + shift
    blip = BlipForImageTextRetrieval(config).eval()
    blip.load_state_dict({k: v for k, v in state.items() if not k.startswith("head.")}, strict=False)
    with torch.no_grad():
        blip.itm_head.weight.copy_(matrix.expand(2, -1))
        blip.itm_head.bias.copy_(bias.expand(2))

    pixels = clips()
    reward = build([RewardSpec(kind="image_reward", path=str(image_reward_folder), frames=2)])
    found = reward.score(pixels, PROMPTS, ["a", "b", "c"])
    tokenizer = BertTokenizer.from_pretrained(image_reward_folder)
    prepare = Preprocess.read(str(image_reward_folder))
    wanted = []
    for clip, prompt in zip(pixels, PROMPTS, strict=True):
        tokens = tokenizer([prompt] * 2, return_tensors="pt")
        with torch.no_grad():
            out = blip(pixel_values=prepare(clip), input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        wanted.append(((out.itm_score[:, 0] - MEAN) / STD).mean())
    assert torch.stack(wanted).std() > 1e-3 * torch.stack(wanted).abs().max()
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-4, atol=1e-4)


def test_image_reward_reads_the_original_names(image_reward_folder: Path) -> None:
    state = load_file(image_reward_folder / "model.safetensors")
    rename = {
        "vision_model.embeddings.class_embedding": "blip.visual_encoder.cls_token",
        "vision_model.embeddings.position_embedding": "blip.visual_encoder.pos_embed",
        "vision_model.embeddings.patch_embedding.": "blip.visual_encoder.patch_embed.proj.",
        "vision_model.post_layernorm.": "blip.visual_encoder.norm.",
        "vision_model.encoder.layers.": "blip.visual_encoder.blocks.",
        "layer_norm": "norm",
        "self_attn.projection": "attn.proj",
        "self_attn": "attn",
        "text_encoder.": "blip.text_encoder.",
        **{f"head.{k}.": f"mlp.layers.{n}." for k, n in enumerate((0, 2, 4, 6, 7))},
    }
    original: dict[str, Tensor] = {}
    for name, value in state.items():
        given = name
        for ours, theirs in rename.items():
            given = given.replace(ours, theirs)
        original[given] = value
    rest = ("blip.visual_encoder_m.norm.weight", "blip.temp", "blip.text_encoder.embeddings.position_ids")
    back = image_reward_from_original(original | dict.fromkeys(rest, torch.zeros(1)))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], v) for k, v in state.items())
    for strange in ("mlp.layers.1.weight", "blip.visual_encoder.blocks.0.norm3.bias", "other"):
        with pytest.raises(InputError, match=strange):
            image_reward_from_original({strange: torch.zeros(1)})


def test_image_reward_needs_a_whole_folder(image_reward_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be converted"):
        ImageReward.load("THUDM/ImageReward", frames=1)
    for file in image_reward_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["head.4.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"head\.4\.bias"):
        ImageReward.load(str(tmp_path), frames=1)
    with pytest.raises(InputError, match="'blip', not 'clip'"):
        ClipEncoder.load(str(tmp_path), frames=1)


def test_the_zoo_s_reward_is_the_mean_log_probability_of_what_is_stated(tmp_path: Path) -> None:
    judge = AttributeJudge()
    chances = {
        name: torch.arange(1.0, len(values) + 1) / sum(range(1, len(values) + 1)) for name, values in ATTRIBUTES.items()
    }
    with torch.no_grad():
        for name, chance in chances.items():
            judge.heads[name].weight.zero_()
            judge.heads[name].bias.copy_(chance.log() + 5)
    judge.save(tmp_path / "judge.safetensors")
    reward = build([RewardSpec(kind="zoo", path=str(tmp_path / "judge.safetensors"))])
    pixels = torch.rand(4, 9, 3, 32, 32)
    prompts = ["a green bag moving left fast", "something moving up", "something", "a red thing"]
    # bag: 7th of 8 items; green: 2nd of 4 colours; left: 1st, up: 3rd of 4; fast: 2nd of 2 speeds.
    logs = torch.tensor([7 / 36, 2 / 10, 1 / 10, 2 / 3]).log()
    wanted = torch.stack([logs.mean(), torch.tensor(0.3).log(), torch.tensor(0.0), torch.tensor(0.1).log()])
    torch.testing.assert_close(reward.score(pixels, prompts, range(4)), wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="zoo's captions"):
        reward.score(pixels[:1], ["a purple cow"], [0])
    with pytest.raises(InputError, match="shape"):
        reward.score(pixels[:, :5], prompts, range(4))
    with pytest.raises(InputError, match="no attribute judge"):
        ClassifierReward.load(tmp_path / "none.safetensors")


def test_a_clip_with_nan_is_named(clip_folder: Path) -> None:
    pixels = clips()
    pixels[1, 0, 0, 5, 5] = torch.nan
    reward = ClipScore(ClipEncoder.load(str(clip_folder), frames=2))
    with pytest.raises(
        NonFiniteError, match=r"'clip', sample 71 \(prompt 'a dog.*bad samples.*\[71\]; its pixels"
    ) as caught:
        reward.score(pixels, PROMPTS, [70, 71, 72])
    assert caught.value.samples == (1,)


def test_settings_build_the_sum_and_idle_ones_are_refused(clip_folder: Path) -> None:
    path = str(clip_folder)
    both = build([RewardSpec(kind="clip", path=path, weight=0.1), RewardSpec(kind="pick", path=path, mean=3)])
    assert both.name == "0.1*clip + (pick-3)"
    parts = [build([RewardSpec(kind=kind, path=path)]).score(clips(), PROMPTS, range(3)) for kind in ("clip", "pick")]
    torch.testing.assert_close(both.score(clips(), PROMPTS, range(3)), 0.1 * parts[0] + parts[1] - 3)
    idle: list[dict[str, Any]] = [
        {"kind": "hps"},
        {"kind": "zoo", "path": path, "frames": 2},
        {"kind": "image_reward", "path": path, "processor": path},
        {"kind": "clip", "weight": 0},
        {"kind": "clip", "frames": 0},
        {"kind": "aesthetic", "path": path},
    ]
    for settings in idle:
        with pytest.raises(ValidationError):
            RewardSpec(**settings)
    with pytest.raises(InputError, match="at least one"):
        build([])
