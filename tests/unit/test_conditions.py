"""The condition table: rows, joining, its file, and what it refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from raydmd.errors import InputError
from raydmd.models.base import Conditions

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.unit


def table(pooled: bool = True) -> Conditions:
    embeds = torch.arange(24.0).view(4, 3, 2)
    return Conditions(embeds=embeds, pooled=embeds[:, 0] if pooled else None, mask=embeds[..., 0] > 5)


def equal(first: Conditions, second: Conditions) -> bool:
    ours, theirs = first.tensors(), second.tensors()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("pooled", [True, False])
def test_rows_and_joins_take_every_tensor_along(pooled: bool) -> None:
    whole = table(pooled)
    assert len(whole) == 4
    picked = whole.rows([2, 0, 2])
    assert len(picked) == 3
    assert torch.equal(picked.embeds[1], whole.embeds[0])
    assert (picked.pooled is None) == (not pooled)
    assert equal(whole.rows([0, 1]).join(whole.rows([2, 3])), whole)
    assert equal(whole.to(torch.device("cpu")), whole)


@pytest.mark.parametrize("pooled", [True, False])
def test_they_survive_their_file(tmp_path: Path, pooled: bool) -> None:
    table(pooled).save(tmp_path / "c.safetensors")
    assert equal(Conditions.read(tmp_path / "c.safetensors"), table(pooled))


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    embeds = torch.zeros(4, 3, 2)
    with pytest.raises(InputError, match=r"embeds must be \(N, L, D\), given \(4, 3\)"):
        Conditions(embeds=embeds[..., 0])
    with pytest.raises(InputError, match=r"pooled must be \(N, P\), given \(3, 2\)"):
        Conditions(embeds=embeds, pooled=embeds[:3, 0])
    with pytest.raises(InputError, match=r"mask must be \(N, L\), given \(4, 3, 2\)"):
        Conditions(embeds=embeds, mask=embeds)
    with pytest.raises(InputError, match=r"missing\.safetensors"):
        Conditions.read(tmp_path / "missing.safetensors")
    save_file({"embeds": embeds, "more": embeds.clone()}, tmp_path / "other.safetensors")
    with pytest.raises(
        InputError, match=r"other\.safetensors: holds .*more instead of embeds, pooled, mask and picture"
    ):
        Conditions.read(tmp_path / "other.safetensors")


def test_conditions_of_two_families_are_not_mixed():
    plain, rich = table(pooled=False), table(pooled=True)
    for mix in (lambda: plain.join(rich), lambda: rich.where(torch.ones(4, dtype=torch.bool), plain)):
        with pytest.raises(InputError, match=r"conditions of two families: one has embeds.*pooled"):
            mix()


def test_a_row_stands_in_where_conditions_are_not_kept():
    whole = table()
    mixed = whole.where(torch.tensor([True, False, True, False]), whole.rows([2]))
    assert equal(mixed, whole.rows([0, 2, 2, 2]))
