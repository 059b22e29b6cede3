"""The actor's class without Ray: it is plain until the pool wraps it."""

import asyncio
import functools
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from raydmd.errors import InputError, NonFiniteError
from raydmd.guidance import Guidance
from raydmd.models.base import Conditions, Denoiser, Experts, Routing
from raydmd.process import RectifiedFlow
from raydmd.serving.client import ReplicaBusy, ReplicaFailed
from raydmd.serving.codec import decode_reply, encode_request
from raydmd.serving.engine import TeacherEngine, load_teacher_engine
from raydmd.serving.local import LocalClient
from raydmd.serving.messages import ScoreRequest
from raydmd.serving.replica import Replica, ReplicaSettings

pytestmark = pytest.mark.unit


class Gated(Denoiser):
    """Scales its input once the gate is open; 13 raises, 99 gives NaN."""

    def __init__(self) -> None:
        dropout = nn.Dropout(0.5)  # must be off while serving
        super().__init__(dropout, (), width=2, autocast=torch.float32)
        self.prediction = "x0"
        self.gate = threading.Event()
        self.gate.set()
        self.threads: set[str] = set()

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        assert self.gate.wait(20)
        self.threads.add(threading.current_thread().name)
        if (x_t == 13).any():
            raise RuntimeError("bad luck")
        out: Tensor = self.network(x_t) * cond.embeds.mean((1, 2))[:, None]
        return torch.where(x_t == 99, torch.nan, out)


def make(tmp_path: Path, gated: Gated, *, queue_limit: int = 100, deterministic: bool = False) -> Replica:
    file = tmp_path / "conditions.safetensors"
    save_file({"embeds": torch.arange(12.0).view(3, 2, 2)}, file)
    settings = ReplicaSettings(
        name="teacher/0",
        batch_items=8,
        batch_wait=0.02,
        queue_limit=queue_limit,
        deterministic=deterministic,
    )
    experts = Experts({"only": gated}, Routing(("only",)), RectifiedFlow(), "x0")
    build = functools.partial(load_teacher_engine, lambda *_: experts, str(file), (3,))
    return Replica(build, settings)


def ask(value: float, name: str = "r") -> ScoreRequest:
    return ScoreRequest(
        x_t=torch.full((2, 3), value),
        t=torch.full((2,), 0.5),
        conditions=(1, 2),
        guidance=Guidance(3.0),
        expert="only",
        name=name,
    )


def test_requests_are_batched_answered_in_one_thread_and_counted(tmp_path: Path) -> None:
    gated = Gated()
    replica = make(tmp_path, gated)

    async def main() -> None:
        calls = [replica.score(encode_request(ask(float(i)), f"client {i % 2}")) for i in range(4)]
        replies = [decode_reply(r) for r in await asyncio.wait_for(asyncio.gather(*calls), 20)]
        assert [r.batch_items for r in replies] == [8] * 4
        conditions = Conditions(embeds=torch.arange(12.0).view(3, 2, 2))
        experts = Experts({"only": gated}, Routing(("only",)), RectifiedFlow(), "x0")
        local = LocalClient(TeacherEngine(experts, conditions))
        for i, reply in enumerate(replies):
            torch.testing.assert_close(reply.answer.value, local.submit(ask(float(i))).result().answer.value)
        stats = await replica.ping()
        assert (stats["batches"], stats["items"], stats["requests"]) == (1, 8, 4)
        assert stats["histogram"] == {8: 1}
        assert stats["clients"] == {"client 0": 4, "client 1": 4}
        assert stats["queue"] == stats["failed"] == stats["refused"] == 0
        assert 0 < stats["busy"] < 1
        assert stats["rss"] > 1e6

    asyncio.run(main())
    assert gated.threads == {"forward", "MainThread"}


def test_requests_of_several_sizes_share_no_forward(tmp_path: Path) -> None:
    """Ranks of a run ask about updates of one size, but trials that share a pool need not."""
    replica = make(tmp_path, Gated())
    wide = ScoreRequest(
        x_t=torch.ones(2, 5), t=torch.full((2,), 0.5), conditions=(1, 2), guidance=Guidance(3.0), expert="only"
    )

    async def main() -> None:
        asked = [ask(1.0), wide, ask(1.0), wide]
        calls = [replica.score(encode_request(r, f"client {i}")) for i, r in enumerate(asked)]
        replies = [decode_reply(r) for r in await asyncio.wait_for(asyncio.gather(*calls), 20)]
        assert [tuple(r.answer.value.shape) for r in replies] == [(2, 3), (2, 5), (2, 3), (2, 5)]
        assert [r.batch_items for r in replies] == [4] * 4
        assert (await replica.ping())["batches"] == 2

    asyncio.run(main())


def test_only_the_guilty_fail_and_the_replica_goes_on(tmp_path: Path) -> None:
    replica = make(tmp_path, Gated())

    async def main() -> None:
        calls = [replica.score(encode_request(ask(v), "c")) for v in (1.0, 13.0, 99.0, 2.0)]
        outcomes = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 20)
        assert isinstance(outcomes[0], dict)
        assert isinstance(outcomes[1], ReplicaFailed)
        assert isinstance(outcomes[2], NonFiniteError)
        assert isinstance(outcomes[3], dict)
        after = await asyncio.wait_for(replica.score(encode_request(ask(1.0), "c")), 20)
        assert torch.equal(decode_reply(after).answer.value, decode_reply(outcomes[0]).answer.value)
        assert (await replica.ping())["failed"] == 2

    asyncio.run(main())


def test_a_full_queue_refuses_and_pings_are_answered_during_a_forward(tmp_path: Path) -> None:
    gated = Gated()
    replica = make(tmp_path, gated, queue_limit=1, deterministic=True)
    try:
        asyncio.run(asyncio.wait_for(_overload(replica, gated), 30))
    finally:
        torch.use_deterministic_algorithms(False)


async def _overload(replica: Replica, gated: Gated) -> None:
    gated.gate.clear()
    running = asyncio.create_task(replica.score(encode_request(ask(1.0, "first"), "c")))
    while (await replica.ping())["queue"] or not (await replica.ping())["busy_seconds"]:
        await asyncio.sleep(0.01)
    queued = asyncio.create_task(replica.score(encode_request(ask(2.0, "second"), "c")))
    await asyncio.sleep(0)
    with pytest.raises(ReplicaBusy, match="'teacher/0' refused request 'third': 1 requests"):
        await replica.score(encode_request(ask(3.0, "third"), "c"))
    assert (await replica.ping())["refused"] == 1
    gated.gate.set()
    replies = [decode_reply(r) for r in await asyncio.gather(running, queued)]
    assert [r.batch_items for r in replies] == [2, 2]  # exact mode: no company


def test_conditions_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    settings = ReplicaSettings(name="x")
    experts = Experts({"only": Gated()}, Routing(("only",)), RectifiedFlow(), "x0")
    with pytest.raises(InputError, match=r"conditions .*missing\.safetensors"):
        Replica(
            functools.partial(load_teacher_engine, lambda *_: experts, str(tmp_path / "missing.safetensors"), None),
            settings,
        )
    flat, other = tmp_path / "flat.safetensors", tmp_path / "other.safetensors"
    save_file({"embeds": torch.zeros(3)}, flat)
    save_file({"wrong": torch.zeros(3)}, other)
    for file, message in ((flat, r"\(N, L, D\), given \(3,\)"), (other, "embeds")):
        with pytest.raises(InputError, match=message):
            Replica(functools.partial(load_teacher_engine, lambda *_: experts, str(file), None), settings)
