"""Files as the benchmarks' tools expect them, scores as they leave them, and what is said of what lacks."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from raydmd.errors import InputError, NonFiniteError
from raydmd.evaluation.benchmarks.base import Benchmark, write_text
from raydmd.evaluation.benchmarks.dpg import DpgBench
from raydmd.evaluation.benchmarks.geneval import GenEval
from raydmd.evaluation.benchmarks.hps import STYLES, HpsV2, HpsV3
from raydmd.evaluation.benchmarks.vbench import VBench

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.unit

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a cow"},
    {"tag": "counting", "include": [{"class": "clock", "count": 2}], "prompt": "a photo of two clocks"},
]


def flat(*levels: float, frames: int = 1, side: int = 32) -> Tensor:
    """One clip of one grey per level."""
    return torch.tensor(levels).view(-1, 1, 1, 1, 1).expand(-1, frames, 3, side, side)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def all_benchmarks() -> list[Benchmark]:
    return [
        VBench(["a cat, running", "a dog"]),
        GenEval(GENEVAL),
        DpgBench({"b": "second", "a": "first"}),
        HpsV2({style: [f"{style} of a cat", f"{style} of a dog"] for style in STYLES}),
        HpsV3(["a cat", "a dog"], samples_per_prompt=3),
    ]


@pytest.mark.parametrize("benchmark", all_benchmarks(), ids=lambda b: type(b).__name__)
def test_what_is_written_is_what_is_promised_and_a_resumed_run_sees_the_rest(
    benchmark: Benchmark, tmp_path: Path
) -> None:
    frames = 3 if isinstance(benchmark, VBench) else 1
    count = len(benchmark.prompts())
    assert benchmark.missing(tmp_path) == list(range(count))
    for prompt in range(1, count):
        benchmark.write(tmp_path, prompt, flat(*[0.5] * benchmark.samples_of(prompt), frames=frames))
    assert benchmark.missing(tmp_path) == [0]
    with pytest.raises(InputError, match=f"1 of {count} prompts") as told:
        benchmark.check(tmp_path)
    assert benchmark.files(0)[0] in str(told.value)
    assert benchmark.prompts()[0] in str(told.value)
    benchmark.write(tmp_path, 0, flat(*[0.5] * benchmark.samples_of(0), frames=frames))
    benchmark.check(tmp_path)
    assert files(tmp_path) == {name for prompt in range(count) for name in benchmark.files(prompt)}


@pytest.mark.parametrize("benchmark", all_benchmarks(), ids=lambda b: type(b).__name__)
def test_clips_that_do_not_fit_are_refused_before_a_file_is_made(benchmark: Benchmark, tmp_path: Path) -> None:
    video, count = isinstance(benchmark, VBench), benchmark.samples_of(0)
    right, wrong = (3, 1) if video else (1, 3)
    with pytest.raises(InputError, match="clips must be") as told:
        benchmark.write(tmp_path, 0, flat(*[0.5] * (count + 1), frames=right))
    assert benchmark.prompts()[0] in str(told.value)
    with pytest.raises(InputError, match="clips must be"):
        benchmark.write(tmp_path, 0, flat(*[0.5] * count, frames=wrong))
    with pytest.raises(NonFiniteError, match="prompt 0"):
        benchmark.write(tmp_path, 0, flat(*[math.nan] * count, frames=right))
    assert files(tmp_path) == set()


@pytest.mark.parametrize("benchmark", all_benchmarks(), ids=lambda b: type(b).__name__)
def test_absent_scores_are_named(benchmark: Benchmark, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=str(tmp_path)):
        benchmark.read(tmp_path)


def test_vbench_names_videos_after_prompt_and_sample(tmp_path: Path) -> None:
    benchmark = VBench(["a cat, running"], fps=8)
    ramp = torch.linspace(0.1, 0.9, 64).expand(5, 6, 3, 48, 64).clone()
    ramp[:, :, 2] = torch.linspace(0, 1, 6).view(1, 6, 1, 1)  # blue rises over time
    benchmark.write(tmp_path, 0, ramp)
    assert files(tmp_path) == {f"a cat, running-{i}.mp4" for i in range(5)}
    video = cv2.VideoCapture(str(tmp_path / "a cat, running-4.mp4"))
    assert video.get(cv2.CAP_PROP_FPS) == 8
    frames = [frame[..., ::-1] for ok, frame in (video.read() for _ in range(6)) if ok]
    assert len(frames) == 6
    expected = (ramp[0] * 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(np.stack(frames) - expected).mean() < 4
    assert not video.read()[0]
    with pytest.raises(InputError, match="33x33"):
        benchmark.write(tmp_path, 0, flat(*[0.5] * 5, frames=2, side=33))


def test_vbench_reads_its_prompts_and_its_scores(tmp_path: Path) -> None:
    info = tmp_path / "VBench_full_info.json"
    info.write_text(
        json.dumps(
            [
                {"prompt_en": "a still lake", "dimension": ["temporal_flickering"]},
                {"prompt_en": "a dog", "dimension": ["subject_consistency"]},
                {"prompt_en": "a dog", "dimension": ["motion_smoothness"]},
            ]
        )
    )
    every = VBench.from_info(info)
    assert every.prompts() == ["a still lake", "a dog"]
    assert [len(every.files(p)) for p in range(2)] == [25, 5]
    some = VBench.from_info(info, dimensions=frozenset({"motion_smoothness"}))
    assert some.prompts() == ["a dog"]
    with pytest.raises(InputError, match="color"):
        VBench.from_info(info, dimensions=frozenset({"color"}))
    info.write_text('[{"prompt": "a dog"}]')
    with pytest.raises(InputError, match=r"no VBench_full_info\.json"):
        VBench.from_info(info)

    scores = tmp_path / "results_eval_results.json"
    videos = [{"video_path": "a dog-0.mp4", "video_results": 0.9}]
    scores.write_text(json.dumps({"motion_smoothness": [0.95, videos], "dynamic_degree": [0.5, []]}))
    assert every.read(tmp_path) == {"motion_smoothness": 0.95, "dynamic_degree": 0.5}
    (tmp_path / "again_eval_results.json").write_text(json.dumps({"dynamic_degree": [0.25, []]}))
    with pytest.raises(InputError, match="dynamic_degree"):
        every.read(tmp_path)
    (tmp_path / "again_eval_results.json").write_text(json.dumps({"color": [None, []]}))
    with pytest.raises(InputError, match="color: None"):
        every.read(tmp_path)


@pytest.mark.parametrize("prompts", [["a/b"], [""], ["x" * 251], ["same", "same"]])
def test_vbench_refuses_prompts_that_name_no_file(prompts: list[str]) -> None:
    with pytest.raises(InputError, match=r"prompt \d"):
        VBench(prompts)


def test_a_name_at_the_limit_of_file_systems_is_written(tmp_path: Path) -> None:
    benchmark = VBench(["x" * 248])
    benchmark.write(tmp_path, 0, flat(*[0.5] * 5, frames=2))
    benchmark.check(tmp_path)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "metadata.jsonl", "\udc80")
    assert files(tmp_path) == set()


def test_geneval_writes_folders_and_averages_by_tag(tmp_path: Path) -> None:
    write_rows(tmp_path / "evaluation_metadata.jsonl", GENEVAL)
    benchmark = GenEval.from_metadata(tmp_path / "evaluation_metadata.jsonl")
    images = tmp_path / "images"
    for prompt in range(3):
        benchmark.write(images, prompt, flat(0.0, 0.2, 0.4, 1.0))
    assert files(images / "00002") == {"metadata.jsonl", *(f"samples/000{i}.png" for i in range(4))}
    assert json.loads((images / "00002" / "metadata.jsonl").read_text()) == GENEVAL[2]
    pixels = [np.asarray(Image.open(images / "00001" / "samples" / f"000{i}.png")) for i in range(4)]
    assert [int(p.mean()) for p in pixels] == [0, 51, 102, 255]
    assert pixels[0].shape == (32, 32, 3)

    right = {0: [True, True, True, False], 1: [False] * 4, 2: [True, False, False, False]}
    rows: list[dict[str, object]] = [
        {"filename": f"/data/run/{p:05d}/samples/{i:04d}.png", "tag": GENEVAL[p]["tag"], "correct": hit, "reason": ""}
        for p, hits in right.items()
        for i, hit in enumerate(hits)
    ]
    write_rows(images / "results.jsonl", rows)
    assert benchmark.read(images) == pytest.approx(
        {
            "single_object": 3 / 8,
            "counting": 1 / 4,
            "overall": (3 / 8 + 1 / 4) / 2,
            "images_correct": 4 / 12,
            "prompts_correct": 2 / 3,
        }
    )
    write_rows(images / "results.jsonl", rows[:-1])
    with pytest.raises(InputError, match=r"00002/samples/0003\.png.*two clocks"):
        benchmark.read(images)
    (images / "results.jsonl").write_text('{"filename": "x"}\nno json\n')
    with pytest.raises(InputError, match="line 2"):
        benchmark.read(images)
    write_rows(images / "results.jsonl", [{"filename": "x", "correct": 1}])
    with pytest.raises(InputError, match="row 1"):
        benchmark.read(images)
    with pytest.raises(InputError, match="line 2"):
        GenEval([GENEVAL[0], {"tag": "counting"}])


def test_dpg_bench_grids_are_two_by_two_in_the_order_of_file_names(tmp_path: Path) -> None:
    write_text(tmp_path / "prompts" / "stanford9.txt", "a long prompt\n")
    write_text(tmp_path / "prompts" / "coco1.txt", "another")
    benchmark = DpgBench.from_folder(tmp_path / "prompts")
    assert benchmark.prompts() == ["another", "a long prompt"]
    benchmark.write(tmp_path, 1, flat(0.0, 0.2, 0.4, 1.0))
    grid = np.asarray(Image.open(tmp_path / "stanford9.png"))
    assert grid.shape == (64, 64, 3)
    corners = [grid[:32, :32], grid[:32, 32:], grid[32:, :32], grid[32:, 32:]]
    assert [set(np.unique(corner).tolist()) for corner in corners] == [{0}, {51}, {102}, {255}]
    with pytest.raises(InputError, match="32x16"):
        benchmark.write(tmp_path, 0, flat(*[0.5] * 4)[..., :16, :])
    with pytest.raises(InputError, match="no prompts"):
        DpgBench.from_folder(tmp_path / "nowhere")


def test_dpg_bench_reads_sections_and_total(tmp_path: Path) -> None:
    benchmark, path = DpgBench({"a": "first"}), tmp_path / "dpg_scores.txt"
    lines = ["a.png: 0.5", "L1 category scores:", "\tentity: 90.5", "L2 category scores:", "\tentity - whole: 91.0"]
    path.write_text("\n".join([*lines, "Image path: /data: x", "\tnot: counted", "DPG-Bench score: 84.25"]))
    assert benchmark.read(tmp_path) == {"l1/entity": 90.5, "l2/entity - whole": 91.0, "overall": 84.25}
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match="DPG-Bench score"):
        benchmark.read(tmp_path)
    for wrong in ("nan", "good"):
        path.write_text(f"DPG-Bench score: {wrong}")
        with pytest.raises(InputError, match=wrong):
            benchmark.read(tmp_path)


def test_hpsv2_writes_a_folder_per_style_and_reads_what_is_printed(tmp_path: Path) -> None:
    for style in STYLES:
        write_text(tmp_path / "benchmark" / f"{style}.json", json.dumps([f"{style} {i}" for i in range(2)]))
    benchmark = HpsV2.from_folder(tmp_path / "benchmark")
    assert benchmark.prompts()[2] == "concept-art 0"
    benchmark.write(tmp_path, 3, flat(0.4))
    image = Image.open(tmp_path / "concept-art" / "00001.jpg")
    assert image.format == "JPEG"
    assert np.abs(np.asarray(image).astype(int) - 102).max() <= 1
    printed = ["-----------benchmark score ----------------", "student anime          28.50 \t 0.1834"]
    printed += [f"student {style:<15} 27.5 \t 0.2" for style in STYLES[1:]]
    write_text(tmp_path / "hpsv2.txt", "\n".join(printed))
    assert benchmark.read(tmp_path) == {"anime": 28.5, **dict.fromkeys(STYLES[1:], 27.5), "overall": 27.75}
    write_text(tmp_path / "hpsv2.txt", "\n".join(printed[:-1]))
    with pytest.raises(InputError, match="photo"):
        benchmark.read(tmp_path)
    write_text(tmp_path / "benchmark" / "anime.json", '{"no": "list"}')
    with pytest.raises(InputError, match=r"anime\.json"):
        HpsV2.from_folder(tmp_path / "benchmark")


def test_hpsv3_lists_its_samples_and_averages_their_scores(tmp_path: Path) -> None:
    benchmark = HpsV3(["a cat", "a dog"], samples_per_prompt=2)
    benchmark.write(tmp_path, 0, flat(0.1, 0.2))
    with pytest.raises(InputError, match=r"images/00001-0\.png"):
        benchmark.write_list(tmp_path)
    benchmark.write(tmp_path, 1, flat(0.3, 0.4))
    benchmark.write_list(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert rows[2] == {"prompt": "a dog", "path": "images/00001-0.png"}
    scored: list[dict[str, object]] = [{"path": row["path"], "score": float(i)} for i, row in enumerate(rows)]
    write_rows(tmp_path / "scores.jsonl", scored[::-1])
    assert benchmark.read(tmp_path) == {"overall": 1.5}
    write_rows(tmp_path / "scores.jsonl", scored[:3])
    with pytest.raises(InputError, match=r"images/00001-1\.png.*a dog"):
        benchmark.read(tmp_path)
    write_rows(tmp_path / "scores.jsonl", [*scored[:3], {"path": rows[3]["path"], "score": "high"}])
    with pytest.raises(InputError, match=r"00001-1.*'high'"):
        benchmark.read(tmp_path)
