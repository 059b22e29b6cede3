"""Room for a run: refused with a table, asked for, waited for."""

from __future__ import annotations

from typing import ClassVar

import pytest

from raydmd.errors import InputError, RunFailed, RunStopped
from raydmd.recipe import Recipe, Training, derive
from raydmd.recipe_placement import Placement
from raydmd.training import room
from raydmd.training.events import EventLog, read_from
from raydmd.training.room import check_room, lacks_room, wait_for_room

pytestmark = pytest.mark.unit


def test_a_cluster_without_room_is_refused_with_the_table():
    recipe = Recipe(training=Training(batch=64), placement=Placement(workers=4, worker_cpus=1, teachers=2))
    check_room(recipe, [{"CPU": 5.0}])
    with pytest.raises(InputError, match=r"(?s)too little CPU.*4 x worker.*4.*2 x teacher.*1.*there is +3"):
        check_room(recipe, [{"CPU": 3.0}])
    with pytest.raises(InputError, match="too little trainer"):
        check_room(derive(recipe, {"placement.worker_resources": {"trainer": 1}}), [{"CPU": 8.0}])
    rewarded = derive(recipe, {"method.name": "amd", "method.adapt.rewards": [{"kind": "clip", "path": "x"}]})
    rewarded = derive(rewarded, {"placement.reward_resources": {"reward": 1}})
    check_room(rewarded, [{"CPU": 8.0, "reward": 1.0}])
    with pytest.raises(InputError, match="too little reward"):
        check_room(rewarded, [{"CPU": 8.0}])


def test_a_run_that_may_shrink_needs_room_for_what_ray_train_begins_with():
    p = Placement(workers=4, workers_least=1, worker_cpus=1, teacher_cpus=1, worker_resources={"trainer": 1})
    recipe = Recipe(training=Training(batch=12), placement=p)
    head = {"CPU": 1.0}  # for the teacher
    check_room(recipe, [head, {"CPU": 1.0, "trainer": 1.0}])
    check_room(recipe, [head, {"CPU": 8.0, "trainer": 4.0}])
    with pytest.raises(InputError, match=r"(?s)too little trainer.*1 x worker"):
        check_room(recipe, [head, {"CPU": 8.0}])
    # Ray Train would begin with two here, though one of the CPUs is the teacher's.
    with pytest.raises(InputError, match=r"(?s)too little CPU.*2 x worker"):
        check_room(recipe, [{"CPU": 2.0, "trainer": 2.0}])


def test_room_for_the_workers_alone_is_waited_for():
    p = Placement(workers=2, worker_cpus=1, teachers=9, worker_resources={"trainer": 1})
    recipe, node = Recipe(placement=p), {"CPU": 1.0, "trainer": 1.0}
    assert not lacks_room(recipe, [node, node])
    lack = lacks_room(recipe, [node])
    assert lack == "no room for 2 workers of CPU 1, trainer 1 each: 1 node with CPU 1, trainer 1 in all"
    fewer = derive(recipe, {"placement.workers_least": 1})
    assert not lacks_room(fewer, [node])
    assert lacks_room(fewer, [{"CPU": 8.0}]).startswith("no room for 1 worker of")


def test_a_run_waits_for_room_and_not_for_ever(tmp_path, capsys):
    node = {"CPU": 1.0}
    recipe = Recipe(output=tmp_path, placement=Placement(workers=2, worker_cpus=1, room_timeout=0.2))
    recipe.folder.mkdir()
    file = recipe.folder / "events.jsonl"
    seen: list[int] = []

    def nodes() -> list[dict[str, float]]:
        return [node] if len(seen) < 3 else [node, node]

    wait_for_room(recipe, EventLog(file), lambda: seen.append(1), nodes, pause=0.01)
    assert len(seen) == 3
    [told] = read_from(file, 0)[0]
    assert told["event"] == "waiting"
    assert told["message"].startswith("no room for 2 workers of CPU 1 each: 1 node with CPU 1 in all")
    assert "placement.room_timeout" in capsys.readouterr().out
    with pytest.raises(RunFailed, match=r"no room for 2 workers .* for placement.room_timeout=0.2 s"):
        wait_for_room(recipe, EventLog(file), lambda: None, lambda: [node], pause=0.01)
    (recipe.folder / "STOP").touch()
    with pytest.raises(RunStopped, match="the same command resumes"):
        wait_for_room(recipe, EventLog(file), lambda: None, lambda: [node], pause=0.01)


class Group:
    """A placement group that is placed at its third look."""

    made: ClassVar[list[Group]] = []

    def __init__(self, bundles: list[dict[str, float]]) -> None:
        self.bundles, self.looks, self.removed = bundles, 0, False
        Group.made.append(self)

    def wait(self, seconds: float) -> bool:
        assert seconds == 0
        self.looks += 1
        return self.looks > 2


@pytest.fixture
def asked(monkeypatch) -> list[Group]:
    monkeypatch.setattr(room, "grows", lambda recipe: recipe.placement.autoscaled)
    monkeypatch.setattr(room, "placement_group", Group)
    monkeypatch.setattr(room, "remove_placement_group", lambda group: setattr(group, "removed", True))
    monkeypatch.setattr(Group, "made", [])
    return Group.made


def grown(tmp_path, **placement) -> Recipe:
    p = Placement(workers=2, worker_cpus=1, worker_resources={"trainer": 1}, autoscaled=True, **placement)
    return Recipe(output=tmp_path, training=Training(batch=4), placement=p)


def test_only_what_is_lacking_is_asked_for_and_not_for_longer_than_it_is(tmp_path, asked, monkeypatch):
    head, trainer, log = {"CPU": 1.0}, {"CPU": 1.0, "trainer": 1.0}, tmp_path / "events.jsonl"
    nodes = iter([[head], [head, trainer], [head, trainer, trainer]])
    monkeypatch.setattr(room, "living_nodes", lambda: next(nodes))
    room.make_room(grown(tmp_path), log=EventLog(log), pause=0.01)
    [group] = asked
    assert group.bundles == [{"CPU": 1.0, "trainer": 1.0}] * 2
    assert group.removed
    [told] = read_from(log, 0)[0]
    assert told["event"] == "waiting"
    assert "too little CPU, trainer" in told["message"]
    assert "use fewer" not in told["message"]


def test_where_ray_has_placed_it_there_is_room(tmp_path, asked, monkeypatch):
    monkeypatch.setattr(room, "living_nodes", list)
    room.make_room(grown(tmp_path, workers_least=1), pause=0.01)
    assert sorted(len(group.bundles) for group in asked) == [1, 1]  # the teacher, and as few workers as will do
    assert all(group.removed for group in asked)


def test_what_does_not_come_is_given_up_and_a_stop_is_heeded(tmp_path, asked, monkeypatch):
    monkeypatch.setattr(room, "living_nodes", list)
    monkeypatch.setattr(Group, "wait", lambda group, seconds: False)
    with pytest.raises(RunFailed, match=r"(?s)did not bring it within placement.room_timeout=0.05 s.*ray status"):
        room.make_room(grown(tmp_path, room_timeout=0.05), pause=0.01)
    stop = tmp_path / "STOP"
    stop.touch()
    with pytest.raises(RunStopped, match="the same command starts it"):
        room.make_room(grown(tmp_path), stop, pause=0.01)
    assert all(group.removed for group in asked)
    with pytest.raises(InputError, match=r"placement\.autoscaled=true waits"):
        room.make_room(derive(grown(tmp_path), {"placement.autoscaled": False}))


def test_where_nothing_trains_there_is_room_for_teachers_and_places_alone():
    p = Placement(workers=4, samplers=2, sampler_gpus=1, worker_cpus=1)
    recipe = Recipe(training=Training(batch=4), placement=p, evaluation={"every": 5})
    check_room(room.untrained(recipe), [{"CPU": 0.5}])
    with pytest.raises(InputError, match="1 x worker"):
        check_room(room.untrained(recipe, workers=1), [{"CPU": 0.5}])


def test_room_is_counted_per_node_not_in_sum():
    recipe = Recipe(
        training=Training(batch=64), placement=Placement(workers=2, worker_cpus=3, teachers=1, teacher_cpus=2)
    )
    check_room(recipe, [{"CPU": 5.0}, {"CPU": 3.0}])
    with pytest.raises(InputError, match=r"(?s)no node with room for another worker.*there is +8.*largest node +4"):
        check_room(recipe, [{"CPU": 4.0}, {"CPU": 2.0}, {"CPU": 2.0}])
    with pytest.raises(InputError, match="no node with room for another teacher"):
        check_room(recipe, [{"CPU": 4.0}, {"CPU": 4.0}])
