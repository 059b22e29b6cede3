"""What is in cluster/ is what Kubernetes, KubeRay, Ray, Compose, Prometheus and the shell understand, and what runs."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from raydmd import __version__
from raydmd.recipe import Recipe
from tests.local.test_cluster_commands import dry_run

pytestmark = pytest.mark.local

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
SCHEMAS = ROOT / "tests" / "schemas"
BIN = Path(sys.executable).parent
KUBERNETES = "1.34"
KUBERAY = json.loads((SCHEMAS / "kuberay-v1.7.0.json").read_text(encoding="utf-8"))
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
)
ROLES = {"trainer", "teacher", "reward"}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text(encoding="utf-8")))


def resource(name: str, kind: str) -> dict[str, Any]:
    [found] = [d for d in documents(name) if d["kind"] == kind]
    return found


def templates(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    """Pod templates of a Ray cluster, its head's first."""
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def ray_cluster(name: str) -> dict[str, Any]:
    kind = "RayJob" if name == "rayjob" else "RayCluster"
    spec = resource(f"kuberay/{name}.yaml", kind)["spec"]
    return dict(spec["rayClusterSpec"] if kind == "RayJob" else spec)


def check_kubernetes(what: dict[str, Any]) -> None:
    """Kubernetes' own schema, in which what it does not know is refused; KubeRay's for its own kinds."""
    if what["apiVersion"] != "ray.io/v1":
        kubernetes_validate.validate(what, KUBERNETES, strict=True)
        return
    jsonschema.validate(what["spec"], KUBERAY[what["kind"]])
    for template in templates(what["spec"].get("rayClusterSpec", what["spec"])):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "a"}, "template": template}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", sorted(f.name for f in (CLUSTER / "kuberay").iterdir()))
def test_kubernetes_takes_it(name: str) -> None:
    for what in documents(f"kuberay/{name}"):
        check_kubernetes(what)
        # https://github.com/ray-project/kuberay, validation.go: names of what it makes from ours must not get too long.
        assert re.fullmatch(r"[a-z]([a-z0-9-]{0,45}[a-z0-9])?", what["metadata"]["name"])


def test_kubernetes_schemas_see_faults() -> None:
    right = resource("kuberay/rayjob.yaml", "RayJob")
    faults: list[tuple[tuple[Any, ...], Any]] = [
        (("backofLimit",), 3),
        (("backoffLimit",), "3"),
        (("rayClusterSpec", "authOptions", "mode"), "tokens"),
        (("rayClusterSpec", "gcsFaultToleranceOptions", "redisAdress"), "redis:6379"),
        (("rayClusterSpec", "workerGroupSpecs", 0, "rayStartParams", "resources"), {"trainer": 8}),
        (("rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "terminationGracePeriod"), 120),
        (("rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "image"), 7),
    ]
    for path, value in faults:
        wrong = copy.deepcopy(right)
        place = wrong["spec"]
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = value
        with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
            check_kubernetes(wrong)


def test_job_and_cluster_are_the_same_cluster() -> None:
    assert ray_cluster("rayjob") == ray_cluster("raycluster")


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_kuberay_accepts_what_its_operator_looks_at(name: str) -> None:
    """What its controllers refuse beside the schema (ray-operator/controllers/ray/utils/validation.go)."""
    spec = ray_cluster(name)
    assert spec["rayVersion"] == PINS["ray"]
    assert tuple(map(int, spec["rayVersion"].split("."))) >= (2, 52, 0), "tokens"
    assert spec["authOptions"] == {"mode": "token"}
    assert "storage" not in spec["gcsFaultToleranceOptions"]
    assert all("restartPolicy" not in template["spec"] for template in templates(spec)), (
        "the autoscaler's second version"
    )
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] == 0 < group["replicas"] <= group["maxReplicas"]
    names = {
        variable["name"] for t in templates(spec) for c in t["spec"]["containers"] for variable in c.get("env", [])
    }
    assert not names & {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS", "RAY_AUTH_TOKEN", "RAY_enable_autoscaler_v2"}
    job = resource("kuberay/rayjob.yaml", "RayJob")["spec"]
    assert job["shutdownAfterJobFinishes"], "or there must be no ttlSecondsAfterFinished"


def test_rays_autoscaler_understands_the_cluster() -> None:
    """By Ray's own reading of the resource: CPUs, GPUs and the roles' resources of each group."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    made = resource("kuberay/raycluster.yaml", "RayCluster")
    made["metadata"]["namespace"] = "default"
    known = _derive_autoscaling_config_from_ray_cr(made)["available_node_types"]
    resources = {name: node["resources"] for name, node in known.items()}
    assert resources["headgroup"]["CPU"] == 0
    for role, gpus in (("trainer", 8), ("teacher", 1), ("reward", 1)):
        assert resources[role][role] == gpus == resources[role]["GPU"]
        assert not resources[role].keys() & (ROLES - {role})
        assert known[role]["max_workers"] >= 4


def test_object_stores_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own choice of their size, where none is given, fits into the pod's /dev/shm too."""
    from ray._private import utils

    spec = ray_cluster("rayjob")
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        shm = size(next(v for v in pod["volumes"] if v["name"] == "shm")["emptyDir"]["sizeLimit"])
        monkeypatch.setattr(utils, "get_shared_memory_bytes", lambda shm=shm: shm)
        memory = size(pod["containers"][0]["resources"]["limits"]["memory"])
        given = group["rayStartParams"].get("object-store-memory")
        store = utils.resolve_object_store_memory(memory, given and int(given))
        assert 1 << 30 < store < shm < memory, group.get("groupName", "head")


def size(quantity: str) -> int:
    """Bytes of a quantity of Kubernetes'."""
    assert quantity.endswith("Gi")
    return int(quantity.removesuffix("Gi")) << 30


def test_pods_are_told_before_they_go() -> None:
    for group in ray_cluster("rayjob")["workerGroupSpecs"]:
        spec = group["template"]["spec"]
        [container] = spec["containers"]
        script, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
        assert in_image(script).stat().st_mode & 0o111
        assert int(seconds) < spec["terminationGracePeriodSeconds"]
        assert {"nvidia.com/gpu", "cloud.google.com/gke-spot"} <= {t["key"] for t in spec["tolerations"]}
        shm = next(v for v in spec["volumes"] if v["name"] == "shm")
        assert shm["emptyDir"]["medium"] == "Memory"


def test_what_is_named_is_there() -> None:
    """Claims, secrets, config maps and services that pods name are made here, or by a command that is written down."""
    made = {(d["kind"], d["metadata"]["name"]) for n in ("storage", "redis") for d in documents(f"kuberay/{n}.yaml")}
    for name in ("raycluster", "rayjob"):
        spec = ray_cluster(name)
        text = (CLUSTER / "kuberay" / f"{name}.yaml").read_text(encoding="utf-8")
        for volume in (v for t in templates(spec) for v in t["spec"]["volumes"]):
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in made
            if "configMap" in volume:
                assert f"create configmap {volume['configMap']['name']} --from-file=cluster/recipe.yaml" in text
        redis = spec["gcsFaultToleranceOptions"]
        assert ("Service", redis["redisAddress"].partition(":")[0]) in made
        secret = redis["redisPassword"]["valueFrom"]["secretKeyRef"]
        how = (CLUSTER / "kuberay" / "redis.yaml").read_text(encoding="utf-8")
        assert f"create secret generic {secret['name']} --from-literal={secret['key']}=" in how
        for mount in (m for t in templates(spec) for c in t["spec"]["containers"] for m in c["volumeMounts"]):
            assert mount["name"] in {v["name"] for t in templates(spec) for v in t["spec"]["volumes"]}


def test_its_roles_are_those_of_the_recipe() -> None:
    """Workers, replicas and rewards find their nodes, on every kind of cluster."""
    recipe = sdxl()
    p = recipe.placement
    asked = {"trainer": p.worker_resources, "teacher": p.teacher_resources, "reward": p.reward_resources}
    assert {role: set(resources) for role, resources in asked.items()} == {role: {role} for role in ROLES}
    copies = {"trainer": p.workers, "teacher": p.teachers, "reward": p.rewards}
    for group in ray_cluster("rayjob")["workerGroupSpecs"]:
        role = group["groupName"]
        units = json.loads(json.loads(group["rayStartParams"]["resources"]))[role]
        assert group["replicas"] * units >= copies[role], "while a run begins, they come beside the head"
        assert group["maxReplicas"] * units >= (p.teachers_most if role == "teacher" else copies[role])
    for cloud in ("aws", "gcp"):
        for role, kind in launcher(cloud)["available_node_types"].items():
            if role in ROLES:
                assert kind["min_workers"] == 0
                assert kind["max_workers"] * kind["resources"][role] >= copies[role]


def launcher(cloud: str) -> dict[str, Any]:
    return dict(yaml.safe_load((CLUSTER / "launcher" / f"{cloud}.yaml").read_text(encoding="utf-8")))


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_rays_launcher_takes_it(cloud: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(launcher(cloud)))
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config({**launcher(cloud), "workers": 3}))
    config = launcher(cloud)
    assert set(config["available_node_types"]) == {"head", *ROLES}
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    notice = config["worker_start_ray_commands"][-1].split()[1]
    assert in_image(notice).stat().st_mode & 0o111
    for line in [*config["head_start_ray_commands"], *config["worker_start_ray_commands"][:2]]:
        check_ray_start(line)


def test_google_takes_its_machines() -> None:
    schema = json.loads((SCHEMAS / "compute.json").read_text(encoding="utf-8"))
    for kind in launcher("gcp")["available_node_types"].values():
        jsonschema.validate(kind["node_config"], schema)
        wrong = {**kind["node_config"], "scheduling": [{"provisioningModel": "SPOT"}]}
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**kind["node_config"], "machinetype": "n2"}, schema)


def test_ray_starts_these_machines_at_aws(tmp_path: Path) -> None:
    env = {**os.environ, "HOME": str(tmp_path), "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "local" / "aws_launch.py", CLUSTER / "launcher" / "aws.yaml"],
        env=env,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    started = json.loads(done.stdout)
    assert {name: machine["spot"] for name, machine in started.items()} == {"head": False, **dict.fromkeys(ROLES, True)}
    for role in ROLES:
        resources = started[role]["resources"]
        assert resources["GPU"] == resources[role], "as many of a role's resource as GPUs that EC2 says it has"


def check_ray_start(line: str) -> None:
    """Options of ``ray start`` that Ray has."""
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in (*parameter.opts, *parameter.secondary_opts)}
    words = shlex.split(line.replace("\n", " "))
    if "start" in words:
        given = {w.partition("=")[0] for w in words[words.index("start") + 1 :] if w.startswith("--")}
        assert given
        assert given <= known, given - known


@pytest.mark.parametrize("script", ["drain.sh", "launcher/spot_notice.sh", "slurm/raydmd.sbatch"])
def test_shell_is_clean(script: str) -> None:
    done = subprocess.run(
        [BIN / "shellcheck", "--external-sources", "--shell=bash", CLUSTER / script],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_the_image_is_clean() -> None:
    done = subprocess.run(
        [BIN / "hadolint", CLUSTER / "image" / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_has_what_it_copies_and_the_versions_that_are_tested() -> None:
    text = (CLUSTER / "image" / "Dockerfile").read_text(encoding="utf-8")
    let_in = (CLUSTER / "image" / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    for source in (s for line in re.findall(r"^COPY (.+)$", text, re.M) for s in line.split()[:-1]):
        assert (ROOT / source).exists()
        assert f"!{source}" in let_in
    installs = re.findall(r"pip install .+", text)
    assert installs
    assert all("--constraint constraints.txt" in line for line in installs)
    [python] = re.findall(r"^ARG PYTHON=(\S+)$", text, re.M)
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    from packaging.specifiers import SpecifierSet

    assert python in SpecifierSet(wanted)
    targets = set(re.findall(r"^FROM \S+ AS (\w+)$", text, re.M))
    named = {
        m for f in CLUSTER.rglob("*") if f.is_file() for m in re.findall(r"raydmd:([\w.]+-\w+)", f.read_text("utf-8"))
    }
    assert named
    assert {tag.rpartition("-")[2] for tag in named} <= targets
    assert {tag.rpartition("-")[0] for tag in named} == {__version__}, "images carry raydmd's version"


def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((CLUSTER / "services" / "compose.yaml").read_text(encoding="utf-8")))


def test_compose_takes_the_services(tmp_path: Path) -> None:
    def check(file: Path) -> int:
        command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", file]
        return subprocess.run(command, capture_output=True, check=False).returncode

    assert check(CLUSTER / "services" / "compose.yaml") == 0
    wrong = compose()
    wrong["services"]["mlflow"]["healthchek"] = {}
    (tmp_path / "compose.yaml").write_text(yaml.safe_dump(wrong))
    assert check(tmp_path / "compose.yaml") != 0


@pytest.mark.skipif(
    not shutil.which("docker") or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode != 0,
    reason="no docker compose here",
)
def test_docker_compose_takes_the_services() -> None:
    env = {"POSTGRES_PASSWORD": "a", "GRAFANA_PASSWORD": "b", "PATH": "/usr/local/bin:/usr/bin:/bin"}
    command = ["docker", "compose", "-f", CLUSTER / "services" / "compose.yaml", "config", "--quiet"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_services_are_closed_pinned_and_watched() -> None:
    config = compose()
    asked = set(re.findall(r"\$\{(\w+)", (CLUSTER / "services" / "compose.yaml").read_text(encoding="utf-8")))
    told = set(re.findall(r"^#?(\w+)=", (CLUSTER / "services" / "env.example").read_text(encoding="utf-8"), re.M))
    assert asked == told, "env.example names what compose.yaml asks"
    for name, service in config["services"].items():
        for port in service.get("ports", []):
            assert port.startswith("${RAYDMD_BIND:-127.0.0.1}:"), f"{name} must listen on loopback unless told"
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+[\w.-]*", service["image"]), f"{name}'s image is not pinned"
        assert service["healthcheck"]["test"]
        for other, condition in service.get("depends_on", {}).items():
            assert config["services"][other]
            assert condition["condition"] == "service_healthy"
        for volume in (v.split(":")[0] for v in service.get("volumes", []) if isinstance(v, str)):
            if volume.startswith("."):
                assert (CLUSTER / "services" / volume).exists()
            else:  # a path of the machine that is not there would be made, for root
                assert volume in config["volumes"]
    assert "ports" not in config["services"]["postgres"]
    assert config["services"]["postgres"]["networks"] == ["inner"]


@pytest.mark.parametrize("name", ["prometheus", "kubernetes"])
def test_prometheus_takes_it(name: str) -> None:
    file = CLUSTER / "prometheus" / f"{name}.yml"
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    schema = json.loads((SCHEMAS / "prometheus.json").read_text(encoding="utf-8"))
    jsonschema.validate(config, schema)
    config["scrape_configs"][0]["scrape_intervall"] = "10s"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config, schema)
    # Debian's knows no Kubernetes.
    if name == "prometheus" and (tool := shutil.which("promtool")):
        done = subprocess.run([tool, "check", "config", file], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_prometheus_finds_rays_list_where_ray_writes_it() -> None:
    from ray._private import ray_constants

    config = yaml.safe_load((CLUSTER / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    [ray] = [job for job in config["scrape_configs"] if job["job_name"] == "ray"]
    [file] = ray["file_sd_configs"][0]["files"]
    assert file == f"/tmp/ray/{ray_constants.PROMETHEUS_SERVICE_DISCOVERY_FILE}"
    [bind] = [v for v in compose()["services"]["prometheus"]["volumes"] if isinstance(v, dict)]
    assert (bind["source"], bind["target"], bind["read_only"]) == ("/tmp/ray", "/tmp/ray", True)
    assert bind["bind"] == {"create_host_path": False}, "Docker would make it for root alone"
    # In Kubernetes the ports are found by their name.
    kubernetes = yaml.safe_load((CLUSTER / "prometheus" / "kubernetes.yml").read_text(encoding="utf-8"))
    port = next(r["regex"] for r in kubernetes["scrape_configs"][0]["relabel_configs"] if "port_name" in str(r))
    for template in templates(ray_cluster("rayjob")):
        assert port in {p["name"] for p in template["spec"]["containers"][0]["ports"]}


def test_grafana_finds_its_dashboard_and_prometheus() -> None:
    provisioning = CLUSTER / "grafana" / "provisioning"
    sources = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text(encoding="utf-8"))
    services = compose()["services"]
    [source] = sources["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["type"] == "prometheus"
    assert "prometheus" in services
    boards = yaml.safe_load((provisioning / "dashboards" / "raydmd.yaml").read_text(encoding="utf-8"))
    folder = boards["providers"][0]["options"]["path"]
    mounted = dict(v.split(":")[:2] for v in services["grafana"]["volumes"])
    assert mounted["../grafana/raydmd-pools.json"] == f"{folder}/raydmd-pools.json"
    assert mounted["../grafana/provisioning"] == "/etc/grafana/provisioning"
    board = json.loads((CLUSTER / "grafana" / "raydmd-pools.json").read_text(encoding="utf-8"))
    assert board["uid"]
    assert board["panels"]


def in_image(path: str) -> Path:
    """Where a path of the image is here."""
    return ROOT / path.removeprefix("/opt/raydmd/")


def sdxl() -> Recipe:
    text = dry_run(["python", "experiments/amd_sdxl.py", "--recipe", "cluster/recipe.yaml"])
    return Recipe.model_validate(yaml.safe_load(text))
