"""A plan for people, and the same figures for machines. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from raydmd.planning.answer import nearest
from raydmd.planning.hardware import GIB, ON_PAPER
from raydmd.planning.search import top

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raydmd.planning.answer import Answer, PhasePlan
    from raydmd.planning.planner import Planner
    from raydmd.planning.simulate import Outcome

GB = 1e9


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text; columns but the first stand right."""
    widths = [max(len(row[k]) for row in (head, *rows)) for k in range(len(head))]
    lines = []
    for row in (head, ["-" * w for w in widths], *rows):
        cells = [c.ljust(w) if k == 0 else c.rjust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def gigabytes(size: float) -> str:
    """Bytes as GB, fine enough for small ones."""
    return f"{size / GB:.1f}" if size >= GB else f"{size / GB:.3f}"


def seconds(value: float) -> str:
    """Seconds, to three figures."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def operations(value: float) -> str:
    """Floating-point operations with their unit."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if value >= size:
            return f"{value / size:.3g} {unit}FLOP"
    return f"{value / 1e6:.3g} MFLOP"


def text(
    planner: Planner,
    answer: Answer,
    played: Sequence[Outcome],
    tops: Sequence[Answer],
    best: Answer | None,
    enough: Answer | None = None,
    *,
    source: str = ON_PAPER,
) -> str:
    """The whole plan.

    Args:
        planner: of the recipe.
        answer: for the placement that is looked at.
        played: its phases in the simulator.
        tops: the best of each placement on as many GPUs.
        best: of them, if any fits.
        enough: the best on a larger cluster, where none fits.
        source: where times come from.
    """
    r, h = planner.recipe, planner.hardware
    size = planner.networks.size(None)
    experts = planner.family.routing().experts
    parts = [
        f"{r.name}: {r.method.name} of {r.model.path}, {len(experts)} expert{'s' * (len(experts) > 1)} of "
        f"{size.parameters / 1e9:.3g} billion parameters, batch {r.training.batch}",
        f"on {answer.option.gpus} x {h.name}: {answer.option}; {source}",
        "",
        memory(planner, answer),
        "",
        cycle(planner, answer, played),
        "",
        placements(tops, reason(planner, tops, best, enough)),
    ]
    return "\n".join(parts)


def memory(planner: Planner, answer: Answer) -> str:
    """What a GPU holds in the phase that takes most, by role."""
    found, worst = [], answer.worst
    kinds = ("weights", "adapters", "gradients", "optimizer", "average")
    budget = worst.budget
    for role in dict.fromkeys(line.role for line in budget.lines):
        cells = [budget.of(role, kind) for kind in kinds]
        found.append([role, *(gigabytes(c) if c else "" for c in cells), gigabytes(sum(cells))])
    training = planner.recipe.training
    again = "computed again" if training.gradient_checkpointing else "kept"
    also = ", gradients" if answer.option.sharding == "fsdp" and "update" in budget.worst else ""
    found.append([f"{budget.worst}: activations ({again}){also}", *[""] * 5, gigabytes(budget.moments[budget.worst])])
    found.append(["a worker's GPU", *[""] * 5, gigabytes(budget.peak)])
    if worst.host:
        room = f" (of {gigabytes(answer.host_room)})" if answer.host_room else ""
        found.append([f"a worker's part of the node's memory{room}", *[""] * 5, gigabytes(worst.host)])
    if worst.pool:
        pool = max((p.pool for p in answer.phases if p.pool), key=lambda b: b.peak)
        found.append(["a teacher's GPU", gigabytes(pool.held), *[""] * 4, gigabytes(pool.peak)])
    which = f" (phase {answer.phases.index(worst) + 1}, the largest)" if len(answer.phases) > 1 else ""
    verdict = "fits" if answer.fits else "DOES NOT FIT"
    latent = planner.largest
    return (
        f"Memory of a GPU, GB of 1e9 bytes{which}, samples of {'x'.join(map(str, latent))}, "
        f"{planner.share(answer.option)} a worker\n"
        + table(["", *kinds, "together"], found)
        + f"\n  {verdict} into {gigabytes(answer.room)} GB: {gigabytes(planner.hardware.memory_gib * GIB)} GB less "
        f"{gigabytes(planner.hardware.reserved_gib * GIB)} for the driver, NCCL and gaps"
    )


def cycle(planner: Planner, answer: Answer, played: Sequence[Outcome]) -> str:
    """Forwards, operations, bytes, seconds, hours and cost."""
    rows, share = [], max(planner.share(answer.option), 1)
    for k, calls in enumerate(planner.phases):
        for role in ("student", "fake", "teacher"):
            forward, back = calls.total(role, "forward", "record"), calls.total(role, "backward")
            flops = share * (
                forward * flops_of(planner, answer, k, role)[0] + back * flops_of(planner, answer, k, role)[1]
            )
            rows.append([f"phase {k + 1} {role}", f"{forward:.3g}", f"{back:.3g}", operations(flops)])
    lines = [
        "A cycle of one worker: forward and backward passes for each sample, and operations",
        table(["", "forward", "backward", "operations"], rows),
        "",
        "Seconds of a cycle",
        table(
            [
                "",
                "rollout",
                "fake",
                "teacher wait",
                "generator",
                "cycle",
                "worker idle",
                "teachers idle",
                "of it exchange",
            ],
            [_times(k, p, o, answer) for k, (p, o) in enumerate(zip(answer.phases, played, strict=True))],
        ),
    ]
    p = answer.phases[0]
    wire = f"{p.wire / 1e6:.3g} MB between a worker and the pool, " if answer.option.placement == "remote" else ""
    lines.append(f"  bytes a cycle: {wire}{p.exchange.size / GB:.3g} GB from a worker to the others")
    cost = f", US$ {answer.cost:,.0f} at {planner.hardware.price:g} an hour" if planner.hardware.price else ""
    training = planner.recipe.training
    warm = f" and {training.fake_warmup} fake updates before them" if training.fake_warmup else ""
    lines.append(
        f"  {training.cycles} cycles{warm}: {answer.hours:.3g} hours, {answer.gpu_hours:.4g} GPU hours{cost}; "
        "without start, evaluation and export"
    )
    return "\n".join(lines)


def flops_of(planner: Planner, answer: Answer, phase: int, role: str) -> tuple[float, float]:
    """Operations of a role's forward and backward pass for one sample of the largest size."""
    settings = {"student": planner.recipe.training.student, "fake": planner.recipe.training.fake}.get(role)
    found = planner._cost(settings, 1, planner.largest, train=settings is not None, option=answer.option)
    return found.forward, found.backward


def placements(tops: Sequence[Answer], why: str) -> str:
    """The best of each placement, and why one of them is it."""
    rows = [
        [
            str(a.option),
            gigabytes(a.peak),
            gigabytes(a.pool_peak) if a.pool_peak else "",
            "yes" if a.fits else "no",
            seconds(a.seconds),
            f"{a.hours:.3g}",
            f"{a.gpu_hours:.4g}",
        ]
        for a in tops
    ]
    head = ["", "worker, GB", "teacher, GB", "fits", "cycle, s", "hours", "GPU hours"]
    return f"The same run, placed otherwise\n{table(head, rows)}\n  {why}"


def reason(planner: Planner, tops: Sequence[Answer], best: Answer | None, enough: Answer | None = None) -> str:
    """Why a placement is the best, in a sentence; without one what would help.

    Args:
        planner: of the recipe.
        tops: the best of each placement.
        best: of them, if any fits.
        enough: the best on a cluster that is large enough, where this one is not.
    """
    if best is None:
        least = nearest(tops)
        over = [("a worker", least.peak, _less_of_a_worker(planner, least))]
        over.append(("a teacher", least.pool_peak, _less_of_a_teacher(planner)))
        short = [
            f"{who} lacks {gigabytes(needed - least.room)} GB (less of it: {how})"
            for who, needed, how in over
            if needed > least.room
        ]
        if least.host_room and least.host > least.host_room:
            lacks = gigabytes(least.host - least.host_room)
            short.append(f"its node lacks {lacks} GB for each worker's activations (training.offload_activations)")
        more = f" On more GPUs: {enough.option}, {enough.hours:.3g} hours." if enough else ""
        return f"None fits here. Of {least.option}, the nearest, {' and '.join(short)}.{more}"
    by: dict[str, list[Answer]] = {}
    for answer in tops:
        by.setdefault(answer.option.placement, []).append(answer)
    said = []
    by.pop(best.option.placement)
    for name, answers in by.items():
        other = top(answers)
        if not other.fits:
            said.append(f"{name} needs {gigabytes(other.needs)} GB of {gigabytes(other.room)}")
        else:
            slower = other.hours / best.hours - 1
            if slower > 0.005:
                said.append(f"{name} takes {slower:.0%} longer")
            else:
                said.append(f"{name} is as fast on {other.option.gpus} GPUs, {gigabytes(other.peak)} GB of each")
    why = f": {'; '.join(said)}" if said else ", the only one that this recipe allows"
    ratio = ""
    if best.option.placement == "remote":
        groups = best.option.workers / best.option.sequence
        ratio = f" One teacher answers {groups / best.option.teachers:.3g} workers."
    return f"Best: {best.option}{why}.{ratio}"


def _less_of_a_worker(planner: Planner, answer: Answer) -> str:
    """What a recipe could still do for its workers' memory."""
    training = planner.recipe.training
    ways = []
    if not training.gradient_checkpointing:
        ways.append("training.gradient_checkpointing=true")
    if not training.offload_activations:
        ways.append("training.offload_activations=true")
    full = [name for name in ("student", "fake") if getattr(training, name).lora is None]
    if full:
        ways.append("adapters (" + " ".join(f"training.{name}.lora={{}}" for name in full) + ")")
    if planner.share(answer.option) > 1:
        ways.append("fewer samples for each (training.batch, placement.workers)")
    return ", ".join([*ways, "placement.sequence with more workers", "smaller samples"])


def _less_of_a_teacher(planner: Planner) -> str:
    """What a recipe could still do for its teachers' memory."""
    place = planner.recipe.placement
    ways = ["placement.batch_items=1"] if place.batch_items > 1 else []
    ways += [] if place.teacher_experts == 1 else ["placement.teacher_experts=1"]
    ways += ["placement.teacher_quantize=int8"] if place.teacher_quantize is None else []
    return ", ".join([*ways, f"placement.teacher_gpus={2 * max(1, round(place.teacher_gpus))}"])


def document(
    planner: Planner,
    answer: Answer,
    played: Sequence[Outcome],
    tops: Sequence[Answer],
    best: Answer | None,
    enough: Answer | None = None,
    *,
    source: str = ON_PAPER,
) -> dict[str, Any]:
    """The same figures as :func:`text`, for a machine."""
    return {
        "recipe": planner.recipe.name,
        "model": planner.recipe.model.path,
        "hardware": planner.hardware.model_dump(),
        "times": source,
        "measured_on": planner.measured.machine if planner.measured else None,
        "parameters": planner.networks.size(None).parameters,
        "plan": as_json(answer) | {"simulated": [vars(o) for o in played]},
        "placements": [as_json(a) for a in tops],
        "best": str(best.option) if best else None,
        "reason": reason(planner, tops, best, enough),
    }


def as_json(answer: Answer) -> dict[str, Any]:
    """One answer, for a machine."""
    return {
        "option": str(answer.option),
        "gpus": answer.option.gpus,
        "fits": answer.fits,
        "peak": answer.peak,
        "pool_peak": answer.pool_peak,
        "room": answer.room,
        "seconds": answer.seconds,
        "hours": answer.hours,
        "gpu_hours": answer.gpu_hours,
        "cost": answer.cost,
        "phases": [
            {
                "cycles": p.cycles,
                "memory": [vars(line) for line in p.budget.lines],
                "moments": p.budget.moments,
                "pool": p.pool.peak if p.pool else None,
                "host": p.host,
                "rollout": p.step.rollout,
                "fake": sum(p.step.fake_updates),
                "wait": p.wait,
                "generator": p.step.generator,
                "seconds": p.seconds,
                "wire": p.wire,
                "exchange": p.exchange.size,
            }
            for p in answer.phases
        ],
    }


def _times(k: int, p: PhasePlan, outcome: Outcome, answer: Answer) -> list[str]:
    idle = f"{outcome.replica_idle:.0%}" if answer.option.placement == "remote" else ""
    fake = math.fsum(p.step.fake_updates)
    parts = [p.step.rollout, fake, outcome.wait * outcome.step, p.step.generator, outcome.step]
    return [f"phase {k + 1}", *map(seconds, parts), f"{outcome.idle:.0%}", idle, seconds(p.step.exchange)]
