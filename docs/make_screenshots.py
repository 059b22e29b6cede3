"""Make every picture of README and docs that a run makes: python -m docs.make_screenshots (or: make screenshots).

Runs the gallery's scripts, looks at the pools with `raydmd top` while the first one trains, and takes pictures of the
pages they leave in a headless Chromium (`apt-get install chromium`). Finished runs in ``--output`` are not repeated.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from tests.browser import browser

if TYPE_CHECKING:
    from tests.browser import Page

HERE = Path(__file__).parent
GALLERY, PICTURES = HERE / "gallery", HERE / "pictures"
COLUMNS = 96
"""Of the terminal."""
CYCLE = 20
"""From which on the pools have something to show."""
LIMIT = 1800.0
"""Seconds for each script."""
DRAWN = "document.documentElement.dataset.ready === 'yes' && document.querySelector('#curves svg') !== null"
TRAINS = re.compile(r".*raydmd top --address (\S+)(?:.*\ncycle (\d+)/)", re.S)
"""The last run's address, and the cycle that it has come to."""


def main() -> None:
    """Run, and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/gallery"), help="the runs go here")
    output = parser.parse_args().output.absolute()
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="raydmd-shots-") as scratch:
        terminal = ""
        for script in ("distil_and_sample.py", "compare_methods.py", "serve_teacher_and_rewards.py"):
            words = [sys.executable, str(GALLERY / script), "--output", str(output)]
            terminal = watched(words, Path(scratch) / f"{script}.log", look=not terminal) or terminal
        with browser() as page:
            if terminal:
                file = Path(scratch) / "top.html"
                width, height = drawn(terminal, file)
                page.open(file.as_uri(), width=width, height=height)
                page.picture(PICTURES / "top.png")
            shot(page, output / "gallery-distil" / "report.html", PICTURES / "report.png", before="Facts")
            shot(page, output / "gallery-compare.html", PICTURES / "compare.png", before="Parameters", ready=DRAWN)
    print(f"pictures in {PICTURES} and {GALLERY}")


def watched(words: list[str], log: Path, *, look: bool) -> str:
    """Run a script; what `raydmd top` shows of its pools while it trains, empty if it does not train."""
    shown = ""
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + LIMIT
        try:
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(1.0)
                said = log.read_text(encoding="utf-8")
                if look and not shown and (trains := TRAINS.search(said)) and int(trains[2]) >= CYCLE:
                    shown = top(trains[1])
        finally:
            if process.poll() is None:
                process.terminate()
            code = process.wait(timeout=120)
    if code:
        raise SystemExit(f"{' '.join(words)} ended with {code}:\n{log.read_text(encoding='utf-8')[-3000:]}")
    return shown


def top(address: str) -> str:
    """What the command prints, with its colours; empty if it could not join yet, which it says why."""
    words = [sys.executable, "-m", "raydmd", "top", "--address", address, "--once"]
    wide = os.environ | {"COLUMNS": str(COLUMNS), "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    done = subprocess.run(words, env=wide, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        print(done.stderr, file=sys.stderr, flush=True)
    return "" if done.returncode else done.stdout


def drawn(terminal: str, file: Path) -> tuple[int, int]:
    """Write what a terminal showed as a page of one SVG; its size in pixels."""
    console = Console(record=True, width=COLUMNS, file=StringIO(), force_terminal=True)
    console.print(Text.from_ansi(terminal.rstrip()), soft_wrap=True)
    # Without its fonts, which it would fetch from a network, and show nothing in the meantime.
    svg = re.sub(r"@font-face \{.*?\}", "", console.export_svg(title="raydmd top"), flags=re.S)
    file.write_text(f'<!doctype html><meta charset="utf-8"><body style="margin:0">{svg}</body>', encoding="utf-8")
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert box, "rich writes a viewBox"
    return round(float(box[1])), round(float(box[2]))


def shot(page: Page, file: Path, picture: Path, *, before: str, ready: str = "document.body !== null") -> None:
    """A picture of a page, from its top to a heading; faults of the page are ours."""
    page.faults.clear()
    page.open(file.as_uri(), width=1280)
    page.until(ready)
    place = f"[...document.querySelectorAll('h2')].find(h => h.innerText === '{before}').getBoundingClientRect().top"
    page.size(1280, int(page.run(place)) - 20)
    time.sleep(1.0)  # it is drawn anew
    page.picture(picture)
    if page.faults:
        raise SystemExit(f"{file} has faults: {page.faults}")


if __name__ == "__main__":
    main()
