"""Networks without weights, for ranks that are sent theirs."""

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
    precise = network._keep_in_fp32_modules or ()
    for name, p in network.named_parameters():
        wanted = torch.float32 if any(part in precise for part in name.split(".")) else dtype
        p.data = p.data.to(wanted)
    return network.eval()
