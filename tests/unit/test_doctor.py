"""``raydmd doctor``: from facts to findings. Every fault names its node and its cure."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import ray

from raydmd.doctor import probe
from raydmd.doctor.facts import Facts, Finding, Folder, Gpu, Link, Need, NodeFacts, Service
from raydmd.doctor.gather import inputs_of
from raydmd.doctor.nodes import Cluster, node_facts
from raydmd.doctor.show import examine, show, table, verdict
from raydmd.errors import DONE, FAILED
from raydmd.recipe import Recipe, derive

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.unit

H100 = Gpu("NVIDIA H100 80GB HBM3", "580.105.08", 79.6, 0.1, 0)
VERSIONS = {"python": "3.11.2", "ray": "2.60.0", "torch": "2.13.0+cu130", "diffusers": "0.42.1", "raydmd": "0.1.0"}
NAMES = ("10.0.0.1", "10.0.0.2", "10.0.0.3")


def node(name: str) -> NodeFacts:
    """One that is well."""
    return NodeFacts(
        name=name,
        head=name == NAMES[0],
        versions=VERSIONS,
        gpus=(H100,) * 8,
        torch_gpus=8,
        ray_gpus=8,
        object_store=200.0,
        shm=1000.0,
        memory=2000.0,
        memory_free=1800.0,
        files=1 << 20,
        clock=0.002,
        clock_error=0.001,
        hostname="node",
        resolves=(name,),
        addresses={"lo": "127.0.0.1", "eth0": name},
        auth="token",
        temporary=Folder("/tmp/ray", free=800.0, total=1000.0),
        folders=(Folder("/shared/runs", free=5000.0, total=9000.0, sees=NAMES),),
        checkpoints="",
        metrics="",
    )


WELL = Facts(
    address="10.0.0.1:6379",
    asks_token=True,
    nodes=tuple(map(node, NAMES)),
    links=(Link("gloo", milliseconds=0.3, gigabytes=1.1), Link("nccl", milliseconds=0.1, gigabytes=40.0)),
    dashboard=Service("dashboard", "10.0.0.1:8265"),
    services=(Service("Prometheus", "http://10.0.0.1:9090"),),
    tracking=Service("MLflow", "http://10.0.0.9:5000"),
    room="",
)


def sick(**changes: Any) -> Facts:
    """The second node has something."""
    return replace(WELL, nodes=(WELL.nodes[0], replace(WELL.nodes[1], **changes), WELL.nodes[2]))


def test_a_cluster_that_is_well() -> None:
    findings = examine(WELL)
    assert {f.level for f in findings} == {"ok"}
    assert verdict(findings) == DONE
    assert len({f.check for f in findings}) == len(findings) >= 18, "a line for each check"
    assert not any(f.cure for f in findings)


BAD = {
    "a node that hangs": (
        replace(WELL, nodes=(*WELL.nodes[:2], NodeFacts(name="10.0.0.3", error="no answer within 20 s"))),
        ("nodes", "10.0.0.3", "no answer within 20 s", "ray status"),
    ),
    "another version": (
        sick(versions={**VERSIONS, "diffusers": "0.36.0"}),
        ("versions", "10.0.0.2", "diffusers 0.36.0, where others have 0.42.1", "pip install diffusers==0.42.1"),
    ),
    "a package that is not there": (
        sick(versions={**VERSIONS, "raydmd": ""}),
        ("versions", "10.0.0.2", "raydmd is not installed", "constraints.txt"),
    ),
    "a wrong token": (
        Facts(address="10.0.0.1:6379", joined="cannot join", asks_token=True),
        ("cluster", "", "cannot join", "~/.ray/auth_token"),
    ),
    "nobody there": (
        Facts(address="10.0.0.1:6379", joined="nobody listens there"),
        ("cluster", "", "nobody listens", "ray status"),
    ),
    "no token": (replace(WELL, asks_token=False), ("token", "", "asks for none", "RAY_AUTH_MODE=token")),
    "no driver": (
        sick(gpus=(), torch_gpus=None, gpu_error="nvidia-smi: couldn't communicate with the NVIDIA driver"),
        ("gpus", "10.0.0.2", "couldn't communicate", "driver"),
    ),
    "memory errors of a GPU": (
        sick(gpus=(H100,) * 7 + (replace(H100, uncorrected=2),)),
        ("gpus", "10.0.0.2", "uncorrected memory errors on GPU 7", "nvidia-smi -r"),
    ),
    "a GPU that fell off the bus": (sick(xids=(43, 79)), ("gpus", "10.0.0.2", "Xid 79", "drain the node")),
    "a PyTorch without CUDA": (sick(torch_gpus=0), ("gpus", "10.0.0.2", "lists 8, PyTorch sees 0", "built for CUDA")),
    "a name for the loopback address": (
        sick(resolves=("127.0.1.1",)),
        ("hostname", "10.0.0.2", "loopback address 127.0.1.1", "GLOO_SOCKET_IFNAME=eth0"),
    ),
    "a name for another's address": (
        sick(resolves=("192.168.7.7",)),
        ("hostname", "10.0.0.2", "192.168.7.7, which is not its own", "GLOO_SOCKET_IFNAME=eth0"),
    ),
    "an interface that is not there": (
        sick(gloo="ib0"),
        ("hostname", "10.0.0.2", "GLOO_SOCKET_IFNAME=ib0", "GLOO_SOCKET_IFNAME=eth0"),
    ),
    "a firewall": (
        replace(WELL, blocked=(("10.0.0.1", "10.0.0.2"),)),
        ("network", "10.0.0.1", "can't connect to 10.0.0.2", "open all TCP ports"),
    ),
    "gloo that hangs": (
        replace(WELL, links=(Link("gloo", errors={"10.0.0.2": "no answer within 60 s"}),)),
        ("network", "10.0.0.2", "gloo: no answer", "GLOO_SOCKET_IFNAME"),
    ),
    "NCCL that fails": (
        replace(WELL, links=(Link("nccl", errors={"10.0.0.2": "ncclSystemError"}),)),
        ("network", "10.0.0.2", "nccl: ncclSystemError", "NCCL_SOCKET_IFNAME"),
    ),
    "a clock that is wrong": (
        sick(clock=-95.0),
        ("clock", "10.0.0.2", "95.0 s behind", "timedatectl set-ntp true"),
    ),
    "no memory left": (sick(memory_free=40.0), ("memory", "10.0.0.2", "40.0 GiB of 2000 GiB left", "kills workers")),
    "no memory left in the container": (
        sick(memory_limit=64.0, memory_free=2.0),
        ("memory", "10.0.0.2", "2.0 GiB of 64.0 GiB left in the container", "kills workers"),
    ),
    "Docker's own /dev/shm": (sick(shm=0.0625), ("object store", "10.0.0.2", "/dev/shm has 0.1 GiB", "--shm-size")),
    "an object store on a disk": (
        sick(shm=100.0),
        ("object store", "10.0.0.2", "asked of a /dev/shm of 100 GiB", "--object-store-memory=96636764160"),
    ),
    "Ray's disk full": (
        sick(temporary=Folder("/tmp/ray", free=10.0, total=1000.0)),
        ("Ray's disk", "10.0.0.2", "99% of the disk at /tmp/ray", "--temp-dir"),
    ),
    "few open files": (sick(files=1024), ("open files", "10.0.0.2", "may have 1024", "ulimit -n 65536")),
    "a storage that can't be written": (
        sick(folders=(Folder("/shared/runs", error="PermissionError: denied"),)),
        ("storage", "10.0.0.2", "can't be written: PermissionError", "mount it there"),
    ),
    "a storage that is full": (
        sick(folders=(Folder("/shared/runs", error="OSError: [Errno 28] No space left on device"),)),
        ("storage", "10.0.0.2", "No space left", "make room on it"),
    ),
    "a storage with little room": (
        sick(folders=(Folder("/shared/runs", free=0.2, total=9000.0, sees=NAMES),)),
        ("storage", "10.0.0.2", "has 0.2 GiB free", "make room on it"),
    ),
    "a storage without room for its checkpoints": (
        replace(
            sick(folders=(Folder("/shared/runs", free=900.0, total=9000.0, sees=NAMES),)),
            need=Need("/shared/runs", each=319.4, count=4),
        ),
        ("storage", "10.0.0.2", "has 900 GiB free, and this run's checkpoints need 1278 GiB", "checkpoints.keep"),
    ),
    "a folder of its own": (
        sick(folders=(Folder("/shared/runs", free=99.0, total=99.0, sees=("10.0.0.2",)),)),
        ("storage", "10.0.0.2", "not the one of 10.0.0.1, 10.0.0.3", "mount the same shared storage"),
    ),
    "a model that is on one node": (
        sick(missing=("/models/sdxl",)),
        ("inputs", "10.0.0.2", "not there: /models/sdxl", "storage that all nodes see"),
    ),
    "object storage that refuses": (
        sick(checkpoints="checkpoints.storage=s3://b/f can't be written to"),
        ("checkpoints", "10.0.0.2", "can't be written to", "AWS_ENDPOINT_URL"),
    ),
    "a tracking server that is down": (
        replace(WELL, tracking=Service("MLflow", "http://10.0.0.9:5000", "Connection refused")),
        ("tracking", "", "Connection refused", "docker compose -f cluster/services/compose.yaml"),
    ),
    "a tracking server that refuses": (
        replace(WELL, tracking=Service("MLflow", "http://10.0.0.9:5000", "401 Unauthorized")),
        ("tracking", "", "401", "MLFLOW_TRACKING_PASSWORD"),
    ),
    "no dashboard": (
        replace(WELL, dashboard=Service("dashboard", "", "it does not run")),
        ("dashboard", "", "does not run", "--include-dashboard=false"),
    ),
    "a dashboard that hangs": (
        replace(WELL, dashboard=Service("dashboard", "10.0.0.1:8265", "timed out")),
        ("dashboard", "", "timed out", "dashboard.log"),
    ),
    "no room": (
        replace(WELL, room="the cluster has too little trainer for this run:\n  table\nuse fewer --workers"),
        ("room", "", "too little trainer", "use fewer --workers"),
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_fault_names_its_place_and_its_cure(fault: str) -> None:
    facts, (check, where, said, cure) = BAD[fault]
    findings = examine(facts)
    assert verdict(findings) == FAILED
    [found] = [f for f in findings if f.level == "bad"]
    assert (found.check, found.where) == (check, where)
    assert said in found.said
    assert cure in found.cure


LOOK = {
    "other builds of PyTorch": (sick(versions={**VERSIONS, "torch": "2.13.0+cpu"}), "versions"),
    "other GPUs": (sick(gpus=(replace(H100, name="A100"),) * 8), "gpus"),
    "GPUs that Ray does not give out": (sick(ray_gpus=4), "gpus"),
    "GPUs in use": (sick(gpus=(replace(H100, used=30.0),) * 8), "gpus"),
    "a slow network": (replace(WELL, links=(Link("nccl", milliseconds=1.0, gigabytes=0.9),)), "network"),
    "a clock that is off": (sick(clock=3.0), "clock"),
    "a small object store": (sick(object_store=0.1), "object store"),
    "a disk that fills": (sick(temporary=Folder("/tmp", free=100.0, total=1000.0)), "Ray's disk"),
    "fewer open files": (sick(files=20000), "open files"),
    "metrics that can't be had": (sick(metrics="http://10.0.0.2:8080/metrics: refused"), "metrics"),
    "Prometheus that is down": (replace(WELL, services=(Service("Prometheus", "http://x", "refused"),)), "dashboards"),
    "a node without the mode": (sick(auth=""), "token"),
    "storage that is not mounted": (
        sick(folders=(replace(WELL.nodes[1].folders[0], made="/shared"),)),
        "storage",
    ),
    "room that the autoscaler is asked for": (replace(WELL, room="too little trainer\nfewer", grows=True), "room"),
}


@pytest.mark.parametrize("what", LOOK)
def test_what_may_be_meant_is_no_failure(what: str) -> None:
    facts, check = LOOK[what]
    findings = examine(facts)
    [found] = [f for f in findings if f.level != "ok"]
    assert (found.check, found.level) == (check, "warn")
    assert found.cure
    assert verdict(findings) == DONE


def test_a_clock_within_what_was_measured_is_right() -> None:
    assert not [f for f in examine(sick(clock=4.0, clock_error=3.5)) if f.level != "ok"]


def test_this_machine_alone() -> None:
    alone = replace(
        node("here"), object_store=None, ray_gpus=0.0, clock=None, folders=(), metrics=None, resolves=("127.0.1.1",)
    )
    findings = examine(Facts(nodes=(alone,)))
    assert {f.level for f in findings} == {"ok", "skipped"}
    assert {f.check for f in findings if f.level == "skipped"} == {"cluster", "storage"}


def test_the_same_on_all_nodes_is_one_line() -> None:
    facts = replace(WELL, nodes=tuple(replace(n, files=1024) for n in WELL.nodes))
    [found] = [f for f in examine(facts) if f.level == "bad"]
    assert found.where == "10.0.0.1, 10.0.0.2, 10.0.0.3"


def test_json_has_findings_and_facts(capsys: pytest.CaptureFixture[str]) -> None:
    facts = sick(files=1024)
    show(facts, examine(facts), as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert [Finding(**f) for f in told["findings"]] == examine(facts)
    assert [n["files"] for n in told["facts"]["nodes"]] == [n.files for n in facts.nodes]


def test_the_table_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    facts = sick(files=1024)
    show(facts, examine(facts), as_json=False)
    said = capsys.readouterr().out
    assert "BAD" in said
    assert "ulimit -n" in said
    assert "1 bad, 0 to look at" in said
    assert table(examine(facts)).row_count == len(examine(facts))


def test_reading_nvidia_smi() -> None:
    text = "NVIDIA H100 80GB HBM3, 580.105.08, 81559, 4, 0\nTesla T4, 580.105.08, 15360, 0, [N/A]\n"
    first, second = probe.parse_gpus(text)
    assert Gpu(**first) == Gpu("NVIDIA H100 80GB HBM3", "580.105.08", 81559 / 1024, 4 / 1024, 0)
    assert second["uncorrected"] is None


def test_reading_the_kernels_log() -> None:
    text = (
        "[12.1] NVRM: loading NVIDIA UNIX Open Kernel Module\n"
        "[99.2] NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, GPU has fallen off the bus.\n"
        "[99.3] NVRM: Xid (PCI:0000:3b:00): 79, pid=1235, GPU has fallen off the bus.\n"
        "[99.4] NVRM: Xid (PCI:0000:86:00): 13, Graphics Exception\n"
    )
    assert probe.parse_xids(text) == [13, 79]


def test_a_probe_tells_what_the_record_holds(tmp_path: Any) -> None:
    here = probe.Probe()
    told = here.look()
    fields = {f.name for f in dataclasses.fields(NodeFacts)}
    assert told.keys() <= fields
    read = node_facts("here", told)
    assert read.versions["raydmd"]
    assert read.memory
    assert read.memory_free
    folder = str(tmp_path / "a" / "b")
    wrote = here.write(folder, "mark", "here")
    assert wrote.pop("made") == str(tmp_path / "a")
    assert here.sees(folder, "mark", 1, 0.0) == ["here"]
    here.erase(folder, "mark", "here")
    here.tidy(folder, str(tmp_path / "a"))
    assert not (tmp_path / "a").exists()
    assert Folder(**wrote).free


def test_a_folder_that_cant_be_made_is_told(tmp_path: Any) -> None:
    (tmp_path / "file").touch()
    wrote = probe.Probe().write(str(tmp_path / "file" / "runs"), "mark", "here")
    assert "NotADirectoryError" in wrote["error"]


def test_inputs_are_files_of_this_machine(tmp_path: Any) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    model, prompts = str(tmp_path), str(tmp_path / "prompts.txt")
    recipe = derive(Recipe(), {"model.path": model, "data.prompts": prompts})
    assert inputs_of(recipe) == [model, prompts]
    assert inputs_of(derive(recipe, {"model.path": "wan22-tiny", "data.prompts": None})) == []
    assert probe.Probe().missing([prompts, "/no/such"]) == ["/no/such"]


def test_who_can_be_reached() -> None:
    here = probe.Probe()
    port = here.listen("127.0.0.1")
    assert here.reach({"here": ("127.0.0.1", port)}, 2.0) == {}
    here.hang_up()
    closed = here.free_port("127.0.0.1")
    assert list(here.reach({"gone": ("127.0.0.1", closed)}, 2.0)) == ["gone"]


def test_room_for_checkpoints_is_asked_of_their_folder_alone() -> None:
    folders = (*WELL.nodes[0].folders, Folder("/cache", free=900.0, total=1000.0, sees=NAMES))
    facts = replace(WELL, nodes=tuple(replace(n, folders=folders) for n in WELL.nodes))
    findings = examine(replace(facts, need=Need("/shared/runs", each=319.4, count=4)))
    assert {f.level for f in findings} == {"ok"}
    assert next(f.said for f in findings if f.check == "storage").endswith("a checkpoint has 319 GiB")


def machine(root: Path, groups: dict[str, tuple[str, int]], own: str) -> str:
    """A machine of 100 GiB, 90 of them free, with limits and uses in GiB by control group."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text(f"MemTotal: {100 << 20} kB\nMemAvailable: {90 << 20} kB\n")
    (root / "proc" / "self" / "cgroup").write_text(own)
    second = own.startswith("0::")
    files = ("memory.max", "memory.current") if second else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for path, (limit, used) in groups.items():
        folder = root / "sys" / "fs" / "cgroup" / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / files[0]).write_text(limit if limit == "max" else str(int(limit) << 30))
        (folder / files[1]).write_text(str(used << 30))
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {1 << 30}\n")
    return str(root)


SLURM = "system.slice/slurmstepd.scope/job_7"


@pytest.mark.parametrize(
    ("groups", "own", "limit", "free"),
    [
        ({SLURM: ("64", 11), f"{SLURM}/step_0": ("max", 5)}, f"0::/{SLURM}/step_0\n", 64.0, 54.0),
        ({".": ("80", 41), SLURM: ("60", 11)}, f"0::/{SLURM}\n", 60.0, 40.0),
        ({".": ("32", 3)}, "0::/\n", 32.0, 30.0),
        ({".": ("32", 3)}, "0::/kubepods/not/mounted/here\n", 32.0, 30.0),
        ({".": ("max", 3)}, "0::/\n", None, 90.0),
        ({"memory/slurm/job_7": ("64", 11)}, "4:cpu,cpuacct:/\n3:memory:/slurm/job_7/step_0\n0::/\n", 64.0, 54.0),
    ],
    ids=["slurm", "tighter above", "container", "path of the machine", "none", "first version"],
)
def test_the_limit_of_memory_is_that_of_the_jobs_control_group(
    groups: dict[str, tuple[str, int]], own: str, limit: float | None, free: float, tmp_path: Path
) -> None:
    assert probe.read_memory(machine(tmp_path, groups, own)) == (100.0, limit, free)


@pytest.mark.parametrize(
    ("busy", "over", "skipped"),
    [
        ((), "4 GPUs", ""),
        (("10.0.0.1 1",), "3 of 4 GPUs, the others were not free", ""),
        (("10.0.0.2 0", "10.0.0.2 1"), "", "no free GPU on 10.0.0.2"),
    ],
)
def test_nccl_is_tried_between_all_gpus(
    busy: tuple[str, ...], over: str, skipped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone: list[str] = []
    monkeypatch.setattr(ray, "kill", gone.append)
    cluster: Any = Cluster.__new__(Cluster)
    cluster._start = lambda names, **_: {name: f"actor of {name}" for name in names}
    cluster._ask = lambda actors, _: ({n: 0 for n in actors if n not in busy}, {n: "late" for n in actors if n in busy})
    cluster._exchange = lambda backend, actors: Link(backend, errors=dict.fromkeys(actors, "ncclSystemError"))
    nodes = [replace(node(name), ray_gpus=2.5) for name in NAMES[:2]]
    found = {link.backend: link for link in cluster._links({name: None for name in NAMES[:2]}, nodes)}
    assert set(found) == {"gloo", "nccl"}
    assert (found["nccl"].over, found["nccl"].skipped) == (over, skipped)
    assert set(found["nccl"].errors) == (set() if skipped else set(NAMES[:2])), "by node"
    assert len(gone) == 4, "none holds a GPU afterwards"
    alone = cluster._links({NAMES[0]: None}, nodes[:1])
    assert [link.backend for link in alone] == ["nccl"], "also on one node"
    assert not cluster._links({NAMES[0]: None}, [replace(nodes[0], ray_gpus=1.0)])
