"""Checks of a cluster as a whole: facts in, findings out."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from raydmd.doctor.facts import Finding

if TYPE_CHECKING:
    from raydmd.doctor.facts import Facts

SKEWED, WRONG = 1.0, 30.0
"""Seconds between clocks: from there on events are hard to order, and certificates and signed requests come to fail."""
SLOW = {"gloo": 0.1, "nccl": 5.0}
"""Gigabytes a second: a tenth of 10 Gb Ethernet between nodes, which CPUs keep busy; and 40 Gb between GPUs."""
REQUIRED = ("python", "ray", "torch", "diffusers", "raydmd")


def check_joined(facts: Facts) -> list[Finding]:
    """The cluster lets us in."""
    if not facts.address:
        said = "this machine alone"
        return [Finding("cluster", "skipped", said, "raydmd doctor --address HEAD:6379, or as a job, for a cluster")]
    if not facts.joined:
        return [Finding("cluster", "ok", f"joined {facts.address}")]
    if facts.asks_token:
        cure = (
            "export RAY_AUTH_MODE=token here, and use the token of the node that the cluster was started on: copy its "
            "~/.ray/auth_token (or name a copy by RAY_AUTH_TOKEN_PATH; RAY_AUTH_TOKEN goes before both)"
        )
    elif facts.asks_token is False:
        cure = "it answers without a token: unset RAY_AUTH_MODE here, or use this environment's Ray version there too"
    else:
        cure = "see that `ray status` works on the head, and that its port (6379) is open to this machine"
    return [Finding("cluster", "bad", facts.joined, cure)]


def check_versions(facts: Facts) -> list[Finding]:
    """All nodes have the same software."""
    found: list[Finding] = []
    for package in REQUIRED:
        by = {node.name: node.versions.get(package, "") for node in facts.seen}
        if missing := [name for name, version in by.items() if not version]:
            found.append(
                Finding(
                    "versions",
                    "bad",
                    f"{package} is not installed",
                    "install raydmd with constraints.txt in the environment that Ray is started from, as on the others",
                    ", ".join(missing),
                )
            )
        counted = Counter(version for version in by.values() if version)
        if len(counted) < 2:
            continue
        usual = counted.most_common(1)[0][0]
        for name, version in by.items():
            if not version or version == usual:
                continue
            # 2.13.0+cpu beside 2.13.0+cu130: one for nodes without GPUs.
            build = version.partition("+")[0] == usual.partition("+")[0]
            cure = (
                "fine for nodes without GPUs"
                if build
                else f"pip install {package}=={usual} there (constraints.txt has what is tested together), and restart "
                "Ray on it"
                if package != "python"
                else f"use Python {usual} there too"
            )
            said = f"{package} {version}, where others have {usual}"
            found.append(Finding("versions", "warn" if build else "bad", said, cure, name))
    if found or not facts.seen:
        return found
    versions = facts.seen[0].versions
    said = ", ".join(f"{package} {versions[package]}" for package in REQUIRED)
    return [Finding("versions", "ok", said)]


def check_token(facts: Facts) -> list[Finding]:
    """Nobody gets in without a token."""
    if not facts.address or facts.joined:
        return []
    cure = (
        "whoever reaches it runs code on all nodes: make a token (ray get-auth-token --generate), give it to every "
        "node, and start Ray there with RAY_AUTH_MODE=token"
    )
    if facts.asks_token is None:
        return [Finding("token", "warn", "it could not be seen whether the cluster asks for one", cure)]
    if not facts.asks_token:
        return [Finding("token", "bad", "the cluster asks for none", cure)]
    without = [node.name for node in facts.seen if node.auth != "token"]
    if without:
        said = "RAY_AUTH_MODE is not set in Ray's environment"
        return [Finding("token", "warn", said, "set RAY_AUTH_MODE=token for ray start there", ", ".join(without))]
    return [Finding("token", "ok", "the cluster asks for it")]


def check_clocks(facts: Facts) -> list[Finding]:
    """Clocks agree."""
    known = [(node.name, node.clock, node.clock_error) for node in facts.seen if node.clock is not None]
    found = []
    for name, ahead, error in known:
        off = abs(ahead) - error
        if off > SKEWED:
            said = f"its clock is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"
            cure = "let it be set over the network: timedatectl set-ntp true, or chronyd"
            found.append(Finding("clock", "bad" if off > WRONG else "warn", said, cure, name))
    if found or not known:
        return found
    worst = max(abs(ahead) + error for _, ahead, error in known)
    return [Finding("clock", "ok", f"within {max(worst, 0.001):.3f} s")]


def check_links(facts: Facts) -> list[Finding]:
    """Nodes reach each other, and so do GPUs, fast enough."""
    found = [
        Finding(
            "network",
            "bad",
            f"can't connect to {other}",
            "open all TCP ports between the nodes (security group, firewall, NetworkPolicy): Ray and PyTorch choose "
            "theirs as they go",
            name,
        )
        for name, other in facts.blocked
    ]
    for link in facts.links:
        if link.skipped:
            cure = "run the doctor again when they are free"
            found.append(Finding("network", "skipped", f"{link.backend} was not tried: {link.skipped}", cure))
        over = f" over {link.over}" if link.over else ""
        for name, error in link.errors.items():
            variable = "NCCL_SOCKET_IFNAME" if link.backend == "nccl" else "GLOO_SOCKET_IFNAME"
            cure = (
                f"set {variable} to the interface of the node's address before ray start on every node, and open all "
                "TCP ports between them" + ("; NCCL_DEBUG=INFO says more" if link.backend == "nccl" else "")
            )
            found.append(Finding("network", "bad", f"{link.backend}{over}: {error}", cure, name))
        if link.gigabytes is not None and link.gigabytes < SLOW[link.backend]:
            said = f"{link.backend} moves {link.gigabytes:.2f} GB/s{over}"
            cure = (
                "see that it takes the fast interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME; NCCL_DEBUG=INFO tells)"
            )
            found.append(Finding("network", "warn", said, cure))
    good = [
        f"{link.backend} {link.gigabytes:.2f} GB/s, {link.milliseconds:.2f} ms"
        + (f" over {link.over}" if link.over else "")
        for link in facts.links
        if link.gigabytes is not None and link.milliseconds is not None and link.gigabytes >= SLOW[link.backend]
    ]
    return found + ([Finding("network", "ok", "; ".join(good))] if good else [])


def check_dashboard(facts: Facts) -> list[Finding]:
    """Ray's dashboard answers, and not to everybody."""
    if facts.dashboard is None:
        return []
    address, error = facts.dashboard.address, facts.dashboard.error
    if not address:
        cure = (
            "start the head without --include-dashboard=false, with ray[default] installed: submitted jobs and sweeps "
            "that stop trials need it"
        )
        return [Finding("dashboard", "bad", "Ray's dashboard does not run", cure)]
    if error:
        cure = "look at dashboard.log in the session's folder of the head; port 8265 may be another program's"
        return [Finding("dashboard", "bad", f"{address}: {error}", cure)]
    if not address.startswith(("127.", "localhost")) and facts.asks_token is False:
        cure = "ray start --dashboard-host=127.0.0.1 and an SSH tunnel, or RAY_AUTH_MODE=token"
        return [Finding("dashboard", "warn", f"{address} is open to whoever reaches it", cure)]
    return [Finding("dashboard", "ok", address)]


def check_services(facts: Facts) -> list[Finding]:
    """Prometheus and Grafana answer, where they are named."""
    found = []
    for service in facts.services:
        cure = f"start it (cluster/services/compose.yaml), or correct RAY_{service.name.upper()}_HOST of the head"
        said = f"{service.name} at {service.address}"
        if service.error:
            found.append(Finding("dashboards", "warn", f"{said}: {service.error}", cure))
        else:
            found.append(Finding("dashboards", "ok", said))
    return found


def check_tracking(facts: Facts) -> list[Finding]:
    """The tracking server answers."""
    if facts.tracking is None:
        return []
    address, error = facts.tracking.address, facts.tracking.error
    if not address:
        return [Finding("tracking", "ok", "a file beside the runs (tracking.uri names a server)")]
    if not error:
        return [Finding("tracking", "ok", address)]
    if any(word in error for word in ("401", "403", "Unauthorized", "credentials")):
        cure = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, here"
    else:
        cure = (
            "start the server (docker compose -f cluster/services/compose.yaml up -d), correct tracking.uri, or let "
            "this machine reach it"
        )
    return [Finding("tracking", "bad", f"{address}: {error}", cure)]


def check_room(facts: Facts) -> list[Finding]:
    """The recipe has room."""
    if facts.room is None:
        return []
    if not facts.room:
        return [Finding("room", "ok", "the recipe fits")]
    said, _, cure = facts.room.rpartition("\n")
    if facts.grows:
        asks = "raydmd asks Ray's autoscaler for it (placement.autoscaled), which has placement.room_timeout for it"
        return [Finding("room", "warn", said, asks)]
    return [
        Finding("room", "bad", said, f"{cure}; see cluster/README.md for how nodes get trainer, teacher and reward")
    ]
