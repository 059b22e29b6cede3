"""Comparisons from a real MLflow server, and the pages of both, opened in a real browser and looked at."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from raydmd.cli import main
from raydmd.comparing.gather import gather
from raydmd.comparing.server import objectives_on
from raydmd.errors import InputError
from raydmd.tracking.group import Group
from raydmd.tracking.reader import Reader
from raydmd.tracking.tracker import Tracker
from tests.browser import Page, binary, browser
from tests.runs import evaluation_rows, figures, make_run, metrics_rows, recipe_of
from tests.tracking_server import free_port, mlflow_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.local

TRIALS = {"0000": 60.0, "0001": 30.0, "0002": 45.0, "0003": 50.0}
"""Their final distance."""
EARLY = "0003"
LOADED = """
[...document.querySelectorAll('#samples img')].every(i => (i.loading = 'eager', i.complete && i.naturalWidth > 0))
"""
UNFOLD = "(b => b && (b.click(), true))(document.querySelector('.ag-row button:not([aria-haspopup])'))"
OVERLAPPING = """
(() => {
  const found = [];
  for (const svg of document.querySelectorAll('#front svg, #curves svg, #importance svg')) {
    const all = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
    all.forEach(([a, p], i) => all.slice(i + 1).forEach(([b, q]) => {
      const beside = p.left >= q.right - 1 || q.left >= p.right - 1 || p.top >= q.bottom - 3 || q.top >= p.bottom - 3;
      if (!beside) found.push([a, b]);
    }));
  }
  return found;
})()
"""
EVIL = '<img src=x onerror="window.evil=1">'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A server with a sweep, its trials, and two runs of one name, as raydmd itself writes them."""
    folder = tmp_path_factory.mktemp("server")
    with mlflow_server(folder) as uri:
        base = recipe_of(folder, "base", {"tracking.uri": uri, "tracking.experiment": "study"})
        group = Group.open(base, "ca-dm", lambda _, make: make(), {})
        for k, (name, frechet) in enumerate(TRIALS.items()):
            changes = {"method.guidance": 2.0 + k, "training.fake_updates": 3 + 2 * (k % 2)}
            cycles = 20 if name == EARLY else 40
            log(
                folder / "trials",
                name,
                {**changes, **tracked(uri)},
                frechet,
                {**group.tags(), "raydmd.trial": name},
                cycles,
            )
        rows = [SimpleNamespace(values={"frechet": f, "coverage_entropy": f / 100}) for f in TRIALS.values()]
        (folder / "compare.html").write_text("a page")
        group.close(rows, {"frechet": "min", "coverage_entropy": "max"}, [folder / "compare.html"])
        for place in ("one", "two"):
            log(folder / place, "twice", {"tracking.experiment": "else", **tracked(uri)}, 20.0, {}, 40)
        log(folder / "three", "study", {"tracking.experiment": "else", **tracked(uri)}, 20.0, {}, 40)
        yield SimpleNamespace(uri=uri, folder=folder, group=group.run_id)


def tracked(uri: str) -> dict[str, str]:
    return {"tracking.uri": uri}


def log(output: Path, name: str, changes: dict[str, Any], frechet: float, tags: dict[str, str], cycles: int) -> None:
    """A run's folder, and the same in MLflow."""
    changes = {"tracking.experiment": "study", **changes}
    folder = make_run(output, name, changes, frechet, cycles=cycles)
    tracker = Tracker(recipe_of(output, name, changes), tags)
    tracker.log([{"time": 1.0, **row} for row in metrics_rows(frechet, cycles)])
    for row in evaluation_rows(frechet, cycles):
        tracker.figures({k: v for k, v in row.items() if k != "cycle"}, step=int(row["cycle"]), when=1.0)
    if cycles < 40:
        tracker.end("KILLED")
        return
    last = {f"evaluation/{k}": v for k, v in figures(frechet).items()}
    tracker.results(last, [folder / "report.html", folder / "result.json"], step=40, when=2.0)
    tracker.end("FINISHED")


def compare(capfd: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as info:
        main(["compare", *map(str, words)])
    out, err = capfd.readouterr()
    return int(info.value.code or 0), out, err


def test_a_sweep_on_a_server_is_compared_as_its_folder_would_be(
    server: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    code, out, err = compare(capfd, "ca-dm")
    assert code == 0, err
    rows = [[c.strip() for c in row.strip("|").split("|")] for row in out.splitlines() if row.startswith("|")]
    assert rows[0] == ["run", "state", "cycles", "frechet ↓", "coverage_entropy ↑", "guidance", "fake_updates"]
    assert [r[0] for r in rows[1:]] == ["0001", "0002", "0000", "0003", "teacher", "undistilled"]
    assert rows[1][1:] == ["finished *", "40", "30", "0.3", "3", "5"]
    assert rows[4][1] == "stopped"
    told = json.loads((tmp_path / "compare.json").read_text())
    assert told["runs"][0]["link"].startswith(f"{server.uri}/#/experiments/")
    assert [len(g["runs"]) for g in told["samples"]] == [3]
    fake_loss = told["curves"]["metrics"]["fake/loss"]["runs"]
    assert fake_loss["0"] == [[5, 10, 15, 20, 25, 30, 35, 40], [1 / c for c in range(5, 41, 5)]]
    assert fake_loss["3"][0] == [5, 10, 15, 20]


def test_a_sweeps_run_has_its_page_and_its_objectives(server: Any) -> None:
    reader = Reader(server.uri)
    assert reader.text(server.group, "compare.html") == "a page"
    assert reader.text(server.group, "nothing.html") is None
    [found] = reader.find("ca-dm")
    assert objectives_on(found) == {"frechet": "min", "coverage_entropy": "max"}


def test_many_runs_take_few_requests(server: Any) -> None:
    reader = Reader(server.uri)
    [found] = reader.find("sweep:ca-dm")
    runs = reader.runs_of(found)
    together = reader.histories(runs, (), most=500)
    metrics = {k for run in runs for k in run.data.metrics}
    assert together.requests == len(metrics)
    alone = Reader(server.uri)
    alone._bulk = lambda *_: (_ for _ in ()).throw(OSError("an older server"))  # type: ignore[method-assign]
    assert alone.histories(runs, (), most=500).points == together.points


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("twice", "2 things"),
        ("study", "say which: "),
        ("ca-dn", "did you mean 'ca-dm'?"),
        ("0" * 32, "no run, sweep or experiment"),
    ],
)
def test_names_that_are_nothing_or_several_things_are_refused(server: Any, name: str, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        gather([name], server.uri, lambda _: None)  # type: ignore[arg-type,return-value]


def test_an_experiment_holds_its_runs_but_not_the_run_above_its_sweep(server: Any) -> None:
    found = gather(["experiment:study"], server.uri, lambda _: None)  # type: ignore[arg-type,return-value]
    assert sorted(run.name for run in found.runs) == sorted(TRIALS)
    assert gather(["run:study"], server.uri, lambda _: None).runs[0].name == "study"  # type: ignore[arg-type,return-value]


def test_a_folder_with_the_name_of_a_sweep_is_asked_about(server: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path, "ca-dm", {}, 30.0)
    with pytest.raises(InputError, match=re.escape("write ./ca-dm for the one, or sweep:ca-dm for the other")):
        gather(["ca-dm"], server.uri, lambda _: None)  # type: ignore[arg-type,return-value]
    assert len(gather(["./ca-dm"], server.uri, lambda _: None).runs) == 1  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("silent", [False, True], ids=["refuses", "silent"])
def test_a_server_that_does_not_answer_is_given_up_on_soon(silent: bool) -> None:
    before = dict(os.environ)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        if silent:
            deaf.listen(8)
        port = deaf.getsockname()[1] if silent else free_port()
        begun = time.monotonic()
        with pytest.raises(InputError, match=r"does not answer: .*(refused|timed out)"):
            gather(["x"], f"http://127.0.0.1:{port}", lambda _: None)  # type: ignore[arg-type,return-value]
        assert time.monotonic() - begun < 25
    assert {k: v for k, v in os.environ.items() if "HTTP_REQUEST" in k} == {
        k: v for k, v in before.items() if "HTTP_REQUEST" in k
    }


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    binary()
    with browser() as opened:
        yield opened


def test_the_compare_page_shows_every_series_and_follows_the_mouse(
    server: Any, page: Page, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "compare.html"
    made = make_run(tmp_path, "evil", {"method.guidance": 9.0}, 70.0, prompts=[EVIL, "b"])
    made.rename(tmp_path / EVIL)
    words = [server.folder / "trials" / name for name in TRIALS]
    code, _, err = compare(capfd, *words, tmp_path / EVIL, "--html", file)
    assert code == 0, err
    page.faults.clear()
    page.open(file.as_uri())
    page.until("document.documentElement.dataset.ready === 'yes' && document.querySelector('#curves svg') !== null")
    names = [*TRIALS, EVIL]
    # Every run is in every part, with the points that were written.
    series = page.run(
        "[...document.querySelectorAll('#curves path.series')].map(p => [p.dataset.series, p.getAttribute('d')])"
    )
    assert sorted(name for name, _ in series) == sorted(names)
    assert {name: d.count("L") + 1 for name, d in series} == {n: 2 if n == EARLY else 4 for n in names}
    points = page.run("[...document.querySelectorAll('#front circle')].map(c => c.getAttribute('aria-label'))")
    assert "0001: frechet 30, coverage_entropy 0.3" in points
    assert len(points) == len(names)
    assert page.run("document.querySelectorAll('#parameters path.series').length") == len(names)
    own = "#runs tbody:not(.baselines) tr"
    table = page.run(f"[...document.querySelectorAll('{own}')].map(r => r.cells[0].innerText.split('\\n')[0])")
    assert [cell.removesuffix("front").strip() for cell in table] == ["0001", "0002", "0000", EVIL, "0003"]
    # Samples of one set of prompts together, the teacher first; another's by itself.
    sheets = page.run(
        "[...document.querySelectorAll('#samples .sheet')].map(s => [...s.querySelectorAll('tbody tr')]"
        ".map(r => r.querySelector('b').textContent))"
    )
    assert sheets == [["the teacher", "0001", "0002", "0000"], ["the teacher", EVIL]]
    page.until(LOADED)
    assert "too few runs to tell" in page.text().lower()
    # A run that is pointed at stands out everywhere; a click on a head sorts; a range on an axis keeps runs.
    x, y = page.run(
        "(() => { const r = document.querySelector('#runs tbody tr').getBoundingClientRect();"
        " return [r.left + 40, r.top + 8]; })()"
    )
    page.mouse("mouseMoved", x, y)
    page.until("document.querySelector('#curves path.series.hot') !== null")
    assert (
        page.run("[...document.querySelectorAll('path.series.hot')].map(p => p.ariaLabel.slice(0, 4))") == ["0001"] * 2
    )
    assert "frechet ↓ 30" in page.run("document.querySelector('#tip').innerText")
    page.mouse("mouseMoved", 5, 5)
    page.run("[...document.querySelectorAll('#runs thead button')].find(b => b.textContent === 'guidance').click()")
    first = page.run("document.querySelector('#runs tbody tr').innerText")
    assert first.startswith("0000")
    page.run("document.querySelector('#parameters').scrollIntoView()")
    x, top, bottom = page.run(
        "(() => { const r = document.querySelector('[data-axis=\"figure frechet\"]').getBoundingClientRect();"
        " return [r.left + 10, r.top, r.bottom]; })()"
    )
    page.mouse("mouseMoved", x, bottom - 1)
    page.mouse("mousePressed", x, bottom - 1)
    page.mouse("mouseMoved", x, (top + bottom) / 2)
    page.mouse("mouseReleased", x, (top + bottom) / 2)
    page.until("/ of 5 runs kept/.test(document.querySelector('#parameters .bar').innerText)")
    kept = page.run("[...document.querySelectorAll('#curves path.series:not(.dim)')].map(p => p.dataset.series)")
    assert "0001" in kept
    assert EVIL not in kept
    assert page.run("window.evil === undefined")
    for width, dark in ((1400, False), (800, False), (1400, True)):
        page.open(file.as_uri(), width=width, height=3000, dark=dark)
        page.until("document.querySelector('#curves svg') !== null")
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        assert overlapping(page) == []
    assert page.faults == []


def overlapping(page: Page) -> list[list[str]]:
    """Labels that lie upon each other, of those that are drawn beside axes, points and lines."""
    return list(page.run(OVERLAPPING))


def test_a_fault_on_a_page_is_seen(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "bad.html"
    file.write_text("<script>console.error('said'); undefined.nothing;</script>")
    page.faults.clear()
    page.open(file.as_uri())
    page.until("document.readyState === 'complete'")
    page.run("1")
    assert any("said" in f for f in page.faults)
    assert any("TypeError" in f for f in page.faults)
    page.faults.clear()


def test_mlflows_own_pages_show_the_sweep_its_trials_and_their_curves(server: Any, page: Page) -> None:
    reader = Reader(server.uri)
    [found] = reader.find("ca-dm")
    runs = {run.info.run_name: run for run in reader.runs_of(found)}
    experiment = runs["0001"].info.experiment_id
    page.open(f"{server.uri}/#/experiments/{experiment}/runs")
    page.until("/ca-dm/.test(document.body.innerText)")
    page.until(UNFOLD)  # trials are folded below the sweep's run
    page.until(f"{json.dumps(list(TRIALS))}.every(name => document.body.innerText.includes(name))")
    one = f"{server.uri}/#/experiments/{experiment}/runs/{runs['0001'].info.run_id}"
    page.open(one)
    page.until("['method.guidance', 'evaluation/frechet'].every(name => document.body.innerText.includes(name))")
    page.open(f"{one}/model-metrics", height=2000)
    page.until("document.body.innerText.includes('0001 (evaluation/frechet)')")
