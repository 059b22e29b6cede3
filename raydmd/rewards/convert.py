"""Names of weights: from the formats rewards are published in to transformers' own. Pure functions.

HPSv2 (``HPS_v2.1_compressed.pt``, an open_clip checkpoint), once::

    state = torch.load(file, weights_only=True, map_location="cpu")["state_dict"]
    save_file(clip_from_open_clip(state), folder / "model.safetensors", metadata={"format": "pt"})

beside config.json, preprocessor_config.json and the tokenizer's files of
``laion/CLIP-ViT-H-14-laion2B-s32B-b79K``, whose shape it has. ImageReward (``ImageReward.pt``), once::

    state = torch.load(file, weights_only=True, map_location="cpu")
    save_file(image_reward_from_original(state), folder / "model.safetensors")

beside the tokenizer's files of bert-base-uncased, a preprocessor_config.json of CLIP's (224 pixels), and
a BlipConfig: ViT-L/16 at 224 (hidden 1024, 24 layers, 16 heads, MLP 4096), BERT base (hidden 768, 12
layers, 12 heads, MLP 3072, vocabulary 30524).

File names, the ``state_dict`` key and these sizes are from memory. Names of open_clip's and BLIP's
weights too; they are checked against transformers' names when the folder is loaded, for a missing
weight is refused.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from raydmd.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_CLIP = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    # transformers' own spelling
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
_CLIP_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_TRANSPOSED = {"text_projection", "visual.proj"}
"""Matrices that open_clip multiplies from the right."""
_CLIP_PARTS = {
    "ln_1.weight": "layer_norm1.weight",
    "ln_1.bias": "layer_norm1.bias",
    "ln_2.weight": "layer_norm2.weight",
    "ln_2.bias": "layer_norm2.bias",
    "attn.out_proj.weight": "self_attn.out_proj.weight",
    "attn.out_proj.bias": "self_attn.out_proj.bias",
    "mlp.c_fc.weight": "mlp.fc1.weight",
    "mlp.c_fc.bias": "mlp.fc1.bias",
    "mlp.c_proj.weight": "mlp.fc2.weight",
    "mlp.c_proj.bias": "mlp.fc2.bias",
}
_JOINT = {"attn.in_proj_weight": "weight", "attn.in_proj_bias": "bias"}
"""Query, key and value, stacked in this order, as torch's MultiheadAttention keeps them."""

_VIT = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
_VIT_BLOCK = re.compile(r"blocks\.(\d+)\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)")
_VIT_PARTS = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_MLP = {"0": "0", "2": "1", "4": "2", "6": "3", "7": "4"}
"""Linear layers of the original's MLP, which has dropouts at 1, 3 and 5."""


def clip_from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename open_clip's weights (ViT with a text transformer, e.g. ViT-H-14) to CLIPModel's.

    Args:
        state: open_clip's state dict; ``module.`` in front of every name is ignored.

    Returns:
        CLIPModel's state dict. open_clip's ViT-H uses plain GELU: config.json must say ``gelu`` for both
        encoders.

    Raises:
        InputError: if a name is none of open_clip's.
    """
    found: dict[str, Tensor] = {}
    for given, value in state.items():
        name = given.removeprefix("module.")
        if name == "attn_mask":
            continue  # the causal mask, which old versions keep among the weights
        if name in _CLIP:
            found[_CLIP[name]] = (value.T if name in _TRANSPOSED else value).contiguous()
        else:
            found |= _clip_block(name, value)
    return found


def image_reward_from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename ImageReward's weights to those of :class:`raydmd.rewards.heads.ImageRewardNet`.

    BLIP's pre-training leaves more in the checkpoint (momentum encoders, queues, projections, decoder);
    the reward does not use them and they are left out.

    Args:
        state: the original's state dict.

    Returns:
        The net's state dict.

    Raises:
        InputError: if a name of the encoders or the MLP is unknown.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith("blip.visual_encoder."):
            found[_vit(name)] = value.contiguous()
        elif name.startswith("blip.text_encoder."):
            inner = name.removeprefix("blip.")
            if not inner.endswith("embeddings.position_ids"):  # a count, kept as a buffer by old versions
                found[inner] = value.contiguous()
        elif name.startswith("mlp."):
            layer = re.fullmatch(r"mlp\.layers\.(\d)\.(weight|bias)", name)
            if layer is None or layer[1] not in _MLP:
                raise InputError(f"no weight of ImageReward's MLP: {name!r}")
            found[f"head.{_MLP[layer[1]]}.{layer[2]}"] = value.contiguous()
        elif not name.startswith("blip."):
            raise InputError(f"no weight of ImageReward: {name!r}")
    return found


def _clip_block(name: str, value: Tensor) -> dict[str, Tensor]:
    block = _CLIP_BLOCK.fullmatch(name)
    if block is None or block[3] not in {*_CLIP_PARTS, *_JOINT}:
        raise InputError(f"no weight of open_clip's CLIP: {name!r}")
    layer = f"{'vision' if block[1] else 'text'}_model.encoder.layers.{block[2]}."
    if block[3] in _CLIP_PARTS:
        return {layer + _CLIP_PARTS[block[3]]: value.contiguous()}
    parts = zip("qkv", value.chunk(3), strict=True)
    return {f"{layer}self_attn.{part}_proj.{_JOINT[block[3]]}": v.contiguous() for part, v in parts}


def _vit(name: str) -> str:
    inner = name.removeprefix("blip.visual_encoder.")
    if inner in _VIT:
        return "vision_model." + _VIT[inner]
    block = _VIT_BLOCK.fullmatch(inner)
    if block is None:
        raise InputError(f"no weight of BLIP's image encoder: {name!r}")
    return f"vision_model.encoder.layers.{block[1]}.{_VIT_PARTS[block[2]]}.{block[3]}"
