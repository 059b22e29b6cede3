"""LoRA files that belong to a teacher: fused if they are for it, refused with a reason if not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from raydmd.errors import InputError
from raydmd.models import load_family
from raydmd.models.identity import fingerprint
from raydmd.models.untrained import write
from raydmd.recipe import Lora, Model, Recipe, Training, derive
from raydmd.training.export import export
from raydmd.training.roles import adapter_weights, add_adapter
from tests.pipelines import WORDS

if TYPE_CHECKING:
    from pathlib import Path

    from raydmd.models.base import Denoiser
    from raydmd.models.family import Family

pytestmark = pytest.mark.local
UNREAD = "more than low-rank matrices of a transformer, or under names that diffusers does not read"
FP32 = {"dtype": torch.float32, "autocast": torch.float32}


def lora(family: Family, folder: Path, *, alpha: float = 3.0) -> tuple[Path, Denoiser]:
    """A LoRA file as other tools write it, with an alpha of its own, and the network that has it."""
    denoiser = family.denoiser(family.network, **FP32)
    add_adapter(denoiser, Lora(rank=2, alpha=alpha), seed=0)
    for name, p in denoiser.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(1))
    about = {"r": 2, "lora_alpha": alpha, "target_modules": sorted(denoiser.lora_targets)}
    family.export_lora(folder, {family.network: adapter_weights(denoiser)}, {family.network: about})
    return folder / f"{family.network}.safetensors", denoiser


@pytest.mark.parametrize("kind", ["wan21", "sd3", "sdxl", "flux"])
def test_a_fused_teacher_computes_what_its_adapter_does(tmp_path, kind):
    folder = write(kind, tmp_path / kind, WORDS)
    plain = load_family(Model(path=str(folder)))
    file, expected = lora(plain, tmp_path / "lora")
    settings = Model(path=str(folder), lora={plain.network: str(file)})
    fused = load_family(settings).denoiser(plain.network, **FP32)
    assert not any("lora" in name for name, _ in fused.network.named_parameters())
    network = expected.network
    network.fuse_lora(adapter_names=["student"])
    network.unload_lora()
    start = plain.denoiser(plain.network, **FP32).network.state_dict()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(fused.network.state_dict()[name], value, rtol=0, atol=1e-6)
    assert any((value - start[name]).abs().max() > 1e-3 for name, value in network.state_dict().items())
    assert fingerprint(settings, [plain.network]) != fingerprint(Model(path=str(folder)), [plain.network])


def test_a_students_card_names_what_was_fused(tmp_path):
    folder = write("sd3", tmp_path / "sd3", WORDS)
    file, _ = lora(load_family(Model(path=str(folder))), tmp_path / "lora")
    for given, said in (({"transformer": str(file)}, True), ({}, False)):
        plain = {"model": {"path": str(folder), "lora": given}, "training.student.lora": None}
        recipe = derive(Recipe(), plain)
        family = load_family(recipe.model)
        student = {"transformer": family.denoiser("transformer", dtype=torch.float32)}
        export(recipe, family, student, tmp_path / str(said))
        card = (tmp_path / str(said) / "pipeline" / "README.md").read_text()
        assert ("LoRA files fused: `transformer.safetensors` into its transformer." in card) == said


def test_a_lora_for_another_base_is_refused(tmp_path):
    small, other = (write("sd3", tmp_path / str(heads), WORDS, heads=heads) for heads in (2, 3))
    file, _ = lora(load_family(Model(path=str(small))), tmp_path / "lora")
    family = load_family(Model(path=str(other), lora={"transformer": str(file)}))
    with pytest.raises(InputError, match=r"for another base than this SD3Transformer2DModel: .*24 inputs, here 36"):
        family.denoiser("transformer", **FP32)
    wan = load_family(Model(path=str(write("wan21", tmp_path / "wan", WORDS)), lora={"transformer": str(file)}))
    with pytest.raises(InputError, match=r"for another base than this WanTransformer3DModel: .*which is not there"):
        wan.denoiser("transformer", **FP32)
    with pytest.raises(InputError, match=r"model.lora names unet; the networks of .* are transformer"):
        load_family(Model(path=str(small), lora={"unet": str(file)}))


def test_a_file_that_is_no_lora_is_refused(tmp_path):
    folder = write("sd3", tmp_path / "sd3", WORDS)
    file, _ = lora(load_family(Model(path=str(folder))), tmp_path / "lora")
    more = load_file(file) | {"text_encoder.layers.0.lora_A.weight": torch.zeros(2, 8)}
    save_file(more, tmp_path / "more.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "none.safetensors")
    for name, says in (
        (
            "more",
            f"holds {UNREAD}, e.g. text_encoder.layers.0",
        ),
        ("none", "is no LoRA of a StableDiffusion3Pipeline|holds more than low-rank matrices"),
    ):
        family = load_family(Model(path=str(folder), lora={"transformer": str(tmp_path / f"{name}.safetensors")}))
        with pytest.raises(InputError, match=says):
            family.denoiser("transformer", **FP32)
    with pytest.raises(InputError, match=r"absent\.safetensors is no safetensors file"):  # before anything starts
        load_family(Model(path=str(folder), lora={"transformer": str(tmp_path / "absent.safetensors")}))


def test_a_files_alphas_are_read_or_refused(tmp_path):
    """Diffusers hands FLUX's out when asked, and would pass over those of SD3."""
    for kind in ("flux", "sd3"):
        plain = load_family(Model(path=str(write(kind, tmp_path / kind, WORDS))))
        file, _ = lora(plain, tmp_path / f"{kind}-lora", alpha=2.0)  # of rank 2: a scale of one
        half = tmp_path / f"{kind}.safetensors"
        alphas = {k.replace("lora_A.weight", "alpha"): torch.tensor(1.0) for k in load_file(file) if "lora_A" in k}
        save_file(load_file(file) | alphas, half)
        family = load_family(Model(path=str(tmp_path / kind), lora={"transformer": str(half)}))
        if kind == "sd3":
            with pytest.raises(InputError, match=rf"{UNREAD}, e.g. .*alpha"):
                family.denoiser("transformer", **FP32)
            continue
        settings = Model(path=str(tmp_path / kind), lora={"transformer": str(file)})
        one = load_family(settings).denoiser("transformer", **FP32).network.state_dict()
        start, found = (f.denoiser("transformer", **FP32).network.state_dict() for f in (plain, family))
        for name, value in start.items():
            torch.testing.assert_close(found[name] - value, (one[name] - value) / 2, rtol=0, atol=1e-6)


def test_adapters_on_a_network_that_takes_none_are_refused(tmp_path):
    family = load_family(Model(path=str(write("dit", tmp_path, WORDS))))
    with pytest.raises(InputError, match=r"Set training\.student\.lora=null"):
        family.check_roles(Training())
