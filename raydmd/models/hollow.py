"""Networks as diffusers would load them: without weights, for ranks that are sent theirs, and of another dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights

if TYPE_CHECKING:
    from collections.abc import Mapping


def hollow(kind: Any, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """A network whose parameters have shape and dtype but no memory; its buffers are computed.

    Args:
        kind: the diffusers class.
        config: its settings.
        dtype: of the parameters, but for those that the class keeps in fp32 whatever it is asked.
    """
    with init_empty_weights(include_buffers=False):
        network = kind.from_config(config)
    cast(network, dtype)
    return network.eval()


def cast(network: Any, dtype: torch.dtype) -> None:
    """Give a network's parameters a dtype in place, but for those that its class keeps in fp32 whatever it is asked."""
    precise = network._keep_in_fp32_modules or ()
    for name, p in network.named_parameters():
        p.data = p.data.to(torch.float32 if any(part in precise for part in name.split(".")) else dtype)
