"""Whether a recipe's sections fit together: combinations that can't work, or would do nothing, are refused."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any

from raydmd.recipe_placement import Placement
from raydmd.recipe_types import ever_positive
from raydmd.redact import credentials, hidden

if TYPE_CHECKING:
    from collections.abc import Mapping

    from raydmd.recipe_checkpoints import Checkpoints
    from raydmd.recipe_data import Data
    from raydmd.recipe_evaluation import Evaluation
    from raydmd.recipe_gan import Gan
    from raydmd.recipe_method import Method
    from raydmd.recipe_monitor import Monitor
    from raydmd.recipe_training import Training

INSTEAD = (
    "MLflow takes it from MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN, PostgreSQL from "
    "PGPASSWORD or ~/.pgpass, Hugging Face from HF_TOKEN or `hf auth login`, S3 from AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY or ~/.aws"
)
"""Where secrets belong."""


def fit(
    training: Training,
    method: Method,
    placement: Placement,
    checkpoints: Checkpoints,
    evaluation: Evaluation,
    data: Data,
    monitor: Monitor,
    *,
    deterministic: bool,
) -> None:
    """See that a recipe's sections fit together.

    Raises:
        ValueError: naming the keys that do not, and what would.
    """
    _batch_divides(training, method, placement)
    phases = len(method.boundaries) + 1
    split = training.phase_split
    if split is not None and len(split) != phases:
        raise ValueError(f"training.phase_split has {len(split)} entries for {phases} phase(s)")
    if training.stall_timeout <= training.step_timeout:
        raise ValueError("training.stall_timeout must be more than training.step_timeout, which is told more exactly")
    if training.cycles < phases:
        raise ValueError(f"training.cycles={training.cycles} leaves some of {phases} phases none")
    _best_is_measured(checkpoints, evaluation)
    _activations_can_wait(training)
    _gan_can_train(method.gan, training)
    _fake_is_asked(method, training)
    _monitor_can_act(monitor, training, phases)
    _tied_are_adapters(placement, training)
    _rewards_are_asked(method, placement)
    _wire_is_used(method, placement)
    _sizes_can_differ(data, method)
    _samplers_are_asked(placement, training, deterministic=deterministic)


def no_secrets(tree: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse what lets somebody in: recipes lie in folders, reports, logs and MLflow."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            no_secrets(value, f"{key}.")
        for text in (str(name), *(value if isinstance(value, list | tuple) else (value,))):
            if isinstance(text, dict):
                no_secrets(text, f"{key}.")
            elif isinstance(text, str) and (what := credentials(text)):
                raise ValueError(f"{hidden(key)} holds {what}, and recipes are kept and shown: leave it out. {INSTEAD}")


def _batch_divides(training: Training, method: Method, placement: Placement) -> None:
    if placement.sequence > 1:
        _samples_are_shared(training, method, placement.sequence)
    for workers in range(placement.workers_least or placement.workers, placement.workers + 1):
        _batch_divides_over(workers, training, method, placement)


def _samples_are_shared(training: Training, method: Method, group: int) -> None:
    for key in ("gan", "regression"):
        if getattr(method, key):
            raise ValueError(f"placement.sequence={group} does not go with method.{key}, which needs samples apart")
    for role in ("student", "fake"):
        if (training.precision, training.sharding, getattr(training, role).lora) == ("bf16", "ddp", None):
            raise ValueError(
                f"placement.sequence={group} with bf16 over fp32 weights has attention compute again, backward, in "
                f"other dtypes than forward: set training.sharding=fsdp, or training.{role}.lora={{}}"
            )


def _batch_divides_over(workers: int, training: Training, method: Method, placement: Placement) -> None:
    over, group = f"placement.workers={workers}", placement.sequence
    if placement.workers_least:
        over = f"{workers} workers, which placement.workers_least={placement.workers_least} allows"
    if workers % group:
        raise ValueError(f"{over} does not divide into groups of placement.sequence={group}")
    shares = workers // group
    if group > 1:
        over = f"the {shares} groups of placement.sequence={group} in {over}"
    if training.batch % shares:
        raise ValueError(f"training.batch={training.batch} does not divide over {over}")
    if method.adapt and training.batch // shares % method.adapt.group:
        raise ValueError(
            f"method.adapt.group={method.adapt.group} does not divide the {training.batch // shares} samples that each "
            f"of {over} has of training.batch={training.batch}"
        )
    pairs = method.regression and method.regression.batch
    if pairs and pairs % workers:
        raise ValueError(f"method.regression.batch={pairs} does not divide over {over}")


def _best_is_measured(checkpoints: Checkpoints, evaluation: Evaluation) -> None:
    if checkpoints.best is not None and (not evaluation.every or evaluation.every % checkpoints.every):
        raise ValueError(
            f"checkpoints.best={checkpoints.best} needs evaluations of what has a checkpoint: set evaluation.every "
            f"to a multiple of checkpoints.every={checkpoints.every}"
        )


def _activations_can_wait(training: Training) -> None:
    if training.offload_activations and not training.gradient_checkpointing:
        raise ValueError(
            "training.offload_activations=true without training.gradient_checkpointing=true would send every "
            "intermediate result to the host and back; set both"
        )


def _gan_can_train(gan: Gan | None, training: Training) -> None:
    if gan is None:
        return
    if not training.fake_updates:
        raise ValueError("method.gan needs training.fake_updates: its discriminator learns in the fake score's updates")
    sharded = "sharding=fsdp" if training.sharding == "fsdp" else None
    obstacle = "gradient_checkpointing" if training.gradient_checkpointing else sharded
    if obstacle and gan.r1 and gan.r1.kind == "exact":
        raise ValueError(
            f"method.gan.r1.kind=exact differentiates twice, which training.{obstacle} does not allow; "
            "use kind=approximate"
        )


def _fake_is_asked(method: Method, training: Training) -> None:
    if method.gan or method.decouple is None or ever_positive(method.decouple.match):
        return
    for key in ("fake_updates", "fake_warmup"):
        if getattr(training, key):
            raise ValueError(
                f"training.{key}={getattr(training, key)} does nothing with method.decouple.match=0, which never asks "
                f"the fake score; set training.{key}=0"
            )


def _monitor_can_act(m: Monitor, training: Training, phases: int) -> None:
    if m.action == "warn":
        return
    split = training.phase_split or (1.0,) * phases
    longest = ceil(training.cycles * max(split) / sum(split))
    if longest < m.settle + m.patience:
        raise ValueError(
            f"monitor.action={m.action} can't happen: the longest phase has {longest} cycles and no alarm comes before "
            f"{m.settle + m.patience} cycles of one (monitor.settle + monitor.patience)"
        )
    if m.action == "raise_ratio" and not training.fake_updates:
        raise ValueError("monitor.action=raise_ratio does nothing with training.fake_updates=0")


def _tied_are_adapters(placement: Placement, training: Training) -> None:
    full = [role for role in ("student", "fake") if getattr(training, role).lora is None]
    if placement.teacher == "tied" and full:
        raise ValueError(
            "placement.teacher=tied holds student, fake score and teacher in one frozen network, so that both must be "
            f"adapters on it: set {' and '.join(f'training.{role}.lora={{}}' for role in full)}, or "
            "placement.teacher=local"
        )


def _rewards_are_asked(method: Method, placement: Placement) -> None:
    for key in ("rewards", "reward", "reward_cpus", "reward_gpus"):
        if method.adapt is None and getattr(placement, key) != Placement.model_fields[key].default:
            raise ValueError(f"placement.{key} does nothing without method.adapt, which asks the rewards")


def _wire_is_used(method: Method, p: Placement) -> None:
    if p.wire != "plasma" and p.teacher != "remote" and not p.samplers and not (method.adapt and p.reward == "remote"):
        raise ValueError(f"placement.wire={p.wire} does nothing with teacher={p.teacher}, where nothing goes to a pool")


def _samplers_are_asked(placement: Placement, training: Training, *, deterministic: bool) -> None:
    if not placement.samplers:
        return
    if not training.fake_updates:
        raise ValueError("placement.samplers does nothing with training.fake_updates=0")
    if training.sample_log:
        raise ValueError("training.sample_log does not see what placement.samplers draw; set one of them off")
    if deterministic:
        raise ValueError(
            "placement.samplers does not go with deterministic=true: after a resume, samples are of another age"
        )


def _sizes_can_differ(data: Data, method: Method) -> None:
    if not data.sizes:
        return
    for key, what in (("gan", "real samples"), ("regression", "noise-image pairs")):
        if getattr(method, key):
            raise ValueError(
                f"data.sizes does not fit method.{key}, whose {what} are of the model's one size; set data.sizes=[] or "
                f"method.{key}=null"
            )
    if method.adapt and any(reward.kind == "zoo" for reward in method.adapt.rewards):
        raise ValueError(
            "data.sizes does not fit method.adapt.rewards of kind zoo, whose judge knows one size; set data.sizes=[] "
            "or take another kind"
        )
