"""From facts to the table that people read, and the JSON that machines do."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from raydmd.doctor import cluster_checks, node_checks
from raydmd.errors import DONE, FAILED

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from raydmd.doctor.facts import Facts, Finding, Level

CHECKS: tuple[Callable[[Facts], list[Finding]], ...] = (
    cluster_checks.check_joined,
    node_checks.check_answers,
    cluster_checks.check_versions,
    cluster_checks.check_token,
    node_checks.check_gpus,
    node_checks.check_hostnames,
    cluster_checks.check_links,
    cluster_checks.check_clocks,
    node_checks.check_memory,
    node_checks.check_object_store,
    node_checks.check_disk,
    node_checks.check_files,
    node_checks.check_storage,
    node_checks.check_inputs,
    node_checks.check_checkpoints,
    cluster_checks.check_tracking,
    cluster_checks.check_dashboard,
    node_checks.check_metrics,
    cluster_checks.check_services,
    cluster_checks.check_room,
)
"""In the order of the table: what is the cause of others comes before them."""
SIGNS: dict[Level, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "warn": ("look", "yellow"),
    "bad": ("BAD", "bold red"),
    "skipped": ("-", "dim"),
}


def examine(facts: Facts) -> list[Finding]:
    """All that follows from facts, in the order of the table; what is the same on several nodes is one line."""
    found = [finding for check in CHECKS for finding in check(facts)]
    where: dict[Finding, list[str]] = {}
    for finding in found:
        where.setdefault(dataclasses.replace(finding, where=""), []).append(finding.where)
    return [dataclasses.replace(finding, where=", ".join(filter(None, those))) for finding, those in where.items()]


def verdict(findings: Sequence[Finding]) -> int:
    """The exit code: ``FAILED`` where anything is bad."""
    return FAILED if any(f.level == "bad" for f in findings) else DONE


def show(facts: Facts, findings: Sequence[Finding], *, as_json: bool) -> None:
    """Print a table, and below it what to do; or JSON with the facts too.

    Args:
        facts: that were found.
        findings: that follow.
        as_json: for machines.
    """
    if as_json:
        rows = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps({"findings": rows, "facts": dataclasses.asdict(facts)}, indent=1, default=str))
        return
    console = Console(highlight=False)
    console.print(table(findings))
    bad = [f for f in findings if f.level == "bad"]
    looks = sum(f.level == "warn" for f in findings)
    if bad:
        console.print(f"{len(bad)} bad, {looks} to look at; a run would fail, now or later")
    else:
        console.print(f"nothing bad, {looks} to look at")


def table(findings: Sequence[Finding]) -> Table:
    """A row for each finding, with its cure below."""
    shown = Table(pad_edge=False, box=None)
    for title in ("", "check", "where"):
        shown.add_column(title, no_wrap=title != "where", overflow="fold")
    shown.add_column("what is there, and what to do", overflow="fold", ratio=1)
    for finding in findings:
        sign, style = SIGNS[finding.level]
        text = Text(finding.said)
        if finding.cure:
            text.append(f"\n-> {finding.cure}", style="dim" if finding.level != "bad" else "")
        shown.add_row(Text(sign, style=style), Text(finding.check), Text(finding.where), text)
    return shown
