"""Real replicas in real processes, some of which die."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import helpers
import psutil
import pytest
import ray
import torch

from raydmd.errors import InputError, NonFiniteError, PoolError, PoolExhausted, ScoreTimeout
from raydmd.serving.engine import TeacherEngine
from raydmd.serving.local import LocalClient
from raydmd.serving.messages import ScoreRequest
from raydmd.serving.order import ClientSpec, find_keeper
from raydmd.serving.pool import Pool
from raydmd.serving.pool_client import PoolClient

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with helpers.own_cluster():
        yield


def start(
    folder: Path,
    *,
    teachers: int,
    deterministic: bool = False,
    batch_wait: float = 0.003,
    request_timeout: float = 60.0,
    attempt_timeout: float | None = None,
    **asked: int,
) -> Pool:
    order, file = helpers.order(folder, copies=teachers, deterministic=deterministic, batch_wait=batch_wait, **asked)
    return Pool.start(
        order,
        "test",
        start_timeout=220,
        request_timeout=request_timeout,
        attempt_timeout=attempt_timeout,
        table=file,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("teacher")


@pytest.fixture(scope="module")
def pool(folder: Path, cluster: None) -> Iterator[Pool]:
    with start(folder, teachers=2, deterministic=True, attempt_timeout=4.0) as two:
        yield two


@pytest.fixture
def client(pool: Pool) -> PoolClient:
    return PoolClient(pool.client_spec(), "rank 0")


def expected(folder: Path, request: ScoreRequest) -> torch.Tensor:
    local = LocalClient(TeacherEngine(helpers.build(folder), helpers.CONDITIONS))
    return local.submit(request).result().answer.value


def pids(pool: Pool) -> dict[str, int]:
    """Process ids by replica; waits until all answer."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        stats = pool.stats()
        if not stats.unreachable:
            return {name: s["pid"] for name, s in stats.replicas.items()}
        time.sleep(0.3)
    raise AssertionError(f"replicas stay away: {stats.unreachable}")


def _until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def kill(pid: int) -> None:
    process = psutil.Process(pid)
    os.kill(pid, signal.SIGKILL)
    process.wait(20)


def test_a_pool_equals_a_local_teacher_bit_for_bit(client: PoolClient, pool: Pool, folder: Path) -> None:
    requests = [helpers.ask(i, i % 3 + 1, expert=("high", "low")[i % 2]) for i in range(12)]
    pending = [client.submit(r) for r in requests]
    replies = [p.result() for p in pending]
    for request, reply in zip(requests, replies, strict=True):
        assert torch.equal(reply.answer.value, expected(folder, request))
        assert reply.batch_items == request.x_t.shape[0]
    assert {r.replica for r in replies} == {f"{pool.key}/0", f"{pool.key}/1"}
    again = PoolClient(pool.client_spec(), "another client")
    assert again.submit(requests[0]).result().replica == replies[0].replica
    assert client.retries == 0
    assert all(p.waited >= 0 for p in pending)


def test_a_request_may_change_once_it_is_submitted(client: PoolClient, folder: Path) -> None:
    request = helpers.ask(50)
    right = expected(folder, request)
    pending = client.submit(request)
    request.x_t.zero_()
    assert torch.equal(pending.result().answer.value, right)


def test_a_nan_is_raised_as_itself_and_not_retried(client: PoolClient) -> None:
    request = helpers.ask(60, 3)
    request.x_t[2, 0, 0] = 99
    pending = client.submit(request)
    for _ in range(2):
        with pytest.raises(NonFiniteError, match="'request 60', sample 2") as caught:
            pending.result()
        assert type(caught.value) is NonFiniteError
        assert caught.value.samples == (2,)
    wrong = helpers.ask(61, expert="low")
    wrong.t.fill_(1.0)
    with pytest.raises(InputError, match=r"asks expert 'low', its times .* belong to \['high'\]"):
        client.submit(wrong).result()
    assert client.retries == 0
    assert set(client.health().values()) == {"healthy"}


@ray.remote(num_cpus=0.1)
def ask_from_another_process(spec: ClientSpec, seed: int) -> tuple[bytes, int]:
    client = PoolClient(spec, "worker")
    return client.submit(helpers.ask(seed)).result().answer.value.numpy().tobytes(), client.retries


def test_workers_make_clients_of_their_own(pool: Pool, folder: Path) -> None:
    ref = ask_from_another_process.remote(pool.client_spec(), 70)
    answer, retries = ray.get(ref, timeout=90)
    assert answer == expected(folder, helpers.ask(70)).numpy().tobytes()
    assert retries == 0


def test_a_replica_killed_while_idle(client: PoolClient, pool: Pool, folder: Path) -> None:
    before = pids(pool)
    kill(before[f"{pool.key}/0"])
    requests = [helpers.ask(100 + i) for i in range(8)]
    pending = [client.submit(r) for r in requests]
    for request, p in zip(requests, pending, strict=True):
        assert torch.equal(p.result().answer.value, expected(folder, request))
    after = pids(pool)
    assert after[f"{pool.key}/0"] != before[f"{pool.key}/0"]
    assert after[f"{pool.key}/1"] == before[f"{pool.key}/1"]


def test_a_replica_killed_while_serving(client: PoolClient, pool: Pool, folder: Path) -> None:
    before = pids(pool)
    request = helpers.ask(200)
    right = expected(folder, request)
    (folder / "slow").touch()
    try:
        pending = client.submit(request)
        victim = pending.attempts[0].replica
        _until_busy(pool, victim)
        kill(before[victim])
    finally:
        (folder / "slow").unlink()
    reply = pending.result()
    assert torch.equal(reply.answer.value, right)
    assert client.retries > 0
    assert pids(pool)[victim] != before[victim]
    # The client takes the restarted replica back without being told.
    deadline = time.monotonic() + 30
    while client.health().get(victim) != "healthy" and time.monotonic() < deadline:
        client.submit(request).result()
        time.sleep(0.2)
    assert client.health().get(victim) == "healthy"


def _until_busy(pool: Pool, name: str) -> None:
    start = pool.stats().replicas[name]["busy_seconds"]
    deadline = time.monotonic() + 20
    while pool.stats().replicas[name]["busy_seconds"] < start + 0.1:
        assert time.monotonic() < deadline, f"{name} never got busy"
        time.sleep(0.05)


def test_a_hung_replica_is_told_and_answered_for_by_the_other(pool: Pool, folder: Path) -> None:
    told: list[str] = []
    once_more: list[tuple[str, str]] = []
    spec = pool.client_spec()
    client = PoolClient(spec, "rank 0", waits=told.append, again=lambda *said: once_more.append(said))
    before = pids(pool)
    request = helpers.ask(300)
    right = expected(folder, request)
    (folder / "hang").touch()
    pending = client.submit(request)
    victim = pending.attempts[0].replica
    reply = pending.result()
    assert not (folder / "hang").exists()
    assert torch.equal(reply.answer.value, right)
    assert reply.replica != victim
    assert client.retries == 1
    assert once_more == [("request 300", f"replica {victim!r} was silent for 4 s")]
    assert f"waits for replica {victim!r} of pool " in told[0]
    assert "request 'request 300'" in told[0]
    assert told[-1] == ""
    assert 3.0 < pending.waited < 20.0
    assert client.health()[victim] == "suspect"
    # Later requests avoid it; it is alive all the while.
    assert {client.submit(helpers.ask(310 + i)).result().replica for i in range(6)} == {reply.replica}
    assert pids(pool) == before


def test_requests_of_several_clients_share_forwards(tmp_path: Path) -> None:
    with start(tmp_path, teachers=1, batch_wait=0.3) as pool:
        clients = [PoolClient(pool.client_spec(), f"rank {i}") for i in range(2)]
        requests = [helpers.ask(i) for i in range(8)]
        pending = [clients[i % 2].submit(r) for i, r in enumerate(requests)]
        replies = [p.result() for p in pending]
        for request, reply in zip(requests, replies, strict=True):
            torch.testing.assert_close(reply.answer.value, expected(tmp_path, request), atol=1e-4, rtol=1e-4)
        assert max(r.batch_items for r in replies) > 2
        stats = pool.stats().replicas[f"{pool.key}/0"]
        assert stats["clients"] == {"rank 0": 8, "rank 1": 8}
        assert stats["batches"] < 8
    _until(lambda: ray.get(find_keeper().members.remote(pool.key, -1, 0.0)) is None)  # the last lease was given back


def test_no_replica_left_is_said_within_the_deadline(tmp_path: Path) -> None:
    with start(tmp_path, teachers=1, request_timeout=20.0) as pool:
        client = PoolClient(pool.client_spec(), "rank 0")
        client.submit(helpers.ask(0)).result()
        (tmp_path / "broken").touch()
        kill(pids(pool)[f"{pool.key}/0"])
        began = time.monotonic()
        with pytest.raises((PoolExhausted, ScoreTimeout)) as caught:
            client.submit(helpers.ask(1)).result()
        assert time.monotonic() - began < 25
        for part in (repr(pool.key), "'request 1'", "the weights are gone"):
            assert part in str(caught.value)


def test_a_teacher_that_cannot_load_says_why(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    with pytest.raises(PoolError, match=r"no replica could load: .*InputError: the weights") as e:
        start(tmp_path, teachers=1)
    assert "\x1b" not in str(e.value)


def test_a_pool_that_does_not_fit_says_what_is_missing(tmp_path: Path) -> None:
    order, _ = helpers.order(tmp_path, copies=1, cpus=0.5, resources={"teacher": 1}, warm=False)
    with pytest.raises(PoolError, match=r"did not load within 3 s.*'teacher': 1.*free: .*CPU"):
        Pool.start(order, "test", start_timeout=3)


def test_a_late_replica_is_missed_only_where_all_are_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cpus = 0.6 * ray.cluster_resources()["CPU"]  # one of them fits
    order, _ = helpers.order(tmp_path, copies=2, cpus=cpus, warm=False)
    now = [0.0]
    with Pool(order, "test", start_timeout=100, clock=lambda: now[0]) as pool:
        real = time.monotonic() + 60
        while not pool.stats(timeout=1.0).replicas:
            assert time.monotonic() < real
        assert not pool.loaded()
        now[0] = 101.0
        with pytest.raises(PoolError, match="did not load within 100 s"):
            pool.loaded()
        assert not pool.loaded(enough=1)
        assert not pool.loaded(enough=1)
        assert capsys.readouterr().out.count("goes on without") == 1
