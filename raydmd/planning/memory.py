"""What a GPU holds at the peak of a cycle, by role. Pure: from sizes of networks and costs of their passes.

It follows what :mod:`raydmd.training` allocates. Full roles have fp32 masters, gradients and both of Adam's moments,
the student's moving average is fp32 too; a role of adapters has all that for its adapters and a frozen base in the
precision of the forward pass. FSDP splits parameters, gradients and optimizer over all workers and gathers one block
after the other; DDP keeps gradients in its buckets; a single process frees them after each update. A local teacher is
whole on every worker, whatever the sharding. The student's recorded forward pass stays while the fake score trains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from raydmd.planning.network import Network
    from raydmd.planning.trace import Passes

Placement = Literal["tied", "local", "remote"]
Sharding = Literal["single", "ddp", "fsdp"]
FP32 = 4.0
ADAM = 2 * FP32
AHEAD = 2
"""Blocks that FSDP has gathered at once: the one that is used, and the next one."""


@dataclass(frozen=True, kw_only=True)
class RoleSize:
    """A role in one phase.

    Attributes:
        network: of each of its experts.
        experts: that it holds.
        trained: of them.
        full: whether all parameters train, instead of adapters.
        average: whether it has a moving average.
        heads: parameters of a discriminator's heads.
        passes: of one expert, for a worker's share of the batch.
    """

    network: Network
    experts: int
    trained: int
    full: bool
    average: bool
    heads: int = 0
    passes: Passes

    @property
    def learnt(self) -> float:
        """Parameters that train."""
        each = self.network.parameters - self.network.idle if self.full else self.network.adapters
        return self.trained * each + self.heads


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where roles are and how they are split.

    Attributes:
        placement: of the teacher.
        sharding: of what trains; ``single`` is one process.
        workers: that share it.
        compute: bytes of a value in a forward pass.
    """

    placement: Placement
    sharding: Sharding
    workers: int
    compute: float


@dataclass(frozen=True)
class Line:
    """Bytes of one kind.

    Attributes:
        role: whose.
        what: they are.
        size: how many.
    """

    role: str
    what: str
    size: float


@dataclass(frozen=True)
class Budget:
    """What a worker holds.

    Attributes:
        lines: of what is always there.
        moments: bytes beside that, by moment of the cycle.
    """

    lines: tuple[Line, ...]
    moments: dict[str, float]

    @property
    def held(self) -> float:
        """Bytes that are always there."""
        return sum(line.size for line in self.lines)

    @property
    def worst(self) -> str:
        """The moment that takes most."""
        return max(self.moments, key=lambda k: self.moments[k])

    @property
    def peak(self) -> float:
        """Bytes at most."""
        return self.held + self.moments[self.worst]

    def of(self, role: str, what: str | None = None) -> float:
        """Bytes of a role, all or of one kind."""
        return sum(line.size for line in self.lines if line.role == role and what in (None, line.what))


def trainer(
    student: RoleSize,
    fake: RoleSize,
    teacher: Passes,
    *,
    setting: Setting,
    teacher_experts: int,
    adapters: int,
    held: float,
    fake_rows: float,
) -> Budget:
    """What a training worker holds in one phase.

    Args:
        student: as it is in that phase.
        fake: as it is.
        teacher: cost of its passes, for a worker's share of the batch, guidance not counted.
        setting: where and how.
        teacher_experts: that the teacher has.
        adapters: that a tied network has, over all experts and both roles.
        held: the student's recorded passes that wait at once.
        fake_rows: rows of a fake update's recorded passes, in shares of the batch.
    """
    split = setting.workers if setting.sharding == "fsdp" else 1
    lines: list[Line] = []
    tied = setting.placement == "tied"
    for name, role in (("student", student), ("fake", fake)):
        net = role.network
        if not tied:
            weights = role.experts * (FP32 * net.parameters if role.full else net.stored(setting.compute))
            lines.append(Line(name, "weights", weights / split))
            if not role.full:
                lines.append(Line(name, "adapters", FP32 * role.experts * net.adapters / split))
        if role.heads:
            lines.append(Line("discriminator", "weights", FP32 * role.heads / split))
        lines.append(Line(name, "optimizer", ADAM * role.learnt / split))
        if role.average:
            lines.append(Line(name, "average", FP32 * role.learnt / split))
        if setting.sharding == "ddp":  # in its buckets; FSDP's shards are there in their own update alone
            lines.append(Line(name, "gradients", FP32 * role.learnt / split))
    base = teacher_experts * student.network.stored(setting.compute)
    if tied:
        lines.append(Line("all roles", "weights", base / split))
        lines.append(Line("all roles", "adapters", FP32 * adapters * student.network.adapters / split))
    elif setting.placement == "local":
        lines.append(Line("teacher", "weights", base))

    waiting = held * student.passes.kept
    whole = setting.sharding == "single"

    def back(role: RoleSize) -> float:
        if whole:
            return role.passes.whole
        gradients = FP32 * role.learnt / split if setting.sharding == "fsdp" else 0.0
        return role.passes.peak + gathered(role, setting, backward=True) + gradients

    moments = {
        "student's rollout": waiting - student.passes.kept + student.passes.recording + gathered(student, setting),
        "fake score's update": waiting + back(fake) + (fake_rows - 1) * fake.passes.kept,
        "student's update": waiting - student.passes.kept + back(student),
    }
    if setting.placement != "remote":
        sharded = gathered(student, setting) if tied else 0.0
        moments["teacher's answer"] = waiting + 2 * teacher.transient + sharded
    return Budget(tuple(lines), moments)


def gathered(role: RoleSize, setting: Setting, *, backward: bool = False) -> float:
    """Bytes that FSDP has together beside its shards, in a forward or a backward pass."""
    if setting.sharding != "fsdp" or setting.workers == 1:
        return 0.0
    net = role.network
    together = setting.compute * (net.root + AHEAD * net.unit)
    if not role.full:  # adapters are gathered in fp32
        share = net.adapters / max(net.units - 1, 1)
        return together + FP32 * share * (2 * AHEAD if backward else AHEAD)
    return together + backward * (setting.compute + FP32) * net.unit  # a gradient, and its fp32 copy to be reduced


def replica(network: Network, passes: Passes, *, experts: int, size: float, gpus: float, rows: float) -> Budget:
    """What a GPU of a teacher's replica holds.

    Args:
        network: of each expert.
        passes: for ``passes.rows`` rows.
        experts: that it holds.
        size: bytes of a parameter.
        gpus: that it is spread over.
        rows: of its largest forward pass, guidance counted.
    """
    split = max(gpus, 1.0)
    weights = experts * network.stored(size) / split
    return Budget((Line("teacher", "weights", weights),), {"answer": rows / passes.rows * passes.transient})
