"""What lets somebody in has no place in recipes, messages and logs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from raydmd.cli_faults import guard
from raydmd.errors import InputError, RunFailed
from raydmd.recipe import Recipe, derive
from raydmd.redact import credentials, hidden
from raydmd.training.events import EventLog

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.unit

TOKEN = "hf_" + "aB3" * 11
SECRET = "c4n4ry-0000-s3cret"
GIVEN = [
    ("postgresql://ann:pa55word@db:5432/x", "pa55word"),
    ("https://ann:p/a@s:s@host/a", "p/a@s:s"),
    ("postgresql+psycopg://ann:@host/x?password=pa55word", "pa55word"),
    (f"https://{TOKEN}@huggingface.co/org/model", TOKEN),
    ("git+https://0123456789abcdef@github.com/org/repo", "0123456789abcdef"),
    ("s3://key:sec-ret@bucket/runs", "sec-ret"),
    ("s3://bucket/a?X-Amz-Signature=0a1b2c3d", "0a1b2c3d"),
    ("s3://bucket/a?access_key=AKIA&secret_key=0a1b2c3d", "0a1b2c3d"),
    ("https://account.blob.core.windows.net/a?sv=2024&sig=0a1b2c3d%3D", "0a1b2c3d"),
    (f"org/model {TOKEN}", TOKEN),
    ("AKIA" + "B4" * 8, "AKIA" + "B4" * 8),
    ("ghp_" + "a1" * 18, "ghp_" + "a1" * 18),
    ("-----BEGIN OPENSSH PRIVATE KEY-----", "BEGIN OPENSSH PRIVATE"),
]
HARMLESS = [
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    "runs/2026-11-23@night",
    "s3://bucket/runs",
    "postgresql://ann@db/x",
    "http://localhost:5000/#/experiments/1@2",
    "https://medium.com/@ann/a-story",
    "https://host/page?tokens=3&step=2",
    "a cat: running @ noon, 3:2",
    "sqlite:////home/ann/mlflow.db",
    "C:\\models\\a",
    "task-1 risk-free",
]
KEYS = ["tracking.uri", "model.path", "model.negative_prompt", "data.prompts", "data.cache", "output", "data.column"]


@pytest.mark.parametrize(("text", "secret"), GIVEN)
def test_credentials_are_found_and_hidden(text: str, secret: str) -> None:
    assert credentials(text)
    assert secret not in credentials(text)
    for whole in (text, f"cannot reach '{text}': refused", json.dumps({"message": f"at {text}, and on"})):
        assert secret not in hidden(whole)


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_stays(text: str) -> None:
    assert credentials(text) == ""


def test_what_is_around_a_secret_stays() -> None:
    said = hidden("tracking.uri http://ann:pa55word@host:5000/a: refused; see https://docs.ray.io/x?y=1#z")
    assert said == "tracking.uri http://...@host:5000/a: refused; see https://docs.ray.io/x?y=1#z"


@pytest.mark.parametrize("key", KEYS)
def test_recipes_refuse_them_wherever_they_stand_and_do_not_repeat_them(key: str) -> None:
    for text, secret in GIVEN:
        with pytest.raises(InputError) as refusal:
            derive(Recipe(), {key: text})
        assert f"{key} holds" in str(refusal.value)
        assert secret not in str(refusal.value)


def test_recipes_refuse_them_in_lists_and_mappings_too() -> None:
    changes: list[dict[str, Any]] = [
        {"model.lora": {"transformer": GIVEN[0][0]}},
        {"model.lora": {GIVEN[0][0]: "a.safetensors"}},
        {"training.student.lora": {"targets": [GIVEN[0][0]]}},
        {"method": {"name": "amd", "adapt": {"rewards": [{"kind": "clip", "path": GIVEN[0][0]}]}}},
    ]
    for change in changes:
        with pytest.raises(InputError, match="holds a password") as refusal:
            derive(Recipe(), change)
        assert "pa55word" not in str(refusal.value)


def test_a_refusal_of_something_else_does_not_repeat_them_either() -> None:
    with pytest.raises(InputError) as refusal:
        derive(Recipe(), {"training.cycles": "https://ann:pa55word@host"})
    assert "training.cycles" in str(refusal.value)
    assert "pa55word" not in str(refusal.value)


def test_values_of_secret_variables_are_named_in_messages_and_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "MY_API_KEY"):
        monkeypatch.setenv(name, f"{SECRET}-{name}")
    monkeypatch.setenv("SOME_TOKEN_FILE", str(tmp_path))  # a place is no secret
    assert hidden(f"refused {SECRET}-HF_TOKEN at {tmp_path}") == f"refused <HF_TOKEN> at {tmp_path}"
    log = EventLog(tmp_path / "events.jsonl")
    log.write("failed", message=f"401: {SECRET}-AWS_SECRET_ACCESS_KEY", cycle=3)
    [event] = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert (event["message"], event["cycle"]) == ("401: <AWS_SECRET_ACCESS_KEY>", 3)

    def fails(kind: type[Exception]) -> Any:
        def step() -> None:
            raise kind(f"no answer from https://ann:pa55word@host, {SECRET}-MY_API_KEY")

        return step

    recipe = derive(Recipe(), {"output": tmp_path, "name": "a"})
    for debug in ("0", "1"):
        monkeypatch.setenv("RAYDMD_DEBUG", debug)
        for kind in (RunFailed, ValueError):
            with pytest.raises(BaseException):  # noqa: B017, PT011  typer's way of ending
                guard(fails(kind), recipe)
    said = capsys.readouterr()
    for text in (said.out + said.err, (recipe.folder / "error.log").read_text()):
        assert "no answer from https://...@host" in text
        assert SECRET not in text
        assert "pa55word" not in text
