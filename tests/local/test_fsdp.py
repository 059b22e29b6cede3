"""FSDP2 with bf16 in one gloo process: exact times, fp32 masters in the checkpoint, exact resume."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from raydmd.models.base import Conditions
from tests.local.test_worker import recipe, two_experts, work

pytestmark = pytest.mark.local
__all__ = ["two_experts"]


@pytest.fixture
def group():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


FSDP = {"precision": "bf16", "sharding": "fsdp", "gradient_checkpointing": True}


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 2.0}], ids=["full", "lora"])
def test_times_stay_exact_and_checkpoints_hold_the_masters(group, two_experts, tmp_path, lora):
    changes = {"training": {**FSDP, "student": {"rate": 1e-3, "lora": lora}}}
    whole, _ = work(recipe(two_experts, tmp_path / "whole", **changes))
    parts = recipe(two_experts, tmp_path / "parts", **changes)
    for stop in (2, 5):
        work(parts, stop_at=stop)
    resumed, _ = work(parts)
    ours, theirs = resumed.state(), whole.state()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if name.endswith(("step", "updates")):
            continue
        assert isinstance(value, DTensor), name
        assert value.dtype == torch.float32, name
        assert torch.equal(value.full_tensor(), ours[name].full_tensor()), name

    seen: list[torch.Tensor] = []
    network = resumed.student.denoisers["transformer"].network
    handle = network.condition_embedder.timesteps_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    latent = resumed.family.shape().latent
    cond = Conditions(embeds=torch.zeros(1, resumed.family.text_length(), 24))
    with torch.no_grad():
        resumed.student.experts.raw(torch.randn(1, *latent), torch.tensor([0.9375]), cond)
    handle.remove()
    assert float(seen[0]) == 937.5
