"""What a plan is made for: a kind of GPU, how many of them, and how they are connected."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from raydmd.errors import InputError
from raydmd.recipe_types import Count, Fraction, NonNegative, Positive, Section

TABLE = Path(__file__).parent / "data" / "hardware.yaml"
GIB = 1 << 30
KEPT_FREE = 0.75
"""Share of a node's memory that is not for Ray, loading and files."""
ON_PAPER = "times on paper, at the shares of its peak that the hardware's table assumes"
"""Where times come from if nothing was measured."""
GIGA, TERA = 1e9, 1e12


class Hardware(Section):
    """One kind of GPU in one kind of node; ``data/hardware.yaml`` says what the figures are and where they are from."""

    name: str
    per_node: Count = 8
    memory_gib: Positive
    bf16: Positive
    fp32: Positive
    hbm: Positive
    link: Positive
    network: Positive
    host: Positive = 25.0
    node_gib: NonNegative = 0.0
    price: NonNegative = 0.0
    forward: Annotated[float, Field(gt=0, le=1)] = 0.5
    train: Annotated[float, Field(gt=0, le=1)] = 0.4
    wire: Annotated[float, Field(gt=0, le=1)] = 0.7
    latency_us: NonNegative = 5.0
    reserved_gib: NonNegative = 2.0
    cores: Annotated[int, Field(ge=0)] = 0
    """Processes that compute at once on a machine without GPUs; 0: each has a GPU of its own."""
    jitter: Fraction = 0.03
    """Standard deviation of a pass's time over ranks and cycles, in its mean; the simulator draws it."""

    @property
    def room(self) -> float:
        """Bytes that tensors of a process can have."""
        return (self.memory_gib - self.reserved_gib) * GIB

    @property
    def host_room(self) -> float:
        """Bytes of a node's memory that each GPU's process can use for what waits there; 0 where it is not known."""
        return KEPT_FREE * self.node_gib * GIB / self.per_node

    def bandwidth(self, gpus: int) -> float:
        """Bytes a second at which a collective over so many GPUs moves data, as its bus bandwidth is counted."""
        slowest = self.link if gpus <= self.per_node else min(self.link, self.network)
        return slowest * self.wire * GIGA

    def rate(self, precision: str, *, train: bool) -> float:
        """Operations a second of a forward pass, or of a forward and backward."""
        peak = self.bf16 if precision == "bf16" else self.fp32
        return peak * TERA * (self.train if train else self.forward)


def table() -> dict[str, Hardware]:
    """What comes with the package, by name."""
    return {name: _checked(name, given) for name, given in _read(TABLE).items()}


def read_hardware(name: str) -> Hardware:
    """Hardware by its name in the table, or from a file.

    Args:
        name: ``h100``; ``my.yaml`` that describes one kind, or ``my.yaml:NAME`` of several.

    Raises:
        InputError: if there is none, or it can't be read.
    """
    file, _, entry = name.partition(":")
    if Path(file).suffix in (".yaml", ".yml"):
        entries = _read(Path(file))
        if not entry and "name" in entries:
            return _checked(file, entries)
        if not entry and len(entries) == 1:
            entry = next(iter(entries))
    else:
        file, entry, entries = str(TABLE), name.lower(), _read(TABLE)
    if entry not in entries:
        near = difflib.get_close_matches(entry, entries, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "copy its table, add yours, and give --cluster FILE:NAME"
        raise InputError(f"--cluster {name}: {file} has {', '.join(entries)}; {hint}")
    return _checked(f"{file}: {entry}", entries[entry])


def _read(file: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"--cluster {file} is not readable: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"--cluster {file} holds no mapping; {TABLE} shows the form")
    return found


def _checked(where: str, given: Any) -> Hardware:
    try:
        return Hardware.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "it"
        raise InputError(f"--cluster {where}: {key}: {first['msg']}; {TABLE} shows the form") from None
