"""The loop's pure parts: cycle plan, sample stream, prompt files, cluster check, resumption check, progress line."""

from __future__ import annotations

import pytest
import ray
import torch
import yaml

from raydmd.errors import InputError, RunFailed
from raydmd.models.base import Conditions
from raydmd.recipe import Recipe, Training, derive
from raydmd.serving.joining import reachable
from raydmd.training.cluster import connect
from raydmd.training.events import read_from
from raydmd.training.plan import CyclePlan
from raydmd.training.sample_log import SampleLog
from raydmd.training.session import FolderSession
from raydmd.training.stream import Stream

pytestmark = pytest.mark.unit


def test_cycles_are_cut_into_phases():
    plan = CyclePlan.of(Training(cycles=10), 2)
    assert plan.ends == (5, 10)
    assert [plan.phase(c) for c in (0, 4, 5, 9)] == [0, 0, 1, 1]
    assert CyclePlan.of(Training(cycles=10, phase_split=(3, 1)), 2).ends == (8, 10)
    assert CyclePlan.of(Training(cycles=3, phase_split=(1000, 1, 1)), 3).ends == (1, 2, 3)


def test_rates_rise_stay_and_fall_in_every_phase():
    plan = CyclePlan.of(Training(cycles=20, warmup=2, decay=0.5), 2)
    rates = [plan.rate(c) for c in range(20)]
    assert rates[:10] == rates[10:]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[5] == 1.0
    assert rates[9] == pytest.approx(0.2)


def _stream(rank: int, world: int, *, slots=("student", "fake.0"), latents=None, **more) -> Stream:
    table = Conditions(embeds=torch.arange(6.0).view(6, 1, 1))
    given = {"latents": latents or {(2,): 1.0}, "seed": 1, "batch": 4} | more
    return Stream(table, slots=slots, rank=rank, world=world, device=torch.device("cpu"), **given)


def test_any_world_size_sees_the_same_samples():
    whole = _stream(0, 1).batch(3, "fake.0")
    parts = [_stream(r, 2).batch(3, "fake.0") for r in range(2)]
    assert whole.conditions == parts[0].conditions + parts[1].conditions
    noise = torch.cat([p.draws.normal("noise", (2,)) for p in parts])
    assert torch.equal(whole.draws.normal("noise", (2,)), noise)


def test_the_sample_log_of_any_world_size_names_the_same_samples_and_noise(tmp_path):
    def logged(world: int) -> dict[int, tuple]:
        recipe = Recipe(output=tmp_path, name=f"of{world}", training=Training(sample_log=True))
        recipe.folder.mkdir()
        for rank in range(world):
            session = FolderSession(recipe.folder)
            session.rank, session.world = rank, world
            log = SampleLog(recipe, session, "group")
            draws = _stream(rank, world, log=log).batch(3, "fake.0").draws
            draws.normal("noise", (2,))
            draws.uniform("t")
            draws.shared("exit")
            log.write()
            log.write()
        lines = [line for file in sorted((recipe.folder / "sample-log").iterdir()) for line in read_from(file, 0)[0]]
        assert [(x["cycle"], x["slot"], x["world"]) for x in lines] == [(3, "fake.0", world)] * world
        found = {}
        for line in lines:
            for position, row, noise in zip(line["positions"], line["rows"], line["noise"], strict=True):
                found[position] = (row, noise, line["shared"])
        return found

    whole = logged(1)
    assert len(whole) == 4
    assert len({noise for _, noise, _ in whole.values()}) == 4
    assert logged(2) == logged(4) == whole


def test_the_sample_log_is_off_unless_asked_for(tmp_path):
    log = SampleLog(Recipe(output=tmp_path), FolderSession(tmp_path), "group")
    assert _stream(0, 1, log=log).batch(0, "student").draws.witness is None
    log.write()
    assert not list(tmp_path.iterdir())


def test_updates_that_a_monitor_adds_move_nobody_elses():
    slots = ("student", "fake.0", "fake.1", "fake.2")
    usual, more = _stream(0, 1), _stream(0, 1, slots=slots, regular=2)
    taken = set()
    for cycle in range(3):
        for slot in slots:
            batch = more.batch(cycle, slot)
            if slot in slots[:2]:
                assert batch.draws == usual.batch(cycle, slot).draws
                assert batch.conditions == usual.batch(cycle, slot).conditions
            assert not taken & set(batch.draws.positions)
            taken |= set(batch.draws.positions)


MIX = {(4, 6): 1.0, (6, 4): 3.0, (4, 4): 0.5}


def test_sizes_are_drawn_by_weight():
    stream = _stream(0, 1, latents=MIX)
    drawn = [stream.batch(cycle, slot).latent for cycle in range(1500) for slot in ("student", "fake.0")]
    for latent, weight in MIX.items():
        assert drawn.count(latent) / len(drawn) == pytest.approx(weight / sum(MIX.values()), abs=0.03)
    assert drawn[::2] != drawn[1::2], "student and fake score would always have the same"


def test_a_size_is_its_updates_alone():
    """Of any rank, world, batch, order of asking, and number of fake updates; another seed draws others."""
    wanted = [(cycle, slot) for cycle in range(40) for slot in ("student", "fake.0")]

    def drawn(stream: Stream) -> list:
        found = {key: stream.batch(*key).latent for key in reversed(wanted)}
        return [found[key] for key in wanted]

    usual = drawn(_stream(0, 1, latents=MIX))
    for rank in range(4):
        assert drawn(_stream(rank, 4, latents=MIX, batch=8)) == usual
    assert drawn(_stream(0, 1, latents=MIX, slots=("student", "fake.0", "fake.1"))) == usual
    assert drawn(_stream(0, 1, latents=MIX, seed=2)) != usual


def test_sizes_move_no_other_draw():
    one, several = _stream(0, 1), _stream(0, 1, latents=MIX)
    for cycle in range(5):
        first, second = one.batch(cycle, "student"), several.batch(cycle, "student")
        assert first.latent == (2,)
        assert (first.draws, first.conditions) == (second.draws, second.conditions)


def test_every_prompt_comes_once_an_epoch_and_the_negative_never():
    stream = _stream(0, 1)
    rows = [r for c in range(5) for slot in ("student", "fake.0") for r in stream.batch(c, slot).conditions]
    assert 0 not in rows
    for epoch in range(8):
        assert sorted(rows[5 * epoch : 5 * epoch + 5]) == [1, 2, 3, 4, 5]
    assert len(set(stream.batch(0, "student").draws.positions) & set(stream.batch(0, "fake.0").draws.positions)) == 0


def test_a_file_that_grows_is_read_on_from_where_it_was(tmp_path):
    file = tmp_path / "lines.jsonl"
    assert read_from(file, 0) == ([], 0)
    file.write_text('{"a": 1}\n{"a": ')
    rows, offset = read_from(file, 0)
    assert rows == [{"a": 1}]
    assert offset == 9
    assert read_from(file, offset) == ([], offset)
    with file.open("a") as f:
        f.write('2}\ntorn\n{"a": 3}\n')
    rows, offset = read_from(file, offset)
    assert rows == [{"a": 2}, {"a": 3}]
    assert offset == file.stat().st_size


def test_resuming_with_another_recipe_is_refused_by_the_key_that_differs(tmp_path):
    from raydmd.training.folder import same_run

    recipe = Recipe(name="r", output=tmp_path)
    recipe.folder.mkdir()
    same_run(recipe, recipe.folder)
    (recipe.folder / "recipe.yaml").write_text(recipe.to_yaml())
    same_run(derive(recipe, {"placement.workers": 2, "checkpoints.every": 7}), recipe.folder)
    older = yaml.safe_load(recipe.to_yaml())
    del older["data"]["sizes"], older["model"]["lora"]  # keys that came after it was started
    (recipe.folder / "recipe.yaml").write_text(yaml.safe_dump(older))
    same_run(recipe, recipe.folder)
    with pytest.raises(InputError, match=r"data\.sizes"):
        same_run(derive(recipe, {"data.sizes": [{"height": 64, "width": 32}]}), recipe.folder)
    same_run(derive(recipe, {"monitor.action": "stop"}), recipe.folder)
    with pytest.raises(InputError, match=r"method.guidance: was 4.0, now 3.0"):
        same_run(derive(recipe, {"method.guidance": 3.0}), recipe.folder)


def test_the_progress_line_says_where_how_fast_and_what_is_wrong():
    from raydmd.training.follow import progress_line

    row = {
        "cycle": 20,
        "cycles": 100,
        "phase": 0,
        "fake/loss": 0.5,
        "student/gradient": 0.25,
        "monitor/alarm": 1,
        "monitor/raised/spread": 1.0,
        "monitor/spread": 0.9,
        "monitor/diversity": 1.4,  # not for long enough
        "teacher/retries": 1,
        "time/teacher_wait": 1.0,
        "time/fake": 3.0,
    }
    line = progress_line(row, Recipe(), [(0.0, 10), (5.0, 20)])
    alarm = "ALARM spread at 0.9 of its limit, calming down"
    for part in ("cycle 20/100", "2.00 cycles/s", "0.7 min left", "teacher wait 25%", alarm, "1 teacher retries"):
        assert part in line
    assert "diversity" not in line
    row.pop("monitor/raised/spread")
    assert "ALARM" not in progress_line(row, Recipe(), [(0.0, 10), (5.0, 20)])


@pytest.mark.parametrize(
    ("raised", "error", "says"),
    [
        (ConnectionError("nobody answers"), InputError, "cannot join the Ray cluster at 'ray://host:1': nobody ans"),
        (Exception("The current node timed out during startup."), RunFailed, "Ray did not start: .* tries again"),
    ],
)
def test_a_ray_that_does_not_come_is_said_plainly(monkeypatch, raised, error, says):
    def init(**_: object) -> None:
        raise raised

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_ADDRESS", "ray://host:1")
    with pytest.raises(error, match=says):
        connect()


def test_an_address_where_nobody_listens_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(InputError, match="nobody listens there"):
        connect()
    reachable("auto")
    reachable("ray://127.0.0.1:1")
