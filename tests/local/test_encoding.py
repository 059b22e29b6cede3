"""Tables of encoded prompts: made in parts, kept when something breaks, the same as when made at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from raydmd.errors import InputError
from raydmd.models import load_family
from raydmd.models.base import Conditions
from raydmd.models.family import Family
from raydmd.models.untrained import write
from raydmd.recipe import Model
from tests.pipelines import WORDS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

pytestmark = pytest.mark.local
PROMPTS = ["a cat", "a dog runs", "a", "a cat jumps a dog", "a dog"]


@pytest.mark.parametrize("kind", ["sd3", "sdxl", "qwen-image", "z-image", "dit"])
def test_parts_make_the_table_that_one_go_makes(tmp_path, monkeypatch, kind):
    """Of prompts that are as long as they are, too: parts are padded to the longest."""
    folder = write(kind, tmp_path / kind, WORDS)
    prompts = [str(k) for k in range(5)] if kind == "dit" else PROMPTS
    family = load_family(Model(path=str(folder)))
    whole = Conditions.read(family.encode(prompts, tmp_path / "whole"))
    monkeypatch.setattr(Family, "part", 2)
    file = family.encode(prompts, tmp_path / "parts")
    found = Conditions.read(file)
    assert found.tensors().keys() == whole.tensors().keys()
    assert len(found) == 6
    for name, value in whole.tensors().items():
        torch.testing.assert_close(found.tensors()[name], value, rtol=0, atol=1e-6)
    assert list((tmp_path / "parts").iterdir()) == [file], "parts are gone once their table is there"


def test_what_was_encoded_before_a_failure_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(Family, "part", 2)
    family = load_family(Model(path=str(write("sd3", tmp_path / "sd3", WORDS))))
    encoded: list[tuple[str, ...]] = []
    encode = family._encode

    def failing(texts: Sequence[str], length: int) -> Conditions:
        if len(encoded) == 1:
            raise RuntimeError("the machine is gone")
        encoded.append(tuple(texts[1:]))
        return encode(texts, length)

    monkeypatch.setattr(family, "_encode", failing)
    with pytest.raises(RuntimeError, match="gone"):
        family.encode(PROMPTS, tmp_path / "cache")

    def counting(texts: Sequence[str], length: int) -> Conditions:
        encoded.append(tuple(texts[1:]))
        return encode(texts, length)

    monkeypatch.setattr(family, "_encode", counting)
    family.encode(PROMPTS, tmp_path / "cache")
    assert encoded == [("a cat", "a dog runs"), ("a", "a cat jumps a dog"), ("a dog",)]
    family.encode(PROMPTS, tmp_path / "cache")
    assert len(encoded) == 3


def test_parts_may_be_made_elsewhere_and_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(Family, "part", 2)
    family = load_family(Model(path=str(write("sd3", tmp_path / "sd3", WORDS))))
    asked: list[Sequence[str]] = []

    def spread(parts: Sequence[Sequence[str]], folder: Path) -> None:
        asked.extend(parts)
        for part in reversed(parts):
            load_family(Model(path=str(tmp_path / "sd3"))).encode_part(part, folder)

    found = Conditions.read(family.encode(PROMPTS, tmp_path / "cache", spread=spread))
    assert asked == [["a cat", "a dog runs"], ["a", "a cat jumps a dog"], ["a dog"]]
    alone = Conditions.read(family.encode(["a dog"], tmp_path / "alone"))
    torch.testing.assert_close(found.embeds[5], alone.embeds[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.embeds[0], alone.embeds[0], rtol=0, atol=1e-6)


def test_parts_that_were_made_where_nobody_sees_them_are_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(Family, "part", 2)
    family = load_family(Model(path=str(write("sd3", tmp_path / "sd3", WORDS))))
    with pytest.raises(InputError, match="3 of 3 parts of encoded prompts are not in"):
        family.encode(PROMPTS, tmp_path / "cache", spread=lambda *_: None)


def test_tables_of_two_families_never_share_a_file(tmp_path):
    """Both read nothing but numbers, and mean another class by none."""
    edm, dit = (load_family(Model(path=str(write(kind, tmp_path / kind, WORDS)))) for kind in ("edm", "dit"))
    files = [family.encode(["1", "2"], tmp_path / "cache") for family in (edm, dit)]
    assert [float(Conditions.read(file).embeds[0]) for file in files] == [0.0, 1000.0]
