"""Files of strangers run nothing: pickles in pipelines, LoRAs, rewards and checkpoints."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.state_dict_loader import load as plain_load

from raydmd.errors import DamagedCheckpoint, InputError
from raydmd.models import load_family, load_teacher
from raydmd.recipe import Recipe, derive
from raydmd.rewards.loading import read_model
from raydmd.training import checkpoint
from raydmd.training.metadata import FILE, read_metadata
from tests.pipelines import wan_pipeline

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.local


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign") / "model"
    wan_pipeline(folder)
    return folder


def poison(folder: Path, canary: Path, *, keep: bool = False) -> None:
    """Give weights as a pickle beside those in safetensors, or in their place."""
    for file in folder.glob("*.safetensors"):
        name = "pytorch_model.bin" if file.name.startswith("model") else file.with_suffix(".bin").name
        torch.save({**load_file(file), "evil": Evil(canary)}, folder / name)
        if not keep:
            file.unlink()


def test_the_poison_works(tmp_path: Path, canary: Path) -> None:
    torch.save({"evil": Evil(canary)}, tmp_path / "a.bin")
    torch.load(tmp_path / "a.bin", weights_only=False)
    assert canary.is_dir()


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
@pytest.mark.parametrize("keep", [False, True], ids=["instead", "beside"])
def test_a_pickle_in_a_pipelines_folder_is_not_read(
    part: str, keep: bool, pipeline: Path, tmp_path: Path, canary: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pipeline, folder)
    poison(folder / part, canary, keep=keep)
    recipe = derive(Recipe(), {"model.path": str(folder), "model.frames": 5, "model.height": 32, "model.width": 32})

    def use() -> None:
        family = load_family(recipe.model)
        load_teacher(family, "fp32", device=torch.device("cpu"))
        family.encode(["a cat"], tmp_path / "conditions")
        family.decode(torch.zeros(1, *family.shape().latent))

    if keep:
        use()
    else:
        with pytest.raises(InputError, match="safetensors"):
            use()
    assert not canary.exists()


def test_code_of_a_pipelines_folder_is_not_run(pipeline: Path, tmp_path: Path, canary: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pipeline, folder)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"_class_name": "WanPipeline"', '"_class_name": ["pipeline", "Evil"]'))
    (folder / "pipeline.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    with pytest.raises(InputError):
        load_family(derive(Recipe(), {"model.path": str(folder)}).model)
    assert not canary.exists()


def test_a_pickle_for_a_lora_is_refused(pipeline: Path, tmp_path: Path, canary: Path) -> None:
    torch.save({"evil": Evil(canary)}, tmp_path / "lora.bin")
    with pytest.raises(InputError, match="no safetensors file"):
        load_family(
            derive(
                Recipe(), {"model.path": str(pipeline), "model.lora": {"transformer": str(tmp_path / "lora.bin")}}
            ).model
        )
    shutil.copy(tmp_path / "lora.bin", tmp_path / "lora.safetensors")
    family = load_family(
        derive(
            Recipe(), {"model.path": str(pipeline), "model.lora": {"transformer": str(tmp_path / "lora.safetensors")}}
        ).model
    )
    with pytest.raises(InputError, match=r"lora\.safetensors is no LoRA"):
        load_teacher(family, "fp32", device=torch.device("cpu"))
    assert not canary.exists()


@pytest.mark.parametrize("keep", [False, True], ids=["instead", "beside"])
def test_a_pickle_in_a_rewards_folder_is_not_read(keep: bool, tmp_path: Path, canary: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    CLIPTextModel(config).save_pretrained(tmp_path / "reward")
    poison(tmp_path / "reward", canary, keep=keep)
    if keep:
        read_model(CLIPTextModel, str(tmp_path / "reward"))
    else:
        with pytest.raises(InputError, match="safetensors"):
            read_model(CLIPTextModel, str(tmp_path / "reward"))
    assert not canary.exists()


def saved(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {
        "a": torch.randn(3, 4),
        "b": torch.randn(5).bfloat16(),
        "step": torch.tensor(3.0),
        "image": torch.randn(1, 3, 4, 4).to(memory_format=torch.channels_last),
        "ids": torch.arange(4),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder.mkdir(exist_ok=True)
        checkpoint.save(folder, tensors, checkpoint.Progress(cycle=1, phase=0, monitor={}, recipe=""), rank=0)
    return tensors


def test_our_own_checkpoints_are_read(tmp_path: Path) -> None:
    tensors = saved(tmp_path)
    empty = {k: torch.zeros_like(v) for k, v in tensors.items()}
    checkpoint.load(tmp_path, empty)
    for name, tensor in tensors.items():
        assert torch.equal(empty[name], tensor), name


def attacks(folder: Path, canary: Path) -> dict[str, Any]:
    """What ``.metadata`` could be made to hold."""
    honest = read_metadata(folder)
    bytes_ = pickle.loads(pickle.dumps(honest))
    bytes_.state_dict_metadata["a"] = metadata.BytesStorageMetadata()
    outside = pickle.loads(pickle.dumps(honest))
    for info in outside.storage_data.values():
        info.relative_path = "../elsewhere/__0_0.distcp"
    planner = pickle.loads(pickle.dumps(honest))
    planner.planner_data = Evil(canary)
    return {"whole": Evil(canary), "planner": planner, "bytes": bytes_, "outside": outside, "list": [1]}


@pytest.mark.parametrize("kind", ["whole", "planner", "bytes", "outside", "list"])
def test_a_checkpoints_metadata_run_nothing(kind: str, tmp_path: Path, canary: Path) -> None:
    folder = tmp_path / "cycle-00000001"
    tensors = saved(folder)
    (folder / FILE).write_bytes(pickle.dumps(attacks(folder, canary)[kind]))
    with pytest.raises(DamagedCheckpoint, match=r"cycle-00000001 is damaged: its \.metadata"):
        checkpoint.load(folder, tensors)
    assert not canary.exists()


def test_pytorch_alone_would_run_it(tmp_path: Path, canary: Path) -> None:
    """Why there is a reader of our own; once this fails, it may go."""
    tensors = saved(tmp_path)
    honest = read_metadata(tmp_path)
    honest.planner_data = Evil(canary)
    (tmp_path / FILE).write_bytes(pickle.dumps(honest))
    plain_load(tensors, checkpoint_id=str(tmp_path))
    assert canary.is_dir()


def test_a_pickle_in_the_place_of_tensors_is_not_run(tmp_path: Path, canary: Path) -> None:
    tensors = saved(tmp_path)
    payload = io.BytesIO()
    torch.save(Evil(canary), payload)
    for file in tmp_path.glob("*.distcp"):
        file.write_bytes(payload.getvalue() * (1 + file.stat().st_size // len(payload.getvalue())))
    with pytest.raises(BaseException):  # noqa: B017, PT011  damage is found by its sum before, see test_damage
        checkpoint.load(tmp_path, tensors)
    assert not canary.exists()
