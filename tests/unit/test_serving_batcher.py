import pytest

from raydmd.serving.batcher import Accepted, Batcher, Key, Refused

pytestmark = pytest.mark.unit

HIGH = Key("high", (4, 2), 4.0)
LOW = Key("low", (4, 2), 4.0)


def batcher(*, max_items: int = 4, max_wait: float = 1.0, max_queue: int = 100, exact: bool = False) -> Batcher[str]:
    return Batcher(max_items=max_items, max_wait=max_wait, max_queue=max_queue, exact=exact)


def payloads(b: Batcher[str], now: float) -> list[str] | None:
    batch = b.take(now)
    return None if batch is None else [entry.payload for entry in batch]


def test_empty_has_nothing_to_take_and_nothing_due() -> None:
    b = batcher()
    assert b.take(1e9) is None
    assert b.next_due() is None


def test_a_lone_request_waits_for_company_exactly_as_long_as_allowed() -> None:
    b = batcher(max_wait=1.0)
    b.offer(HIGH, "a", 1, "a1", now=10.0)
    assert b.next_due() == 11.0
    assert b.take(10.999) is None
    assert payloads(b, 11.0) == ["a1"]
    assert len(b) == 0


def test_a_full_batch_goes_at_once() -> None:
    b = batcher(max_items=4, max_wait=100.0)
    for name in ("a1", "a2", "a3", "a4", "a5"):
        b.offer(HIGH, "a", 1, name, now=0.0)
    assert payloads(b, 0.0) == ["a1", "a2", "a3", "a4"]
    assert b.take(0.0) is None
    assert payloads(b, 100.0) == ["a5"]


@pytest.mark.parametrize("other", [LOW, Key("high", (4, 3), 4.0), Key("high", (4, 2), 1.0)], ids=str)
def test_different_keys_never_share_a_batch(other: Key) -> None:
    b = batcher(max_wait=0.0)
    b.offer(HIGH, "a", 1, "high", now=0.0)
    b.offer(other, "a", 1, "other", now=0.0)
    assert payloads(b, 0.0) == ["high"]
    assert payloads(b, 0.0) == ["other"]


def test_clients_take_turns_and_each_client_keeps_its_order() -> None:
    b = batcher(max_items=3, max_wait=0.0)
    for i in range(6):
        b.offer(HIGH, "flood", 1, f"flood{i}", now=0.0)
    for i in range(2):
        b.offer(HIGH, "quiet", 1, f"quiet{i}", now=0.0)
    assert payloads(b, 0.0) == ["flood0", "quiet0", "flood1"]
    assert payloads(b, 0.0) == ["quiet1", "flood2", "flood3"]
    assert payloads(b, 0.0) == ["flood4", "flood5"]


def test_ready_buckets_take_turns_so_a_flooded_one_starves_no_other() -> None:
    b = batcher(max_items=1, max_wait=0.0)
    for i in range(3):
        b.offer(HIGH, "a", 1, f"high{i}", now=0.0)
    b.offer(LOW, "b", 1, "low", now=5.0)
    assert [payloads(b, 5.0) for _ in range(4)] == [["high0"], ["low"], ["high1"], ["high2"]]


def test_a_request_is_never_split_and_an_oversized_one_goes_alone() -> None:
    b = batcher(max_items=4, max_wait=0.0)
    for name, items in (("three", 3), ("nine", 9), ("one", 1)):
        b.offer(HIGH, "a", items, name, now=0.0)
    assert [payloads(b, 0.0) for _ in range(3)] == [["three", "one"], ["nine"], None]


def test_a_request_that_does_not_fit_lets_others_fill_the_batch_and_is_the_first_of_the_next() -> None:
    b = batcher(max_items=4, max_wait=0.0)
    for client, name, items in (("a", "a2", 2), ("b", "b4", 4), ("c", "c1", 1), ("c", "c2", 1), ("d", "d1", 1)):
        b.offer(HIGH, client, items, name, now=0.0)
    assert [payloads(b, 0.0) for _ in range(3)] == [["a2", "c1", "d1"], ["b4"], ["c2"]]


def test_one_clients_smaller_requests_fill_the_batch_too() -> None:
    b = batcher(max_items=8, max_wait=0.0)
    for name, items in (("a", 5), ("b", 4), ("c", 2), ("d", 3), ("e", 1)):
        b.offer(HIGH, "one", items, name, now=0.0)
    assert [payloads(b, 0.0) for _ in range(2)] == [["a", "c", "e"], ["b", "d"]]
    assert len(b) == 0


def test_a_full_queue_refuses_and_takes_again_when_there_is_room() -> None:
    b = batcher(max_queue=2, max_wait=0.0, max_items=1)
    assert b.offer(HIGH, "a", 1, "1", now=0.0) == Accepted(1)
    assert b.offer(LOW, "a", 1, "2", now=0.0) == Accepted(2)
    assert b.offer(HIGH, "a", 1, "3", now=0.0) == Refused(2)
    assert payloads(b, 0.0) == ["1"]
    assert b.offer(HIGH, "a", 1, "3", now=0.0) == Accepted(2)


def test_a_full_queue_has_room_for_those_with_less_than_their_share() -> None:
    b = batcher(max_queue=4, max_wait=0.0, max_items=1)
    assert all(b.offer(HIGH, "flood", 1, f"f{k}", now=0.0) == Accepted(k + 1) for k in range(4))
    assert b.offer(HIGH, "flood", 1, "f4", now=0.0) == Refused(4)
    assert b.offer(HIGH, "late", 1, "l0", now=0.0) == Accepted(5)
    assert b.offer(HIGH, "late", 1, "l1", now=0.0) == Accepted(6)
    assert b.offer(HIGH, "late", 1, "l2", now=0.0) == Refused(6)  # two of four is its half
    assert [payloads(b, 0.0) for _ in range(4)] == [["f0"], ["l0"], ["f1"], ["l1"]]


def test_exact_mode_makes_every_request_its_own_batch_at_once() -> None:
    b = batcher(max_items=64, max_wait=100.0, exact=True)
    for i in range(3):
        b.offer(HIGH, "a", 2, f"a{i}", now=7.0)
    assert b.next_due() == 7.0
    assert [payloads(b, 7.0) for _ in range(4)] == [["a0"], ["a1"], ["a2"], None]


def test_next_due_is_the_earliest_over_buckets_and_clients() -> None:
    b = batcher(max_wait=1.0)
    b.offer(HIGH, "a", 1, "a", now=3.0)
    b.offer(LOW, "b", 1, "b", now=2.0)
    b.offer(LOW, "c", 1, "c", now=2.5)
    assert b.next_due() == 3.0
    assert payloads(b, 3.0) == ["b", "c"]
    assert b.next_due() == 4.0


@pytest.mark.parametrize("bad", [{"max_items": 0}, {"max_queue": 0}, {"max_wait": -1.0}])
def test_bounds_that_cannot_work_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Batcher(**{"max_items": 1, "max_wait": 0.0, "max_queue": 1, **bad})


def test_a_request_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="'a' has 0 samples"):
        batcher().offer(HIGH, "a", 0, "x", now=0.0)
