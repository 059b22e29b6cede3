"""Python that samples an exported student with stock diffusers, for its model card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def usage(
    pipeline: str,
    network: str,
    asked: str,
    call: Mapping[str, Any],
    absent: Sequence[str],
    *,
    steps: int,
    beside: Mapping[str, int] | None,
    kind: str,
) -> str:
    """The code.

    Args:
        pipeline: diffusers' class.
        network: what it calls its denoiser.
        asked: its prompt, or what stands for one.
        call: what it is called with beside that.
        absent: parts that it must be told are not there.
        steps: of the student.
        beside: experts that the pipeline has no place for, and the step that each begins with.
        kind: diffusers' class of the experts.
    """
    lines = "\n".join(f"    {key}={value!r}," for key, value in call.items())
    result, end = ("frames = pipe(", ").frames") if "num_frames" in call else ("image = pipe(", ").images[0]")
    parts = "".join(f", {part}=None" for part in absent)
    start = f'pipe = {pipeline}.from_pretrained("this/folder"{parts})'
    if not beside:
        return f"from diffusers import {pipeline}\n\n{start}\n{result}\n    {asked},\n{lines}\n{end}"
    others = "\n".join(
        f'    {step}: {kind}.from_pretrained("this/folder", subfolder="{expert}"),' for expert, step in beside.items()
    )
    return f"""from diffusers import {kind}, {pipeline}

{start}
experts = {{
    0: pipe.{network},
{others}
}}

def take_turns(pipe, step, time, values):  # after the last step it is the first one's turn again
    pipe.{network} = experts.get((step + 1) % {steps}, pipe.{network}).to(pipe.device)
    return values

{result}
    {asked},
{lines}
    callback_on_step_end=take_turns,
{end}"""
