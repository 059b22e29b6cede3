"""Files of other people's pipelines that their libraries do not understand."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from raydmd.errors import InputError, RaydmdError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def understood(what: str, only: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """Have what libraries raise over files that they don't understand be bad input, which they raise a dozen types of.

    Args:
        what: is read, for the message.
        only: types that mean it; others, of a machine that fails, pass.

    Raises:
        InputError: in place of theirs; memory that is short stays what it is.
    """
    try:
        yield
    except (RaydmdError, MemoryError, torch.OutOfMemoryError):
        raise
    except only as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InputError(f"{what} can't be read: {type(error).__name__}: {lines[0] if lines else ''}") from error
