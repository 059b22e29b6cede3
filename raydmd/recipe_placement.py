"""A recipe's ``placement`` section: where roles run, and on what."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from raydmd.recipe_types import Count, NonNegative, Positive, Section


class Placement(Section):
    """Where roles run."""

    workers: Count = 1
    """Training workers, which share ``training.batch``."""
    workers_least: Annotated[int, Field(ge=0)] = 0
    """Workers that a run goes on with while there is no room for ``workers``; 0: it waits until there is."""
    resize_every: Positive = 60.0
    """Seconds between looks for room for more workers. To take them in, a run goes on from its last checkpoint."""
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
    room_timeout: Positive = 1800.0
    """Seconds that a run waits for room for its workers again, after a node has gone."""
    autoscaled: bool = False
    """Whether Ray's autoscaler may bring nodes that a run lacks: it is asked for them, and waited for just as long."""
    worker_cpus: Positive = 0.5
    """Of each worker, as Ray counts them; ``threads`` is what it uses."""
    teacher_cpus: Positive = 0.5
    """Of each replica."""
    worker_gpus: NonNegative = 0.0
    """Of each worker; parts of one, or whole ones."""
    teacher_gpus: NonNegative = 0.0
    """Of each replica. Above 1 its networks are spread over them, block by block, for teachers that fit on no one."""
    rewards: Count = 1
    """Replicas of the reward models, where the method asks them (``method.adapt``)."""
    reward: Literal["remote", "local"] = "remote"
    """A pool, or a copy in each worker."""
    reward_cpus: Positive = 0.5
    """Of each replica."""
    reward_gpus: NonNegative = 0.0
    """Of each replica."""
    samplers: Annotated[int, Field(ge=0)] = 0
    """Replicas that follow the student and draw the samples of fake updates, a cycle ahead; 0: each worker draws them
    itself, from the student as it is. The generator's update always does."""
    sampler_lag: Count = 1
    """Student updates between two versions of the weights that samplers follow; samples are at most so many updates
    old, which ``fake/age`` says."""
    sampler_cpus: Positive = 0.5
    """Of each replica."""
    sampler_gpus: NonNegative = 0.0
    """Of each replica."""
    worker_resources: dict[str, Positive] = Field(default_factory=dict)
    """Custom resources of the trainers' nodes, e.g. ``{trainer: 1}``."""
    teacher_resources: dict[str, Positive] = Field(default_factory=dict)
    """Custom resources of the teacher's nodes."""
    reward_resources: dict[str, Positive] = Field(default_factory=dict)
    """Custom resources of the nodes of the rewards."""
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
        if self.reward != "remote" and self.reward_resources:
            raise ValueError(
                f"reward_resources={self.reward_resources} does nothing with reward={self.reward}, where each worker "
                "holds the rewards itself; set placement.reward_resources={} or placement.reward=remote"
            )
        for key in ("worker_resources", "teacher_resources", "reward_resources"):
            if wrong := {"CPU", "GPU", "memory"} & getattr(self, key).keys():
                raise ValueError(f"{key} are custom resources; {', '.join(sorted(wrong))} has keys of its own")
        if not self.samplers:
            for key in ("sampler_lag", "sampler_cpus", "sampler_gpus"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(
                        f"{key}={getattr(self, key)} does nothing without samplers; set placement.samplers"
                    )
        self._can_shrink()
        if self.samplers and self.sequence > 1:
            raise ValueError("samplers do not go with placement.sequence, whose workers share each sample")
        if self.teachers_most and self.teachers_most < self.teachers:
            raise ValueError(f"teachers_most={self.teachers_most} is below teachers={self.teachers}; 0 switches it off")
        return self

    def _can_shrink(self) -> None:
        if not self.workers_least:
            if self.resize_every != type(self).model_fields["resize_every"].default:
                raise ValueError(
                    f"resize_every={self.resize_every:g} does nothing with a fixed number of workers; set "
                    "placement.workers_least"
                )
            return
        if self.workers_least >= self.workers:
            raise ValueError(
                f"workers_least={self.workers_least} is no less than workers={self.workers}; 0 switches it off"
            )
        shared = sorted(self.worker_resources.keys() & self.teacher_resources.keys())
        if not self.worker_resources or shared:
            why = f"{', '.join(shared)} is of teacher_resources too" if shared else "there are none"
            raise ValueError(
                f"workers_least={self.workers_least} needs placement.worker_resources of the workers' own, and {why}. "
                "Ray Train counts what nodes have, not what is free on them: beside a teacher it would for ever start "
                "more workers than there is room for. Start the trainers' nodes with a resource of their own (ray "
                "start --resources='{\"trainer\": 1}') and set placement.worker_resources={trainer: 1}"
            )
