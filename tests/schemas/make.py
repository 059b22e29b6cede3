"""Makes the schemas in this folder from other projects' repositories, cut down to what the manifests of cluster/ use.

    python tests/schemas/make.py --kuberay CHECKOUT --schemastore CHECKOUT --compute compute.v1.json

KubeRay's custom resource definitions (https://github.com/ray-project/kuberay, tag v1.7.0, Apache-2.0): version v1,
specs alone. Pod templates are left out, which are most of them; they are checked by Kubernetes' own schema. Fields that
a definition does not know are dropped by Kubernetes without a word; here they are refused.

Prometheus' configuration from SchemaStore (https://github.com/SchemaStore/schemastore, commit 3b6446ad, Apache-2.0), as
it is.

Google's machines (Instance of the Compute API, revision 20261106, as the package google-api-python-client has it in
googleapiclient/discovery_cache/documents/compute.v1.json, Apache-2.0): what cluster/launcher/gcp.yaml asks for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
VERSION = "v1.7.0"
KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs"}
SOURCE = "github.com/ray-project/kuberay, ray-operator/config/crd/bases, {} (Apache-2.0), by tests/schemas/make.py"
LEFT_OUT = ("description", "properties", "items")


def trim(schema: dict[str, Any]) -> dict[str, Any]:
    """A definition's schema as a JSON schema that refuses what it does not name."""
    properties = schema.get("properties", {})
    if {"metadata", "spec"} == properties.keys() and "containers" in properties["spec"].get("properties", {}):
        return {"type": "object", "$comment": "pod template"}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    kept = {k: v for k, v in schema.items() if not k.startswith("x-") and k not in LEFT_OUT}
    if properties:
        kept["properties"] = {k: trim(v) for k, v in properties.items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            kept["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        kept["additionalProperties"] = trim(schema["additionalProperties"])
    if "items" in schema:
        kept["items"] = trim(schema["items"])
    return kept


def kuberay(checkout: Path) -> dict[str, Any]:
    """Schemas of the resources that we write, by kind."""
    found: dict[str, Any] = {"$comment": SOURCE.format(VERSION)}
    for kind, plural in KINDS.items():
        path = f"{VERSION}:ray-operator/config/crd/bases/ray.io_{plural}.yaml"
        text = subprocess.run(["git", "-C", checkout, "show", path], capture_output=True, check=True).stdout
        [version] = [v for v in yaml.safe_load(text)["spec"]["versions"] if v["name"] == "v1"]
        found[kind] = trim(version["schema"]["openAPIV3Schema"]["properties"]["spec"])
    return found


def compute(document: Path) -> dict[str, Any]:
    """The request for a machine as a JSON schema that refuses what it does not name, with what it refers to."""
    known = json.loads(document.read_text(encoding="utf-8"))
    found: dict[str, Any] = {}

    def convert(schema: dict[str, Any]) -> dict[str, Any]:
        if "$ref" in schema:
            add(schema["$ref"])
            return {"$ref": f"#/$defs/{schema['$ref']}"}
        kept = {k: schema[k] for k in ("type", "enum") if k in schema and schema[k] != "any"}
        if schema.get("format") in ("int64", "uint64"):  # JSON of Google's has these as text, and takes numbers
            kept["type"] = ["string", "integer"]
        if "properties" in schema:
            kept |= {
                "properties": {k: convert(v) for k, v in schema["properties"].items()},
                "additionalProperties": False,
            }
        elif "additionalProperties" in schema:
            kept["additionalProperties"] = convert(schema["additionalProperties"])
        if "items" in schema:
            kept["items"] = convert(schema["items"])
        return kept

    def add(name: str) -> None:
        if name not in found:
            found[name] = {}
            found[name] = convert(known["schemas"][name])

    add("Instance")
    source = f"Google's Compute API, revision {known['revision']}, by tests/schemas/make.py"
    return {"$comment": source, "$ref": "#/$defs/Instance", "$defs": found}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kuberay", type=Path, required=True)
    parser.add_argument("--schemastore", type=Path, required=True)
    parser.add_argument("--compute", type=Path, required=True)
    asked = parser.parse_args()
    (HERE / "compute.json").write_text(json.dumps(compute(asked.compute), separators=(",", ":")) + "\n")
    (HERE / f"kuberay-{VERSION}.json").write_text(json.dumps(kuberay(asked.kuberay), separators=(",", ":")) + "\n")
    path = "HEAD:src/schemas/json/prometheus.json"
    text = subprocess.run(["git", "-C", asked.schemastore, "show", path], capture_output=True, check=True).stdout
    (HERE / "prometheus.json").write_bytes(json.dumps(json.loads(text), separators=(",", ":")).encode() + b"\n")


if __name__ == "__main__":
    main()
