"""From a finished run's checkpoint to what a user takes away: a stock pipeline, and adapters where there are any."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors.torch import load_file

from raydmd import __version__
from raydmd.errors import RunFailed
from raydmd.methods.phases import split_grid
from raydmd.methods.presets import source_expert, student_routing
from raydmd.models.base import Denoiser, Experts
from raydmd.models.hollow import cast
from raydmd.process import step_grid
from raydmd.training.checkpoint import STUDENT
from raydmd.training.roles import ADAPTER, adapter_weights, add_adapter, own_parameters

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from raydmd.methods.rollout import Solver
    from raydmd.models.family import Family
    from raydmd.recipe import Recipe


PIPELINE, CARD = "pipeline", "README.md"
"""In a run's folder, and in an exported pipeline's: the model card."""


def load_student(recipe: Recipe, family: Family, folder: Path, *, unfinished: bool = False) -> dict[str, Denoiser]:
    """The student's experts from a final checkpoint, with their adapters if they have any; fp32, on the CPU.

    Args:
        recipe: the run.
        family: its pipeline.
        folder: of the checkpoint.
        unfinished: experts that no phase has come to yet are as they start.

    Raises:
        RunFailed: if it holds other weights.
    """
    lora = recipe.training.student.lora
    files = {file.stem: file for file in sorted((folder / STUDENT).glob("*.safetensors"))}
    later = student_routing(recipe.method, family.routing()).experts if unfinished and recipe.method.boundaries else ()
    found = {}
    for expert in dict.fromkeys((*files, *later)):
        source = source_expert(recipe.method, family.routing(), expert)
        denoiser = family.denoiser(source, dtype=torch.float32)
        if lora is not None:
            add_adapter(denoiser, lora, seed=recipe.seed)
        if expert in files:
            fill(denoiser, files[expert])
        found[expert] = denoiser.eval().requires_grad_(False)
    return found


def fill(denoiser: Denoiser, file: Path) -> None:
    """Copy what a role has written of an expert into it.

    Raises:
        RunFailed: if the file holds other weights.
    """
    state, wanted = load_file(file), own_parameters(denoiser)
    if wanted.keys() != state.keys():
        differ = sorted(wanted.keys() ^ state.keys())[:3]
        raise RunFailed(f"{file} does not hold this student's weights: {differ} differ")
    with torch.no_grad():
        for name, p in wanted.items():
            p.copy_(state[name])


def lower(recipe: Recipe, denoisers: Mapping[str, nn.Module], device: torch.device) -> None:
    """Cast a finished student to the precision it was trained to run in, on a device that computes in it."""
    if device.type == "cuda" and recipe.training.precision == "bf16":
        for denoiser in denoisers.values():
            cast(denoiser.network, torch.bfloat16)


def student_experts(recipe: Recipe, family: Family, denoisers: Mapping[str, Denoiser]) -> Experts:
    """The student behind one door."""
    return Experts(
        denoisers,
        student_routing(recipe.method, family.routing()),
        family.process,
        family.prediction,
    )


def export(recipe: Recipe, family: Family, denoisers: Mapping[str, Denoiser], folder: Path) -> list[Path]:
    """Write ``pipeline`` (a stock diffusers folder) and, for adapters, ``lora``.

    Returns:
        What was written.
    """
    written = []
    lora = recipe.training.student.lora
    if lora is not None:
        metadata: dict[str, dict[str, Any]] = {
            e: {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": sorted(lora.targets or d.lora_targets)}
            for e, d in denoisers.items()
        }
        family.export_lora(folder / "lora", {e: adapter_weights(d) for e, d in denoisers.items()}, metadata)
        written.append(folder / "lora")
        for denoiser in denoisers.values():
            denoiser.network.fuse_lora(adapter_names=[ADAPTER])
            denoiser.network.unload_lora()
    routing = student_routing(recipe.method, family.routing())
    pipeline = folder / PIPELINE
    family.export(
        pipeline,
        {e: d.network for e, d in denoisers.items()},
        steps=recipe.method.steps,
        shift=recipe.method.shift,
        boundaries=routing.boundaries,
        stochastic=solver(recipe) == "renoise",
    )
    (pipeline / CARD).write_text(_card(recipe, family, denoisers), encoding="utf-8")
    written.append(pipeline)
    for path in written:
        readable(path)
    return written


def add_results(pipeline: Path, table: str) -> None:
    """Put an evaluation's table into an exported pipeline's model card."""
    with (pipeline / CARD).open("a", encoding="utf-8") as card:
        card.write(f"\n## Results\n\nMeasured by raydmd when it was made, on the same seeds:\n\n```\n{table}\n```\n")


def readable(path: Path) -> None:
    """Give files the permissions that any program's would have: safetensors keeps its own to their owner."""
    mask = os.umask(0)
    os.umask(mask)
    for file in (path, *path.rglob("*")):
        if file.is_file():
            file.chmod(0o666 & ~mask)


def solver(recipe: Recipe) -> Solver:
    """How the student was rolled out, and so how it is sampled."""
    return recipe.method.solver


def _card(recipe: Recipe, family: Family, denoisers: Mapping[str, Denoiser]) -> str:
    m, held = recipe.method, family.experts_held()
    starts = [part.start for part in split_grid(step_grid(m.steps, m.shift), m.boundaries)]
    begins = dict(zip(student_routing(m, family.routing()).experts, starts, strict=False)) if m.boundaries else {}
    beside = {expert: step for expert, step in begins.items() if expert not in held}
    kind = type(next(iter(denoisers.values())).network).__name__
    # What was trained, and nothing of where: an address of a tracking server may hold a password.
    shown = yaml.safe_dump(recipe.model_dump(mode="json", include={"seed", "method", "training"}), sort_keys=False)
    # A hub id is worth naming whole; a folder of this machine is not.
    base = Path(recipe.model.path).name if Path(recipe.model.path).exists() else recipe.model.path
    fused = ", ".join(f"`{Path(file).name}` into its {part}" for part, file in recipe.model.lora.items())
    with_lora = (
        f"\nThe teacher had LoRA files fused: {fused}. Adapters exported beside presuppose them.\n" if fused else ""
    )
    return f"""---
library_name: diffusers
base_model: {base}
---
# {recipe.name}

A {recipe.method.steps}-step student of `{base}`, distilled with
`{recipe.method.name}` by raydmd {__version__}. Sample it without guidance, with exactly
{recipe.method.steps} steps: the scheduler in this folder walks the student's own times.
{with_lora}
```python
{family.usage(steps=m.steps, beside=beside, kind=kind)}
```

<details><summary>Recipe</summary>

```yaml
{shown}```

</details>
"""
