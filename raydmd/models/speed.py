"""A frozen network made faster: quantised weights, compiled blocks."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from raydmd.errors import InputError

if TYPE_CHECKING:
    from raydmd.models.base import Denoiser


def check_quantize(quantize: str | None) -> None:
    """See that quantised weights can be had.

    Raises:
        InputError: if torchao is not installed.
    """
    if quantize is not None and importlib.util.find_spec("torchao") is None:
        raise InputError(f"placement.teacher_quantize={quantize} needs torchao: pip install torchao")


def hasten(denoiser: Denoiser, *, compile_mode: str | None = None, quantize: str | None = None) -> None:
    """Make a frozen network faster, in place.

    With ``default``, blocks are compiled one by one (they are alike, so that one compilation serves all), where the
    network says which they are. The other modes record CUDA graphs, which overwrite their output when the next
    one runs: there the network is compiled as a whole.

    Args:
        denoiser: on its device, in evaluation mode.
        compile_mode: ``torch.compile``'s.
        quantize: ``int8`` or ``float8``, of the weights alone; the arithmetic stays in the network's dtype.

    Raises:
        InputError: if torchao is not installed, or knows no such weights on this device.
    """
    network: Any = denoiser.network
    if quantize is not None:
        check_quantize(quantize)
        ao = importlib.import_module("torchao.quantization")

        config = {"int8": ao.Int8WeightOnlyConfig, "float8": ao.Float8WeightOnlyConfig}[quantize]()
        try:
            ao.quantize_(network, config)
        except (AssertionError, RuntimeError, NotImplementedError) as error:
            raise InputError(f"placement.teacher_quantize={quantize} does not work here: {error}") from None
    if compile_mode is not None:
        if compile_mode == "default" and getattr(network, "_repeated_blocks", None):
            network.compile_repeated_blocks(mode=compile_mode)
        else:
            network.compile(mode=compile_mode)
