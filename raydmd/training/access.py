"""Who may use the Ray that a run uses: it is tried without a token."""

from __future__ import annotations

import os

import grpc

MODE = "RAY_AUTH_MODE"
ANSWER = 10.0
"""Seconds for Ray's head to refuse."""
ASKED = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""Of all that Ray's head answers the least."""
HOW = (
    "start it with RAY_AUTH_MODE=token and the token of `ray get-auth-token --generate` on every node, set "
    "RAY_AUTH_MODE=token here too"
)


def is_open(address: str, header: str | None = None) -> bool | None:
    """Whether a cluster answers who has no token, or a certain one; ``None`` if that can't be told.

    Args:
        address: of its head, ``HOST:PORT``.
        header: ``Bearer TOKEN``; default: none.
    """
    try:
        with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            shown = (("authorization", header),) if header else ()
            channel.unary_unary(ASKED)(b"", timeout=ANSWER, metadata=shown)
    except grpc.RpcError as error:
        return False if error.code() is grpc.StatusCode.UNAUTHENTICATED else None
    return True


def show_token(address: str | None) -> None:
    """Have this process show its token to a cluster that asks for one, as a run's own Ray does; before Ray is imported.

    Args:
        address: of its head; what is no ``HOST:PORT`` is left alone, as is what the environment decides.
    """
    if address and MODE not in os.environ and address.rpartition(":")[2].isdigit() and is_open(address) is False:
        os.environ[MODE] = "token"


def warning(address: str, *, own: bool) -> str:
    """What to tell of a cluster that anybody may use who reaches it; empty if it asks for a token.

    Args:
        address: of its head.
        own: whether this process has started it.
    """
    answer = is_open(address)
    if answer is None:
        return f"warning: could not see whether the Ray cluster at {address} asks for a token"
    if not answer:
        return ""
    if own:
        why = f" ({MODE}={os.environ[MODE]} is set; unset it)" if MODE in os.environ else ""
        return (
            f"warning: the Ray that this run starts asks for no token{why}: every user of this machine can run code as "
            "this one, who reads its files and keys"
        )
    return (
        f"warning: the Ray cluster at {address} asks for no token: whoever reaches it over the network can run code on "
        f"all its nodes, and read this run. To close it, {HOW}"
    )
