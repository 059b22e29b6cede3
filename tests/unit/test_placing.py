"""Networks over several GPUs, as far as a machine without them shows: what is asked of accelerate, what refused."""

from __future__ import annotations

from typing import Any

import accelerate
import accelerate.utils
import pytest
import torch
from torch import nn

from raydmd.errors import InputError, RunFailed
from raydmd.models import load_family
from raydmd.models.placing import place, take_back
from raydmd.models.untrained import write
from raydmd.recipe import Model
from tests.pipelines import WORDS

pytestmark = pytest.mark.unit
CUDA = torch.device("cuda")


class Network(nn.Module):
    _no_split_modules = ("Linear",)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = Network()


@pytest.fixture
def gpus(monkeypatch) -> dict[str, Any]:
    """Two that exist on paper; what is sent to them stays on the CPU, hooks and all."""
    found: dict[str, Any] = {"limits": {0: 200, 1: 200, "cpu": 10**9}}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(accelerate.utils, "get_balanced_memory", lambda *_, **__: found["limits"])

    def infer(network: nn.Module, max_memory: dict[int, int], no_split_module_classes: Any) -> dict[str, Any]:
        found["asked"] = (max_memory, no_split_module_classes)
        return found.get("where", {"blocks.0": 0, "blocks.1": 0, "blocks.2": 1, "blocks.3": 1})

    def dispatch(network: nn.Module, device_map: dict[str, Any]) -> None:
        network.hf_device_map = device_map
        for name in device_map:
            hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu")
            accelerate.hooks.add_hook_to_module(network.get_submodule(name), hook)

    monkeypatch.setattr(accelerate, "infer_auto_device_map", infer)
    monkeypatch.setattr(accelerate, "dispatch_model", dispatch)
    return found


def test_blocks_go_to_all_gpus_and_come_back(gpus):
    held, x = Held(), torch.randn(2, 4)
    before = held.network(x)
    place(held, CUDA, spread=True)
    assert gpus["asked"] == ({0: 200, 1: 200}, ("Linear",)), "what the CPU could hold does not count"
    assert set(held.network.hf_device_map.values()) == {0, 1}
    assert torch.equal(held.network(x), before)
    take_back(held)
    assert not hasattr(held.network, "hf_device_map")
    assert not any(hasattr(m, "_hf_hook") for m in held.network.modules())
    assert torch.equal(held.network(x), before)


def test_what_does_not_fit_on_them_is_no_silent_crawl(gpus):
    gpus["where"] = {"blocks.0": 0, "blocks.1": 1, "blocks.2": "cpu", "blocks.3": "disk"}
    with pytest.raises(RunFailed, match=r"Network does not fit on the 2 GPUs .*: parts would go to cpu, disk"):
        place(Held(), CUDA, spread=True)


def test_one_device_is_one_device(monkeypatch):
    moved: list[Any] = []
    monkeypatch.setattr(Held, "to", lambda self, device: moved.append(device))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    place(Held(), CUDA)  # a worker may see its neighbours' GPUs
    place(Held(), torch.device("cpu"), spread=True)
    assert moved == [CUDA, torch.device("cpu")]


def test_a_network_without_cuts_is_refused_before_the_start(tmp_path):
    dit, wan = (load_family(Model(path=str(write(kind, tmp_path / kind, WORDS)))) for kind in ("dit", "wan21"))
    wan.check_spread(2)
    dit.check_spread(1)
    with pytest.raises(InputError, match=r"placement\.teacher_gpus=2 does not fit .*DiTTransformer2DModel can be cut"):
        dit.check_spread(2)
