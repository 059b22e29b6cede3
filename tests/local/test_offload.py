"""Activations that wait in the host's memory: the same bits, what is kept is gone, and one copy of each."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from raydmd.errors import InputError
from raydmd.models import offload
from raydmd.models.offload import Away, offloaded
from raydmd.models.untrained import write
from raydmd.training.session import FolderSession
from tests.local.test_fsdp import FSDP, group
from tests.local.test_tied import recipe as tied_recipe
from tests.local.test_tied import train
from tests.local.test_worker import recipe, two_experts, work
from tests.pipelines import WORDS

pytestmark = pytest.mark.local
__all__ = ["group", "two_experts"]


@pytest.fixture
def moved(monkeypatch):
    """Tensors that were moved; the networks here are too small for the real bound."""
    found: list[Away] = []

    class Seen(Away):
        def __init__(self, tensor):
            super().__init__(tensor)
            found.append(self)

    monkeypatch.setattr(offload, "LEAST", 0)
    monkeypatch.setattr(offload.offloaded.__wrapped__, "__defaults__", (Seen,))
    return found


def same(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        one, other = (v.full_tensor() if hasattr(v, "full_tensor") else v for v in (value, ours[name]))
        assert torch.equal(one, other), name


@pytest.mark.parametrize("training", [{"gradient_checkpointing": True}, FSDP], ids=["alone", "fsdp, bf16"])
def test_a_run_is_the_same_to_the_bit(group, two_experts, tmp_path, moved, training):
    ends = []
    for away in (False, True):
        changes = {"training": {**training, "offload_activations": away}}
        ends.append(work(recipe(two_experts, tmp_path / str(away), **changes))[0].state())
        assert bool(moved) == away
    same(*ends)


def test_a_tied_run_is_the_same_to_the_bit(tmp_path, moved):
    ends = []
    for away in (False, True):
        folder = tmp_path / str(away)
        write("wan22", folder / "wan22", words=WORDS)
        method = {"name": "phased", "boundaries": [0.875], "steps": 4, "shift": 5.0}
        r = tied_recipe("run", "wan22", folder, method, {"gradient_checkpointing": True, "offload_activations": away})
        ends.append(train(r, FolderSession(r.folder, torch.device("cpu")), tied=True).state())
        assert bool(moved) == away
    same(*ends)


def test_what_many_blocks_read_is_moved_once(moved):
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(4))
    shared = torch.randn(3, 8, requires_grad=True)

    def run() -> torch.Tensor:
        x = shared * 2
        for block in blocks:
            x = checkpoint(lambda a, b, block=block: block(a) + b, x, shared, use_reentrant=False)
        return x.sum()

    run().backward()
    wanted = [shared.grad.clone(), *(p.grad.clone() for p in blocks.parameters())]
    for p in (shared, *blocks.parameters()):
        p.grad = None
    with offloaded():
        loss = run()
    assert len(moved) == 5, "each block's own input, and once what all of them read"
    loss.backward()
    found = [shared.grad, *(p.grad for p in blocks.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize("chunk", [64, 1 << 20])
def test_a_tensor_comes_back_as_it_went(monkeypatch, chunk):
    monkeypatch.setattr(offload, "CHUNK", chunk)
    whole = torch.randn(2, 6, 5, 7)
    for tensor in (
        whole,
        whole.bfloat16(),
        whole.to(memory_format=torch.channels_last),
        whole.permute(3, 0, 2, 1),
        whole[:, 1:4],
        whole[..., ::2],
        whole[0, 0, 0].expand(4, 7),
        torch.tensor(3.0),
    ):
        again = Away(tensor).back()
        assert torch.equal(again, tensor)
        assert again.dtype == tensor.dtype
        assert again.data_ptr() != tensor.data_ptr()
        if tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last):
            assert again.stride() == tensor.stride()


def test_parameters_stay_even_turned_round(moved):
    layer = nn.Linear(8, 8)
    with offloaded():
        layer(torch.randn(3, 8).requires_grad_()).sum()
    kept = [a.back().shape for a in moved]
    assert kept == [(3, 8)], "its input, and not its weight"


def test_a_storage_that_is_made_anew_at_the_same_address_is_not_taken_for_the_old_one(moved):
    grads = []
    for away in (False, True):
        w = torch.full((256,), 2.0, requires_grad=True)
        total = torch.zeros(())
        for k in range(50):  # each product's input dies at once, and the next one is where it was
            if away:
                with offloaded():
                    total = total + (torch.full((256,), float(k)) * w).sum()
            else:
                total = total + (torch.full((256,), float(k)) * w).sum()
        total.backward()
        grads.append(w.grad)
    assert torch.equal(*grads)


def test_it_needs_checkpoints_of_gradients(two_experts, tmp_path):
    with pytest.raises(InputError, match="gradient_checkpointing=true would send every"):
        recipe(two_experts, tmp_path, training={"offload_activations": True})
