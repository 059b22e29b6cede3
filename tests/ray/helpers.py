"""A tiny teacher whose misfortunes are steered by files, across processes."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from raydmd.errors import InputError
from raydmd.guidance import Guidance
from raydmd.models.base import Conditions, Denoiser, Experts, Routing
from raydmd.process import RectifiedFlow
from raydmd.serving.engine import load_teacher_engine
from raydmd.serving.messages import ScoreRequest
from raydmd.serving.order import Order, Packed, Replicas, key_of

CPU = torch.device("cpu")
LATENT = (4, 2)
CONDITIONS = Conditions(embeds=torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(2)))


class Fragile(Denoiser):
    """A small network. In ``folder``: ``hang`` makes one forward hang, ``slow`` all of them slow.

    A latent value of 99 makes the answer NaN.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        network = nn.Sequential(nn.Linear(8 + 1 + 4, 64), nn.SiLU(), nn.Linear(64, 8))
        super().__init__(network, (), width=64, autocast=torch.float32)
        self.prediction = "flow"
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=draw))
        self.folder = folder

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        try:
            (self.folder / "hang").unlink()  # one process wins
            time.sleep(60)
        except FileNotFoundError:
            pass
        if (self.folder / "slow").exists():
            time.sleep(1.5)
        out: Tensor = self.network(torch.cat([x_t.flatten(1), t[:, None], cond.embeds.mean(1)], 1))
        return torch.where(x_t == 99, torch.nan, out.view_as(x_t))


ROUTING = Routing(("high", "low"), (0.875,))


@contextmanager
def own_cluster(threads: int = 1, *, deterministic: bool = False) -> Iterator[None]:
    """A Ray of the test's own, whose processes find this folder's modules and use as many threads as this one.

    ``deterministic`` is for this process; a pool's replicas go by their recipe.
    """
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parents[1])])
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100_000_000,
        runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}},
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(before)
        ray.shutdown()


def build(folder: Path, device: torch.device = CPU, experts: tuple[str, ...] = ()) -> Experts:
    """Load the teacher or some of its experts; with a file ``broken`` in the folder it cannot be loaded."""
    assert device == CPU
    if (folder / "broken").exists():
        raise InputError("the weights are gone")
    modules = {
        name: Fragile(folder, seed) for seed, name in enumerate(ROUTING.experts) if name in experts or not experts
    }
    return Experts(modules, ROUTING, RectifiedFlow(), "flow")


def order(
    folder: Path,
    *,
    copies: int,
    deterministic: bool = False,
    batch_wait: float = 0.003,
    warm: bool = True,
    **asked: Any,
) -> tuple[Order, str]:
    """A pool of such teachers with a key of its own, and its conditions file."""
    load, file = teacher(folder)
    replicas = Replicas(**{"copies": copies, "cpus": 0.1, "batch_wait": batch_wait, **asked})
    made = Order(
        key=key_of("teacher", {"folder": str(folder), "asked": str(replicas), "deterministic": deterministic}),
        build=Packed.of(partial(load_teacher_engine, load, file, LATENT if warm else None)),
        asked=replicas,
        deterministic=deterministic,
        routing=ROUTING if replicas.each else None,
    )
    return made, file


def teacher(folder: Path) -> tuple[partial[Experts], str]:
    """A builder for replicas, and the conditions file."""
    file = folder / "conditions.safetensors"
    save_file({"embeds": CONDITIONS.embeds}, file)
    return partial(build, folder), str(file)


def ask(seed: int, size: int = 2, *, expert: str = "high") -> ScoreRequest:
    """A random request."""
    draw = torch.Generator().manual_seed(seed)
    t = torch.rand(size, generator=draw)
    return ScoreRequest(
        x_t=torch.randn(size, *LATENT, generator=draw),
        t=0.875 + 0.125 * t if expert == "high" else 0.8 * t,
        conditions=tuple(torch.randint(1, 5, (size,), generator=draw).tolist()),
        guidance=Guidance(4.0),
        expert=expert,
        name=f"request {seed}",
    )
