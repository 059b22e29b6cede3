"""Before Ray is asked to join a cluster: whether anybody is there. Ray itself waits for minutes."""

from __future__ import annotations

import socket

from raydmd.errors import InputError

TIMEOUT = 10.0


def reachable(address: str) -> None:
    """See that somebody listens at a ``HOST:PORT``; other forms of address are left to Ray.

    Raises:
        InputError: if nobody does.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "://" in address:
        return
    try:
        socket.create_connection((host, int(port)), timeout=TIMEOUT).close()
    except OSError as error:
        raise InputError(f"cannot join the Ray cluster at {address!r}: nobody listens there ({error})") from None
