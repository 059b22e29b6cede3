"""What the serving benchmarks share: a cluster of their own, teachers small enough to measure the rest, figures."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import ray
import torch
from torch import Tensor, nn

from raydmd.guidance import Guidance
from raydmd.methods.terms import Answer
from raydmd.models.base import Conditions, Denoiser, Experts, Routing
from raydmd.process import RectifiedFlow
from raydmd.serving.batcher import Key
from raydmd.serving.engine import Engine, load_teacher_engine
from raydmd.serving.messages import ScoreRequest
from raydmd.serving.order import Order, Packed, Replicas, key_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from raydmd.serving.messages import Request

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
ROWS = 64
WIDTH = 32
TOKENS = 16
ROUTING = Routing(("high", "low"), (0.8,))


class Net(Denoiser):
    """A residual network over latents of any shape of 4 channels."""

    def __init__(self, seed: int, blocks: int, width: int) -> None:
        torch.manual_seed(seed)
        layers = [
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(blocks)
        ]
        network = nn.ModuleDict(
            {"enter": nn.Linear(4, width), "layers": nn.ModuleList(layers), "leave": nn.Linear(width, 4)}
        )
        super().__init__(network, (), width=width, autocast=torch.float32)

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """See :class:`Denoiser`."""
        tokens = x_t.flatten(2).transpose(1, 2)
        hidden = self.network["enter"](tokens) + t[:, None, None] + cond.embeds.mean(1, keepdim=True)
        for layer in self.network["layers"]:
            hidden = hidden + layer(hidden)
        out: Tensor = self.network["leave"](hidden)
        return out.transpose(1, 2).reshape_as(x_t)


def build(blocks: int, width: int, device: torch.device, experts: tuple[str, ...] = ()) -> Experts:
    """A teacher of two experts."""
    modules = {
        name: Net(seed, blocks, width).to(device)
        for seed, name in enumerate(ROUTING.experts)
        if name in (experts or ROUTING.experts)
    }
    return Experts(modules, ROUTING, RectifiedFlow(), "flow")


def table(folder: Path, width: int = WIDTH) -> str:
    """A file of random conditions."""
    file = folder / f"conditions-{width}.safetensors"
    draw = torch.Generator().manual_seed(1)
    Conditions(embeds=torch.randn(ROWS, 4, width, generator=draw)).save(file)
    return str(file)


def teacher(
    folder: Path, *, blocks: int = 16, width: int = WIDTH, deterministic: bool = False, mark: str = "", **asked: Any
) -> Order:
    """A pool of such teachers."""
    replicas = Replicas(**{"copies": 1, "cpus": 0.1, **asked})
    load = partial(load_teacher_engine, partial(build, blocks, width), table(folder, width), (4, 8, 8))
    key = key_of(
        "teacher", {"blocks": blocks, "width": width, "asked": str(replicas), "exact": deterministic, "mark": mark}
    )
    routing = ROUTING if replicas.each else None
    return Order(key=key, build=Packed.of(load), asked=replicas, deterministic=deterministic, routing=routing)


def request(
    seed: int, *, size: int, latent: Sequence[int] = (4, 8, 8), expert: str = "", name: str = ""
) -> ScoreRequest:
    """A random question, the same for the same arguments; to a random expert unless one is named."""
    draw = torch.Generator().manual_seed(seed)
    expert = expert or ROUTING.experts[int(torch.randint(2, (1,), generator=draw))]
    t = torch.rand(size, generator=draw) * 0.19
    return ScoreRequest(
        x_t=torch.randn(size, *latent, generator=draw),
        t=t + 0.8 if expert == "high" else t,
        conditions=tuple(torch.randint(1, ROWS, (size,), generator=draw).tolist()),
        guidance=Guidance(4.0),
        expert=expert,
        name=name or f"request {seed}",
    )


class Sleeper(Engine):
    """A teacher on a device of its own, for which the time it takes is all that matters here.

    Args:
        seconds: for a forward.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def key(self, request: Request) -> Key:
        """See :class:`Engine`."""
        return Key("", tuple(request.x_t.shape[1:]), 1.0)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """See :class:`Engine`."""
        time.sleep(self._seconds)
        return [Answer(value=r.x_t) for r in requests]

    def warm_up(self) -> None:
        """See :class:`Engine`."""


def sleeper(seconds: float, device: str, experts: tuple[str, ...]) -> Sleeper:
    """Build one; see :data:`~raydmd.serving.engine.Build`."""
    del device, experts
    return Sleeper(seconds)


@contextlib.contextmanager
def cluster(**options: Any) -> Iterator[None]:
    """A Ray of our own, whose processes use one thread each and find this folder's modules."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    path = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    torch.set_num_threads(1)
    settings = {
        "address": "local",
        "num_cpus": os.cpu_count() or 2,
        "include_dashboard": False,
        "log_to_driver": False,
        "runtime_env": {"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}},
    }
    ray.init(**(settings | options))
    try:
        yield
    finally:
        ray.shutdown()


def set_apart(*names: str) -> None:
    """Give the busiest thread of some actors the last core, and keep all other actors and Ray's own to the others.

    Where a replica has a device and cores of its own, as it has on a cluster, nothing else runs where its forwards do.

    Args:
        *names: of actor classes, by their beginnings.
    """
    last = (os.cpu_count() or 2) - 1
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error, OSError):
            named = " ".join(process.cmdline()).startswith(tuple(f"ray::{name}" for name in names))
            threads = sorted(process.threads(), key=lambda t: t.user_time)
            for thread in threads:
                apart = named and thread is threads[-1]
                os.sched_setaffinity(thread.id, {last} if apart else set(range(last + named)))


def held_by(*titles: str) -> int:
    """Bytes that processes hold for themselves whose titles begin so."""
    found = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            if " ".join(process.cmdline()).startswith(titles):
                found += process.memory_full_info().uss
    return found


def show(name: str, columns: dict[str, str], rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Print figures as a Markdown table, and write the same as JSON to ``results/serving-NAME.json``.

    Args:
        name: of the benchmark.
        columns: title of each column by key, with its format after a colon, e.g. ``"step, s:.3f"``.
        rows: figures by key.
        settings: what they depend on.
    """
    titles = [title.rpartition(":")[0] for title in columns.values()]
    forms = [title.rpartition(":")[2] for title in columns.values()]
    print("\n| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    for row in rows:
        print("| " + " | ".join(format(row[key], form) for key, form in zip(columns, forms, strict=True)) + " |")
    file = RESULTS / f"serving-{name}.json"
    file.write_text(
        json.dumps({"command": " ".join(["python", *sys.argv]), "settings": settings, "rows": rows}, indent=1) + "\n",
        encoding="utf-8",
    )
    print(f"\n{file}")
