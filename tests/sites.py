"""Several Ray nodes on one machine, each with an address of its own, that can be killed, cut off and added back.

    with Nodes() as nodes:
        head = nodes.start(cpus=1, resources={"driver": 1})
        other = nodes.start(cpus=2, resources={"trainer": 1})
        subprocess.Popen([*head.enter, sys.executable, "script.py"], env={**os.environ, **head.env})
        other.kill()        # SIGKILL to everything in it
        other.start()       # back, with the same address and resources
        other.cut()         # its network cable is pulled
        other.mend()
        other.drain(60)     # it hears that it will be taken away

Every node lives in a network namespace that is made here, wired to a switch in one more; nothing of the machine's own
network is touched, and a namespace ends with the process that holds it. That needs root. Without it the nodes share
one address, which a warning says, and :meth:`Node.cut` freezes a node's processes instead.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[1]
NET = "10.77.0"
PORT = 6380
START = 120.0
"""Seconds that Ray may take to start a node."""


class Namespace:
    """A network namespace; it ends with the process that holds it, which ends with this one."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        self.pid = self._holder.pid
        deadline = time.monotonic() + 10
        while Path(f"/proc/{self.pid}/comm").read_text() != "cat\n":
            if self._holder.poll() is not None or time.monotonic() > deadline:
                self._holder.kill()
                raise OSError(f"no network namespace: {self._holder.communicate()[1].decode().strip()}")
            time.sleep(0.01)
        self.inode = _inode(self.pid)
        self.run("ip", "link", "set", "lo", "up")

    @property
    def enter(self) -> list[str]:
        """What to put before a command that is to run in it."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net"]

    def run(self, *command: str) -> None:
        path = {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}  # where tc is
        done = subprocess.run(
            [*self.enter, *command], env=os.environ | path, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")

    def processes(self) -> list[psutil.Process]:
        """All in it but its holder."""
        return [p for p in psutil.process_iter() if p.pid != self.pid and _inode(p.pid) == self.inode]

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()
        self._holder.stdin.close()
        self._holder.stderr.close()


def _inode(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return ""


@dataclass
class Node:
    """One of :class:`Nodes`.

    Attributes:
        name: of it.
        address: of it.
        enter: what to put before a command that is to run on it.
        env: what such a command needs in its environment to join the cluster.
    """

    name: str
    address: str
    head: bool
    asked: list[str]
    before: list[str]
    env: dict[str, str]
    folder: Path
    space: Namespace | None
    switch: Namespace | None
    _started: list[psutil.Popen] = field(default_factory=list)

    @property
    def enter(self) -> list[str]:
        return self.space.enter if self.space else []

    def start(self) -> None:
        """Start Ray on it, anew after a kill."""
        log = self.folder / f"{self.name}-{len(self._started)}.log"
        temporary = self.folder / f"{self.name}{len(self._started)}"  # short: there will be sockets in it
        cluster = self.env["RAY_ADDRESS"]
        where = ["--head", f"--port={cluster.rpartition(':')[2]}"] if self.head else [f"--address={cluster}"]
        command = [
            # Should this process be killed, Ray's own reaper ends what it leaves.
            *("setpriv", "--pdeathsig", "KILL", *self.enter, *self.before),
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *where, *self.asked),
            *(f"--node-ip-address={self.address}", f"--temp-dir={temporary}", "--object-store-memory=100000000"),
        ]
        with log.open("w") as file:
            process = psutil.Popen(
                command,
                cwd=ROOT,
                env=_clean() | self.env | {"RAY_ADDRESS": ""},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        self._started.append(process)
        deadline = time.monotonic() + START
        while "Ray runtime started" not in (said := log.read_text()):
            assert process.poll() is None, f"node {self.name} did not start:\n{said[-3000:]}"
            assert time.monotonic() < deadline, f"node {self.name} did not start within {START:g} s:\n{said[-3000:]}"
            time.sleep(0.1)

    def processes(self) -> list[psutil.Process]:
        """All that run on it, a driver included where it has an address of its own."""
        if self.space:
            return self.space.processes()
        found = []
        for root in self._started:
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [root, *root.children(recursive=True)]
        return found

    def find(self, title: str) -> list[psutil.Process]:
        """Those with a title, e.g. ``ray::RayTrainWorker``, ``ray::Replica``, ``raylet``, ``gcs_server``."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if title in " ".join(process.cmdline()[:1]):
                    found.append(process)
        return found

    def kill(self) -> None:
        """SIGKILL to all that runs on it, until nothing is left."""
        deadline = time.monotonic() + 30
        while living := [p for p in self.processes() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
            assert time.monotonic() < deadline, f"node {self.name} does not die: {living}"
            self._signal(living, signal.SIGKILL)
            time.sleep(0.05)
        for process in self._started:
            process.wait(30)

    def cut(self) -> None:
        """Pull its cable: it runs on, and nobody hears of it. Without an address of its own it freezes instead."""
        if self.switch:
            self.switch.run("ip", "link", "set", self.name, "down")
        else:
            self._signal(self.processes(), signal.SIGSTOP)

    def mend(self) -> None:
        """Undo :meth:`cut`."""
        if self.switch:
            self.switch.run("ip", "link", "set", self.name, "up")
        else:
            self._signal(self.processes(), signal.SIGCONT)

    def drain(self, seconds: int) -> None:
        """Give notice that it will be taken away, as a cloud does; whoever gives it kills it.

        With ``cluster/drain.sh``, which finds its node by its network: that must be the node's own.
        """
        assert self.space, "all nodes share one network"
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        log = self.folder / f"{self.name}-drain.log"
        with log.open("w") as file:
            command = [*self.enter, str(ROOT / "cluster" / "drain.sh"), str(seconds)]
            process = psutil.Popen(command, env=_clean() | self.env | {"PATH": path}, stdout=file, stderr=file)
        self._started.append(process)
        deadline = time.monotonic() + START
        while f" has {seconds} s" not in (said := log.read_text()):
            assert process.poll() is None, f"drain.sh on node {self.name} ended:\n{said[-3000:]}"
            assert time.monotonic() < deadline, f"drain.sh on node {self.name} does not come back:\n{said[-3000:]}"
            time.sleep(0.1)

    def slow(self, kilobits: int | None) -> None:
        """Let no more than so many kilobits a second reach it; ``None``: as many as there are."""
        if not self.switch:
            return
        if kilobits is None:
            self.switch.run("tc", "qdisc", "del", "dev", self.name, "root")
        else:
            rate = ("rate", f"{kilobits}kbit", "burst", "64kb", "latency", "2s")
            self.switch.run("tc", "qdisc", "replace", "dev", self.name, "root", "tbf", *rate)

    @staticmethod
    def _signal(processes: list[psutil.Process], number: int) -> None:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


class Nodes(contextlib.AbstractContextManager["Nodes"]):
    """A Ray cluster of nodes, the first of which is its head; all of them end with this.

    Args:
        apart: whether they have addresses of their own; default: if that can be had.
        env: for Ray and its workers on every node.
    """

    def __init__(self, *, apart: bool | None = None, **env: str) -> None:
        self._stack = contextlib.ExitStack()
        self._nodes: list[Node] = []
        self._switch: Namespace | None = None
        if apart is not False:
            try:
                self._switch = self._namespace()
                self._switch.run("ip", "link", "add", "name", "switch", "type", "bridge")
                self._switch.run("ip", "link", "set", "switch", "up")
            except OSError as error:
                self._stack.close()
                self._switch = None
                if apart:
                    raise
                warnings.warn(f"all nodes share one address, and a cut freezes them instead: {error}", stacklevel=2)
        self.apart = self._switch is not None
        self.folder = Path(tempfile.mkdtemp(prefix="rs", dir="/tmp"))
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self._env = {
            "RAY_ADDRESS": f"{NET}.1:{PORT}" if self.apart else f"127.0.0.1:{_free_port()}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            # A dead node is known after about 5 s, one that is silent after 30.
            "RAY_health_check_initial_delay_ms": "2000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "5000",
            "RAY_health_check_failure_threshold": "5",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            # The machine's name stands for an address that is in none of the namespaces.
            **({"GLOO_SOCKET_IFNAME": "eth0"} if self.apart else {}),
            **env,
        }

    def start(
        self,
        *,
        cpus: float = 1,
        resources: dict[str, float] | None = None,
        dashboard: bool = False,
        before: Sequence[str] = (),
        more: Sequence[str] = (),
        **env: str,
    ) -> Node:
        """Add a node.

        Args:
            cpus: that it has.
            resources: of its own.
            dashboard: whether it has one, at port 8265; the head alone.
            before: what to put before the command that starts Ray on it, e.g. ``prlimit``.
            more: words for that command, e.g. ``--autoscaling-config``.
            env: for Ray and its workers on this node.
        """
        number = len(self._nodes) + 1
        asked = [f"--num-cpus={cpus:g}", f"--resources={json.dumps(resources or {})}", *more]
        if number == 1:
            asked.append(f"--include-dashboard={'true' if dashboard else 'false'}")
        if dashboard:
            asked += [f"--dashboard-host={NET}.{number}" if self.apart else "--dashboard-host=127.0.0.1"]
        node = Node(
            name=f"n{number}",
            address=f"{NET}.{number}" if self.apart else "127.0.0.1",
            head=number == 1,
            asked=asked,
            before=list(before),
            env={**self._env, **env},
            folder=self.folder,
            space=self._wire(number) if self.apart else None,
            switch=self._switch,
        )
        self._stack.callback(node.kill)
        node.start()
        self._nodes.append(node)
        return node

    def _wire(self, number: int) -> Namespace:
        space, port = self._namespace(), f"n{number}"
        peer = ("type", "veth", "peer", "name", "eth0", "netns", str(space.pid))
        self._switch.run("ip", "link", "add", "name", port, "master", "switch", *peer)
        self._switch.run("ip", "link", "set", port, "up")
        space.run("ip", "addr", "add", f"{NET}.{number}/24", "dev", "eth0")
        space.run("ip", "link", "set", "eth0", "up")
        return space

    def _namespace(self) -> Namespace:
        space = Namespace()
        self._stack.callback(space.close)
        return space

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def _clean() -> dict[str, str]:
    """This process's environment without any Ray of the machine's own."""
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
