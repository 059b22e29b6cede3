"""Pools that several hold: sharing, leases, experts that move, pools that grow, a keeper that dies."""

import json
import os
import re
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import helpers
import pytest
import ray
import torch

from raydmd.errors import PoolError
from raydmd.guidance import Guidance
from raydmd.serving import keeper as keepers
from raydmd.serving.engine import TeacherEngine
from raydmd.serving.local import LocalClient
from raydmd.serving.messages import Request, WalkRequest
from raydmd.serving.order import NAME, NAMESPACE, find_keeper
from raydmd.serving.pool import Pool
from raydmd.serving.pool_client import PoolClient
from raydmd.serving.top import looks, render

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

HERE = Path(__file__).parent
TTL = 4.0


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with helpers.own_cluster():
        # A keeper whose leases run out sooner than a test's patience; whoever looks for one finds it.
        ray.remote(keepers.Keeper).options(
            name=NAME, namespace=NAMESPACE, lifetime="detached", num_cpus=0, max_concurrency=1000
        ).remote(ttl=TTL, idle=1e9)
        yield


@pytest.fixture(autouse=True)
def short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raydmd.serving.pool.TTL", TTL)


def hold(folder: Path, holder: str, **settings: Any) -> Pool:
    order, file = helpers.order(folder, deterministic=True, **settings)
    return Pool.start(order, holder, start_timeout=220, request_timeout=120, table=file)


def until(true: Callable[[], bool], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def expected(folder: Path, request: Request) -> torch.Tensor:
    local = LocalClient(TeacherEngine(helpers.build(folder), helpers.CONDITIONS))
    return local.submit(request).result().answer.value


def walk(seed: int) -> WalkRequest:
    draw = torch.Generator().manual_seed(seed)
    x_t = torch.randn(2, *helpers.LATENT, generator=draw)
    grid = (1.0, 0.95, 0.9, 0.6, 0.3, 0.0)  # crosses from the one expert to the other after three steps
    return WalkRequest(x_t=x_t, grid=grid, conditions=(1, 2), guidance=Guidance(3.0), name=f"walk {seed}")


def test_two_holders_share_replicas_and_the_last_one_frees_them(tmp_path: Path) -> None:
    with hold(tmp_path, "first", copies=1) as first:
        before = first.stats().replicas
        with hold(tmp_path, "second", copies=1) as second:
            assert second.key == first.key
            assert {n: s["pid"] for n, s in second.stats().replicas.items()} == {n: s["pid"] for n, s in before.items()}
            request = helpers.ask(1)
            answers = [PoolClient(p.client_spec(), f"{p.key}/0").submit(request).result() for p in (first, second)]
            assert all(torch.equal(a.answer.value, expected(tmp_path, request)) for a in answers)
            [look] = [x for x in looks() if x.key == first.key]
            assert [holder.rpartition("-")[0] for holder in look.holders] == ["first", "second"]
        assert PoolClient(first.client_spec(), "first/1").submit(helpers.ask(2)).result().answer.value.shape[0] == 2
        shown = str_of(render(looks(), {}))
        for part in (first.key, "held by first", "ready", "samples by run"):
            assert part in shown
    until(lambda: first.key not in [x.key for x in looks()])
    pid = next(iter(before.values()))["pid"]
    until(lambda: not Path(f"/proc/{pid}").exists())


def str_of(renderable: Any) -> str:
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_another_table_is_read_when_a_request_names_it(tmp_path: Path) -> None:
    other = type(helpers.CONDITIONS)(embeds=helpers.CONDITIONS.embeds + 1.0)
    file = tmp_path / "other.safetensors"
    other.save(file)
    order, first = helpers.order(tmp_path, copies=1, deterministic=True)
    request = helpers.ask(3)
    with Pool.start(order, "first", table=first) as one, Pool.start(order, "second", table=str(file)) as two:
        ours = PoolClient(one.client_spec(), "first/0").submit(request).result().answer.value
        theirs = PoolClient(two.client_spec(), "second/0").submit(request).result().answer.value
    assert torch.equal(ours, expected(tmp_path, request))
    local = LocalClient(TeacherEngine(helpers.build(tmp_path), other))
    assert torch.equal(theirs, local.submit(request).result().answer.value)
    assert not torch.equal(ours, theirs)


@ray.remote(num_cpus=0)
class Holder:
    """A run in a process of its own, which can be killed."""

    def __init__(self, folder: Path) -> None:
        from raydmd.serving import pool

        pool.TTL = TTL  # no fixture reaches into this process
        self._pool = hold(folder, "killed", copies=1)

    def key(self) -> str:
        return self._pool.key


def test_a_holder_that_dies_without_a_word_loses_its_lease(tmp_path: Path) -> None:
    holder = Holder.remote(tmp_path)
    key = ray.get(holder.key.remote(), timeout=120)
    time.sleep(2 * TTL)
    assert key in [x.key for x in looks()]  # it was renewed meanwhile
    ray.kill(holder)
    start = time.monotonic()
    until(lambda: key not in [x.key for x in looks()], 4 * TTL)
    assert time.monotonic() - start < 3 * TTL


def test_experts_move_with_the_phases_and_nothing_is_lost(tmp_path: Path) -> None:
    with hold(tmp_path, "run", copies=2, each=1) as pool:
        client = PoolClient(pool.client_spec(), "run/0")
        client.expect(["high"])
        for k in range(4):
            request = helpers.ask(k)
            assert torch.equal(client.submit(request).result().answer.value, expected(tmp_path, request))
        held = [s["experts"] for s in pool.stats().replicas.values()]
        assert [tuple(e) for e in held] == [("high",), ("high",)]
        # Requests of the phase before are under way when the next one is announced.
        pending = [(helpers.ask(k), client.submit(helpers.ask(k))) for k in range(10, 16)]
        client.expect(["low"])
        later = [helpers.ask(k, expert="low") for k in range(20, 26)]
        pending += [(request, client.submit(request)) for request in later]
        for request, p in pending[6:]:
            assert torch.equal(p.result().answer.value, expected(tmp_path, request))
        until(lambda: [tuple(s["experts"]) for s in pool.stats().replicas.values()] == [("low",)] * 2)
        # Both wanted: one each, and a walk goes through both.
        client.expect(["high", "low"])
        until(lambda: {tuple(s["experts"]) for s in pool.stats().replicas.values()} == {("high",), ("low",)})
        for k in range(3):
            reply = client.submit(walk(k)).result()
            assert torch.equal(reply.answer.value, expected(tmp_path, walk(k)))
        # What went out before the move was answered before it, or waits for the expert to come back.
        for request, p in pending[:6]:
            assert torch.equal(p.result().answer.value, expected(tmp_path, request))
        assert client.retries == 0


def test_runs_in_other_phases_each_get_an_expert_and_a_walk_survives_its_first_leg(tmp_path: Path) -> None:
    with hold(tmp_path, "run", copies=1, each=1) as pool:
        high, low = (PoolClient(pool.client_spec(), f"run/{name}") for name in ("high", "low"))
        high.expect(["high"])
        low.expect(["low"])  # one replica was asked for; two experts are needed at once
        for k in range(3):
            for client, expert in ((high, "high"), (low, "low")):
                request = helpers.ask(k, expert=expert)
                assert torch.equal(client.submit(request).result().answer.value, expected(tmp_path, request))
        first = next(s for s in pool.stats().replicas.values() if tuple(s["experts"]) == ("high",))
        right = expected(tmp_path, walk(0))
        (tmp_path / "slow").touch()
        pending = high.submit(walk(0))
        time.sleep(0.5)
        os.kill(first["pid"], signal.SIGKILL)
        (tmp_path / "slow").unlink()
        assert torch.equal(pending.result().answer.value, right)
        assert high.retries > 0


def test_what_ray_refuses_breaks_that_pool_alone(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with hold(other, "run", copies=1) as good:
        order, _ = helpers.order(tmp_path, copies=1, resources={"CPU": 1.0})
        with pytest.raises(PoolError, match="no replica could load: ValueError"):
            Pool.start(order, "bad", start_timeout=60)
        request = helpers.ask(9)
        answer = PoolClient(good.client_spec(), "run/0").submit(request).result().answer.value
        assert torch.equal(answer, expected(other, request))
        with hold(tmp_path, "later", copies=1) as later:  # and the keeper goes on
            assert len(later.stats().replicas) == 1


def test_a_pool_grows_while_requests_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow").touch()  # 1.5 s a forward
    with hold(tmp_path, "run", copies=1, most=2) as pool:
        clients = [PoolClient(pool.client_spec(), f"run/{k}") for k in range(4)]
        deadline = time.monotonic() + 120
        seed = 0
        while len(pool.stats().replicas) < 2:
            assert time.monotonic() < deadline
            pending = [c.submit(helpers.ask(seed := seed + 1)) for c in clients]
            for p in pending:
                p.result()
        (tmp_path / "slow").unlink()
        pending = [c.submit(helpers.ask(k)) for k in range(30) for c in clients]
        assert {p.result().replica for p in pending} == {f"{pool.key}/0", f"{pool.key}/1"}


def test_a_keeper_that_dies_is_replaced_and_requests_go_on(tmp_path: Path) -> None:
    with hold(tmp_path, "run", copies=1) as pool:
        client = PoolClient(pool.client_spec(), "run/0")
        request = helpers.ask(5)
        right = expected(tmp_path, request)
        assert torch.equal(client.submit(request).result().answer.value, right)
        before = {s["pid"] for s in pool.stats().replicas.values()}
        under_way = client.submit(request)
        ray.kill(find_keeper())
        assert torch.equal(under_way.result().answer.value, right)
        for _ in range(5):  # while the old replica goes and another comes
            assert torch.equal(client.submit(request).result().answer.value, right)
            time.sleep(0.5)
        until(lambda: len(pool.stats().replicas) == 1)
        assert not before & {s["pid"] for s in pool.stats().replicas.values()}
        assert torch.equal(client.submit(request).result().answer.value, right)


def test_every_figure_of_the_dashboard_is_exported(tmp_path: Path) -> None:
    board = json.loads((HERE.parents[1] / "cluster" / "grafana" / "raydmd-pools.json").read_text())
    asked = {n for p in board["panels"] for t in p["targets"] for n in re.findall(r"ray_raydmd_\w+", t["expr"])}
    assert len(asked) >= 8
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with hold(tmp_path, "run", copies=1) as pool:
        client = PoolClient(pool.client_spec(), "run/rank0")
        bad = helpers.ask(60)
        bad.x_t[0, 0, 0] = 99

        def exported() -> str:
            client.submit(helpers.ask(6)).result()
            with pytest.raises(Exception, match="not finite"):
                client.submit(bad).result()
            return urllib.request.urlopen(url, timeout=10).read().decode()

        # Nothing was refused, and a counter that never counted is not exported.
        wanted = asked - {"ray_raydmd_refused_total"}
        until(lambda: all(name in exported() for name in wanted))
        assert 'trial="run"' in exported()
