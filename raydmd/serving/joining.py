"""Before Ray is asked to start or join a cluster: whether anybody is there, and from where it is seen."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

from ray._private import ray_constants, services

from raydmd.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

TIMEOUT = 10.0
LOCAL = "127.0.0.1"


def reachable(address: str) -> None:
    """See that somebody listens at a ``HOST:PORT``: Ray itself waits for minutes. Other forms are left to it.

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


@contextlib.contextmanager
def loopback(yes: bool = True) -> Iterator[None]:
    """A Ray that is started or joined meanwhile is on this machine's loopback interface alone, as on macOS.

    By itself it listens to the whole network. Its own setting for that, which the environment may hold and which then
    decides, was read when it was imported; so it is set here.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    if yes and ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR not in os.environ:
        ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def on_loopback(address: str) -> bool:
    """Whether a cluster of this machine listens on its loopback interface alone, where Ray would not look for it."""
    try:
        found = services.canonicalize_bootstrap_address(address)
    except Exception:  # an address that Ray does not understand: it says so when it is asked to join
        return False
    host, _, port = (found or "").rpartition(":")
    if not port.isdigit() or host != services.get_node_ip_address():  # type: ignore[no-untyped-call]
        return False
    return not _answers(host, int(port)) and _answers(LOCAL, int(port))


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=TIMEOUT).close()
    except OSError:
        return False
    return True
