"""Dockerfile, compose.yaml and deploy/: held against what they name, and by linters. Nothing is built."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from click.testing import CliRunner

from router import Backbone, Router
from router.serve.app import create_app
from router.serve.batcher import Batcher
from router.serve.cli import main
from router.serve.metrics import Metrics
from tests.router.serve.conftest import PICTURES, run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
DEPLOY = ROOT / "deploy"
PROMETHEUS = DEPLOY / "prometheus"


def tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def check(*command: str | Path) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def expressions() -> list[str]:
    """Every PromQL expression of the dashboard and the rules."""
    board = json.loads((DEPLOY / "grafana/dashboards/pear-serve.json").read_text())
    rules = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return [*found, *(rule["expr"] for group in rules["groups"] for rule in group["rules"])]


def test_every_expression_names_metrics_that_there_are(backbone: Backbone, template: Path) -> None:
    async def metrics_of(router: Router) -> str:
        metrics = Metrics()
        batcher = Batcher(router, watch=metrics)
        routes = [metrics.route(router, batcher)]
        app = create_app(router, batcher=batcher, counted=metrics.counted, more_routes=routes)
        async with app.state.service.lifespan(app):
            await app.state.service.start()
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
                await client.post("/v1/tasks/a/predict", content=PICTURES[0], headers={"Content-Type": "image/png"})
                return (await client.get("/metrics")).text

    with Router(backbone, template, slot_bytes=10**8) as router:
        text = run(metrics_of(router))
    there = set(re.findall(r"^(pear_\w+)", text, re.MULTILINE))
    labels = {name for one in re.findall(r"\{(.*)\}", text) for name in re.findall(r'(\w+)="', one)}
    assert len(expressions()) >= 20
    for expression in expressions():
        named = set(re.findall(r"\bpear_\w+", expression))
        assert named <= there, f"{expression}: {named - there}"
        used = {name for one in re.findall(r"\{(.*?)\}", expression) for name in re.findall(r"(\w+)[!=]", one)}
        used |= {name.strip() for one in re.findall(r"by \((.*?)\)", expression) for name in one.split(",")}
        assert used - {"job"} <= labels, f"{expression}: {used - labels}"


def test_promtool_reads_rules_configuration_and_every_expression(tmp_path: Path) -> None:
    promtool = tool("promtool")
    check(promtool, "check", "rules", PROMETHEUS / "rules.yml")
    check(promtool, "check", "config", "--syntax-only", PROMETHEUS / "prometheus.yml")
    rules = [
        {"record": f"it:{number}", "expr": expression.replace("$__rate_interval", "1m")}
        for number, expression in enumerate(expressions())
    ]
    (tmp_path / "all.yml").write_text(json.dumps({"groups": [{"name": "all", "rules": rules}]}))
    check(promtool, "check", "rules", tmp_path / "all.yml")


def test_hadolint_finds_nothing_in_the_dockerfiles() -> None:
    check(tool("hadolint"), "Dockerfile")
    check(tool("hadolint"), "deploy/ray/Dockerfile")


def test_the_compose_file_follows_its_schema() -> None:
    check(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", "compose.yaml")


def test_systemd_finds_nothing_in_the_unit_and_its_options_are_the_command_s(tmp_path: Path) -> None:
    text = (DEPLOY / "systemd/pear-serve@.service").read_text()
    (command,) = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
    assert command.startswith("/opt/pear/bin/pear-serve --port %i ")
    known = CliRunner().invoke(main, ["--help"]).output
    assert all(f"{option} " in known for option in command.split() if option.startswith("--"))
    (stop_s,) = re.findall(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)
    (drain_s,) = (option.to_info_dict()["default"] for option in main.params if option.name == "drain_s")
    assert int(stop_s) > drain_s
    unit = tmp_path / "pear-serve@8091.service"
    unit.write_text(text.replace(command.split()[0], "/bin/true"))
    done = subprocess.run([tool("systemd-analyze"), "verify", "--man=no", unit], capture_output=True, text=True)
    assert "pear-serve" not in done.stderr, done.stderr


def test_services_are_kept_small_and_reached_from_this_machine_only() -> None:
    assert set(COMPOSE["services"]) == {"pear", "prometheus", "grafana"}
    for name, service in COMPOSE["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        for volume in service["volumes"]:
            source = volume["source"] if isinstance(volume, dict) else volume.split(":")[0]
            if source.startswith("./deploy"):
                assert (ROOT / source).is_dir(), source
                assert volume.endswith(":ro")
    assert COMPOSE["services"]["pear"]["volumes"][0]["read_only"] is True
    user = re.findall(r"^USER (\S+)", DOCKERFILE, re.MULTILINE)
    assert user == ["10001:10001"]


def test_what_the_files_name_fits_together() -> None:
    """Options that the command has, ports, paths and names that another file has."""
    invoke = partial(CliRunner().invoke, main)
    known = invoke(["--help"]).output
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)
    (command,) = re.findall(r"^CMD (.*)$", DOCKERFILE, re.MULTILINE)
    options = [*json.loads(entry)[1:], *json.loads(command), *COMPOSE["services"]["pear"]["command"]]
    for option in (one.partition("=")[0] for one in options if one.startswith("--")):
        assert f"{option} " in known, option
    assert json.loads(entry)[0] == "pear-serve"
    assert "default: 8090" in " ".join(known.split())
    assert ":8090/readyz" in DOCKERFILE
    scrape: dict[str, Any] = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"][0]
    assert scrape["static_configs"] == [{"targets": ["pear:8090"]}]
    assert scrape["authorization"]["credentials_file"] == "/run/secrets/pear_token"
    source = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"][0]
    board = json.loads((DEPLOY / "grafana/dashboards/pear-serve.json").read_text())
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {source["uid"]}
    assert source["url"] == "http://prometheus:9090"
    provider = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/files.yaml").read_text())["providers"][0]
    folder = provider["options"]["path"]
    mounts = dict(volume.split(":")[:2] for volume in COMPOSE["services"]["grafana"]["volumes"])
    assert mounts["./deploy/grafana/dashboards"] == folder
    home = COMPOSE["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{folder}/pear-serve.json"


def test_the_image_has_the_pair_of_torch_and_torchvision_that_is_tested() -> None:
    pinned = (ROOT / "constraints.txt").read_text()
    assert re.search(r"^torch==", pinned, re.MULTILINE)
    assert re.search(r"^torchvision==", pinned, re.MULTILINE)
    installs = re.findall(r"pip install (.*)", DOCKERFILE)
    assert len(installs) == 2
    assert all(one.startswith("--constraint constraints.txt ") for one in installs)
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = {
        part for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE) for part in line.split()
    }
    assert copied == set(kept)
