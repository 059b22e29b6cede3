"""Stock schedulers that walk a student's times exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler

from raydmd.errors import InputError
from raydmd.process import VariancePreserving, euler_scheduler_for

if TYPE_CHECKING:
    from collections.abc import Mapping

    from raydmd.process import Prediction
    from raydmd.recipe_method import Method

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


def table_process(path: str, told: Mapping[str, Any]) -> tuple[VariancePreserving, Prediction]:
    """The noise process and the network's prediction, as the settings of a pipeline's table scheduler state them.

    Args:
        path: of the pipeline, for messages.
        told: the settings.

    Raises:
        InputError: if they state another kind of process or of network.
    """
    kind, schedule = told.get("prediction_type", "epsilon"), told.get("beta_schedule")
    where = f"model {path!r}: scheduler/scheduler_config.json says"
    if kind not in PREDICTIONS:
        raise InputError(
            f"{where} prediction_type={kind!r}, but a network of this pipeline predicts one of {', '.join(PREDICTIONS)}"
        )
    if schedule not in ("linear", "scaled_linear") or told.get("trained_betas"):
        raise InputError(f"{where} beta_schedule={schedule!r}, or gives its own betas; known are linear, scaled_linear")
    if told.get("rescale_betas_zero_snr"):
        raise InputError(f"{where} rescale_betas_zero_snr, which raydmd does not know")
    betas = float(told["beta_start"]), float(told["beta_end"])
    return VariancePreserving(*betas, schedule, int(told.get("num_train_timesteps", 1000))), PREDICTIONS[kind]


def check_table(path: str, process: VariancePreserving, method: Method) -> None:
    """Refuse a student's grid that no stock scheduler of a table walks.

    Raises:
        InputError: naming the key.
    """
    if method.shift != 1:
        raise InputError(
            f"method.shift={method.shift:g} does not fit {path!r}: its noise process is variance preserving, "
            "whose schedulers know no shift. Set method.shift=1"
        )
    if process.entries % method.steps:
        raise InputError(
            f"method.steps={method.steps} does not fit {path!r}: its {process.entries} times do not divide "
            f"into {method.steps} equal steps"
        )
