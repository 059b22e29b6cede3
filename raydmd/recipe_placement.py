"""A recipe's ``placement`` section: where roles run, and on what."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from raydmd.recipe_types import Count, NonNegative, Positive, Section


class Placement(Section):
    """Where roles run."""

    workers: Count = 1
    sequence: Count = 1
    """Neighbouring workers that share each sample, its tokens split between them: sequence parallel, for long video."""
    teachers: Count = 1
    """Replicas of the teacher's pool. Runs with the same teacher share it: the largest number counts."""
    teachers_most: Annotated[int, Field(ge=0)] = 0
    """Replicas that the pool may grow to while its requests wait; 0: it stays at ``teachers``."""
    teacher_experts: Annotated[int, Field(ge=0)] = 0
    """Experts that each replica holds, of a teacher that has several: ones that are asked now; 0: all."""
    teacher_compile: Literal["default", "reduce-overhead", "max-autotune"] | None = None
    """``torch.compile``'s mode for the pool's teacher; ``reduce-overhead`` uses CUDA graphs. It loads longer."""
    teacher_quantize: Literal["int8", "float8"] | None = None
    """Weights of the pool's teacher, by torchao; the answers are no longer the unquantised teacher's."""
    teacher: Literal["remote", "local", "tied"] = "remote"
    """A pool; a copy in each worker; or one network in each worker whose adapters are student and fake score."""
    worker_cpus: Positive = 0.5
    teacher_cpus: Positive = 0.5
    worker_gpus: NonNegative = 0.0
    teacher_gpus: NonNegative = 0.0
    """Of each replica. Above 1 its networks are spread over them, block by block, for teachers that fit on no one."""
    rewards: Count = 1
    """Replicas of the reward models, where the method asks them (``method.adapt``)."""
    reward: Literal["remote", "local"] = "remote"
    reward_cpus: Positive = 0.5
    reward_gpus: NonNegative = 0.0
    samplers: Annotated[int, Field(ge=0)] = 0
    """Replicas that follow the student and draw the samples of fake updates, a cycle ahead; 0: each worker draws them
    itself, from the student as it is. The generator's update always does."""
    sampler_lag: Count = 1
    """Student updates between two versions of the weights that samplers follow; samples are at most so many updates
    old, which ``fake/age`` says."""
    sampler_cpus: Positive = 0.5
    sampler_gpus: NonNegative = 0.0
    worker_resources: dict[str, Positive] = Field(default_factory=dict)
    """Custom resources of the trainers' nodes, e.g. ``{trainer: 1}``."""
    teacher_resources: dict[str, Positive] = Field(default_factory=dict)
    wire: Literal["plasma", "nixl"] = "plasma"
    """How large tensors reach the pools: through Ray's object store, or by NIXL from GPU to GPU."""
    threads: Count = 1
    """CPU threads of each worker and replica."""
    batch_items: Count = 64
    """Samples a replica puts into one forward, counted before guidance doubles them."""
    batch_wait: NonNegative = 0.003
    """Seconds a replica waits for company before it runs a batch that is not full."""

    @model_validator(mode="after")
    def _nothing_is_idle(self) -> Self:
        for name in ("worker_gpus", "teacher_gpus", "reward_gpus", "sampler_gpus"):
            given = getattr(self, name)
            if given > 1 and given != int(given):
                raise ValueError(f"{name}={given:g}: Ray gives parts of one GPU, or whole ones")
        if self.teacher != "remote":
            idle: dict[str, Any] = {
                "teachers": 1,
                "teachers_most": 0,
                "teacher_experts": 0,
                "teacher_compile": None,
                "teacher_quantize": None,
                "teacher_gpus": 0.0,
                "teacher_resources": {},
            }
            given = {name: getattr(self, name) for name, unused in idle.items() if getattr(self, name) != unused}
            if given:
                raise ValueError(
                    f"{', '.join(f'{name}={value}' for name, value in given.items())} does nothing with "
                    f"teacher={self.teacher}, where each worker holds the teacher itself; set "
                    f"{', '.join(f'placement.{name}={idle[name]}' for name in given)} or placement.teacher=remote"
                )
        for key in ("worker_resources", "teacher_resources"):
            if wrong := {"CPU", "GPU", "memory"} & getattr(self, key).keys():
                raise ValueError(f"{key} are custom resources; {', '.join(sorted(wrong))} has keys of its own")
        if not self.samplers:
            for key in ("sampler_lag", "sampler_cpus", "sampler_gpus"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(
                        f"{key}={getattr(self, key)} does nothing without samplers; set placement.samplers"
                    )
        if self.samplers and self.sequence > 1:
            raise ValueError("samplers do not go with placement.sequence, whose workers share each sample")
        if self.teachers_most and self.teachers_most < self.teachers:
            raise ValueError(f"teachers_most={self.teachers_most} is below teachers={self.teachers}; 0 switches it off")
        return self
