"""Stock schedulers that walk a student's times exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler

from raydmd.process import euler_scheduler_for

if TYPE_CHECKING:
    from raydmd.process import Prediction, VariancePreserving

FLOW_STEPS = 1000
"""What flow models' pipelines multiply times with before the network sees them."""
PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
"""A table scheduler's ``prediction_type``, in our words."""


def own_flow_scheduler(*, steps: int, shift: float, stochastic: bool) -> FlowMatchEulerDiscreteScheduler:
    """For flow pipelines that leave the spacing of times to their scheduler."""
    stretch, terminal = euler_scheduler_for(steps, shift, train_steps=FLOW_STEPS)
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=FLOW_STEPS, shift=stretch, shift_terminal=terminal, stochastic_sampling=stochastic
    )


def given_flow_scheduler(*, shift: float, stochastic: bool) -> FlowMatchEulerDiscreteScheduler:
    """For flow pipelines that hand their scheduler ``1, 1 - 1/N, ...``, which it then shifts."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=FLOW_STEPS, shift=shift, use_dynamic_shifting=False, stochastic_sampling=stochastic
    )


def table_scheduler(
    process: VariancePreserving, prediction: Prediction, *, steps: int, stochastic: bool
) -> DDIMScheduler | LCMScheduler:
    """For pipelines with a table of betas: ``1, 1 - 1/N, ...`` of it, by LCM's with fresh noise, else by DDIM's."""
    shared = {
        "num_train_timesteps": process.entries,
        "beta_start": process.beta_start,
        "beta_end": process.beta_end,
        "beta_schedule": process.schedule,
        "prediction_type": next(name for name, kind in PREDICTIONS.items() if kind == prediction),
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 1,  # has no part in these grids, but a pipeline complains about another value
    }
    if stochastic:
        return LCMScheduler(**shared, original_inference_steps=steps)
    return DDIMScheduler(**shared, timestep_spacing="trailing")
