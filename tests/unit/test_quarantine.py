"""Which samples take the place of poison, and that no other sample changes."""

from __future__ import annotations

import json

import pytest
import torch

from raydmd.draws import Draws
from raydmd.errors import InputError, NonFiniteError
from raydmd.models.base import Conditions
from raydmd.recipe import Recipe, derive
from raydmd.training.blame import blame, placed
from raydmd.training.events import read_lines
from raydmd.training.folder import same_run
from raydmd.training.prepare import check_quarantine
from raydmd.training.quarantine import FILE, Bad, Poisoned, Quarantine, named, read, write
from raydmd.training.stream import Batch, Stream

pytestmark = pytest.mark.unit
SLOTS = ("student", "fake.0", "fake.1")
PROMPTS, BATCH, SEED = 6, 4, 3


def bad(position: int, *, seed: int = SEED, prompt: int = 2, why: str = "NaN") -> Bad:
    return Bad(position=position, seed=seed, prompt=prompt, cycle=1, slot="student", why=why)


def stream(quarantine: Quarantine | None = None, *, rank: int = 0, world: int = 1, group: int = 1) -> Stream:
    table = Conditions(embeds=torch.arange(1.0 + PROMPTS).view(-1, 1, 1))
    return Stream(
        table, latents={(2,): 1.0}, seed=SEED, batch=BATCH, slots=SLOTS, rank=rank, world=world, group=group,
        device=torch.device("cpu"), quarantine=quarantine,
    )  # fmt: skip


def drawn(s: Stream, cycles: int = 8) -> dict[int, tuple[int, list[float], float]]:
    """By position: prompt, noise, and a uniform number."""
    found = {}
    for cycle in range(cycles):
        for slot in SLOTS:
            batch = s.batch(cycle, slot)
            noise, uniform = batch.draws.normal("noise", (3,)), batch.draws.uniform("time")
            for i, position in enumerate(batch.positions):
                found[position] = batch.conditions[i], noise[i].tolist(), float(uniform[i])
                assert float(batch.cond.embeds[i]) == batch.conditions[i]
    return found


def test_a_sample_in_quarantine_is_another_and_all_others_are_as_they_were():
    usual, once, twice = drawn(stream()), *(drawn(stream(Quarantine(before=[bad(17)] * k))) for k in (1, 2))
    assert {p for p in usual if usual[p] != once[p]} == {17}
    assert {p for p in usual if usual[p] != twice[p]} == {17}
    assert len({(*s[17][1], s[17][2]) for s in (usual, once, twice)}) == 3, "noise is drawn anew each time"
    assert len({s[17][0] for s in (usual, once, twice)}) == 3, "and so is the prompt"
    assert drawn(stream(Quarantine(before=[bad(17, seed=SEED + 1)]))) == usual, "of another stream"


def test_prompts_left_out_are_never_drawn_and_other_samples_stay():
    usual, without = drawn(stream()), drawn(stream(Quarantine([2, 5])))
    for position, sample in usual.items():
        if sample[0] in (2, 5):
            assert without[position][0] not in (2, 5)
            assert without[position][1:] == sample[1:], "its noise is its own"
        else:
            assert without[position] == sample
    both = drawn(stream(Quarantine([2, 5], before=[bad(p) for p in range(96)])))
    assert not {sample[0] for sample in both.values()} & {2, 5}
    only = drawn(stream(Quarantine([1, 2, 3, 5, 6], before=[bad(17)])))
    assert {sample[0] for sample in only.values()} == {4}


def test_any_number_of_workers_makes_the_same_substitution():
    quarantine = Quarantine([2], before=[bad(17), bad(18), bad(18)])
    whole = drawn(stream(quarantine))
    parts = [drawn(stream(quarantine, rank=rank, world=4)) for rank in range(4)]
    assert {p: s for part in parts for p, s in part.items()} == whole


def test_a_group_keeps_one_prompt():
    usual, after = (drawn(stream(q, group=2)) for q in (None, Quarantine(before=[bad(17)])))
    assert {p for p in usual if usual[p][0] != after[p][0]} == {16, 17}
    assert {p for p in usual if usual[p][1] != after[p][1]} == {17}
    assert after[16][0] == after[17][0]


def test_the_budget_is_counted_over_restarts_and_its_end_lists_all(tmp_path):
    first = Quarantine(budget=2)
    write(tmp_path, first.add([bad(5), bad(5, why="inf too")], ["a cat", "a dog"]), ["a cat", "a dog"])
    assert json.loads((tmp_path / FILE).read_text())["text"] == "a dog"
    second = Quarantine(budget=2, before=read(read_lines(tmp_path / FILE)))
    assert [second.level(SEED, p) for p in (5, 6)] == [1, 0]
    write(tmp_path, second.add([bad(6)]))
    third = Quarantine(budget=2, before=read(read_lines(tmp_path / FILE)))
    with pytest.raises(NonFiniteError) as caught:
        third.add([bad(7, prompt=1)], ["a cat", "a dog"])
    for part in ("position 7, prompt 1 'a cat': NaN", "position 5, prompt 2 'a dog'", "position 6", "=2 is spent"):
        assert part in str(caught.value)
    assert "data.quarantine=[1]" in str(caught.value)
    assert third.level(SEED, 7) == 0


def test_without_a_budget_the_message_says_both_ways_out():
    with pytest.raises(NonFiniteError, match=r"data\.quarantine=\[2, 4\].*training\.poison_budget=10") as caught:
        Quarantine([4]).add([bad(5)])
    assert "is spent" not in str(caught.value)


def batch(positions: tuple[int, ...], rows: tuple[int, ...]) -> Batch:
    cond = Conditions(embeds=torch.zeros(len(rows), 1, 1))
    return Batch(
        positions=positions, draws=Draws(SEED, "1/student", positions), conditions=rows, cond=cond, latent=(2,)
    )


def blamed(*ranks: tuple[Batch, float, dict[str, torch.Tensor | None]]) -> list[NonFiniteError]:
    """What every rank makes of it."""
    said: list[str] = []
    error = NonFiniteError("the gradient is nan")

    def note(mine: str) -> list[str]:
        said.append(mine)
        return [mine]

    def one(number: int, everyone) -> NonFiniteError:
        b, loss, looked = ranks[number]
        return blame(error, b, 1, "student", loss=loss, looked=looked, everyone=everyone)

    for number in range(len(ranks)):
        one(number, note)
    return [one(number, lambda _: said) for number in range(len(ranks))]


FINE, TORN = torch.zeros(2, 3), torch.tensor([[0.0, 0, 0], [0, torch.nan, 0]])


def test_the_guilty_sample_is_found_on_whatever_rank_it_is():
    first, second = batch((8, 9), (1, 2)), batch((10, 11), (3, 4))
    errors = blamed((first, 0.1, {"its sample": FINE, "none": None}), (second, torch.nan, {"its sample": TORN}))
    for error in errors:
        assert isinstance(error, Poisoned)
        assert [(b.position, b.prompt, b.slot, b.why) for b in error.found] == [
            (11, 4, "student", "its sample is not finite")
        ]


def test_what_all_samples_have_is_of_none_of_them():
    all_bad = torch.full((2, 3), torch.nan)
    errors = blamed(
        (batch((8, 9), (1, 2)), 0.1, {"its gradient": all_bad}),
        (batch((10, 11), (3, 4)), torch.inf, {"its gradient": all_bad}),
    )
    for error in errors:
        assert not isinstance(error, Poisoned)
        for part in ("the gradient is nan", "loss is not finite on rank 1)", "8 (prompt 1), ", "11 (prompt 4)"):
            assert part in str(error)


def test_an_answer_that_names_its_samples_names_their_positions():
    error = placed(NonFiniteError("x0", (1,)), batch((8, 9), (1, 2)), 4, "fake.0")
    assert isinstance(error, Poisoned)
    assert named(error.found[0], ["a", "b"]) == "cycle 4, fake.0, position 9, prompt 2 'b': x0"
    other = ValueError("no")
    assert placed(other, batch((8, 9), (1, 2)), 4, "fake.0") is other


def test_bad_numbers_are_refused_before_the_start_and_good_ones_may_change_on_the_way(tmp_path):
    recipe = Recipe(name="r", output=tmp_path)
    check_quarantine(derive(recipe, {"data.quarantine": [1, 3]}), 3)
    with pytest.raises(InputError, match="there is no prompt 4, the last one is 3"):
        check_quarantine(derive(recipe, {"data.quarantine": [1, 4]}), 3)
    with pytest.raises(InputError, match="leaves out all of 3 prompts"):
        check_quarantine(derive(recipe, {"data.quarantine": [1, 2, 3]}), 3)
    recipe.folder.mkdir()
    (recipe.folder / "recipe.yaml").write_text(recipe.to_yaml())
    same_run(derive(recipe, {"data.quarantine": [1], "training.poison_budget": 3}), recipe.folder)
