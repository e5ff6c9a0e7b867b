"""Servers on loopback for the tests of remotes."""

import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from pear_store.remote import retry
from pear_store.remote.place import Place
from tests.pear_store.remote.faults import Team
from tests.pear_store.remote.servers import RangeHandler, StaticHandler


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


@pytest.fixture(scope="session")
def s3_options() -> Iterator[dict[str, str]]:
    """The options of an S3 server with the bucket "bucket"."""
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("moto.server")
    port = free_port()
    # in a process of its own: a thread would keep other tests from forking
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(port)
    endpoint = f"http://127.0.0.1:{port}"
    names = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **names)
    client.create_bucket(Bucket="bucket")
    client.close()
    before = {name: os.environ.get(name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test")
    yield {"endpoint": endpoint, "region": "us-east-1"}
    process.terminate()
    process.wait()
    for name, value in before.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Serves a directory over HTTP, and returns its URL."""
    servers = []

    def start(folder: Path, handler: type[StaticHandler] = RangeHandler) -> str:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
        server.daemon_threads = True
        threading.Thread(target=partial(server.serve_forever, 0.02), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An OpenSSH server: "url" up to the path, and the options of a client."""
    daemon = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")
    if daemon is None or os.getuid() != 0:
        pytest.skip("needs OpenSSH's server, and root to start it")
    pytest.importorskip("paramiko")
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    port = free_port()
    Path("/run/sshd").mkdir(exist_ok=True)
    (folder / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile {folder}/pid\nStrictModes no\n"
        f"AuthorizedKeysFile {folder}/user.pub\nPasswordAuthentication no\nUsePAM no\nPermitRootLogin yes\n"
        "Subsystem sftp internal-sftp\nMaxStartups 100\n"
    )
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    process = subprocess.Popen([daemon, "-D", "-e", "-f", folder / "config"], stderr=subprocess.DEVNULL)
    wait_for(port)
    yield {
        "url": f"sftp://root@127.0.0.1:{port}",
        "key_file": str(folder / "user"),
        "known_hosts": str(folder / "known_hosts"),
    }
    process.terminate()
    process.wait()


@pytest.fixture(params=["memory", "directory", "objects", "sftp"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Each kind of place that can be written, empty."""
    from pear_store.remote.directory import DirectoryPlace
    from pear_store.remote.memory import MemoryPlace
    from pear_store.remote.objects import ObjectPlace
    from pear_store.remote.sftp import SftpPlace

    made: Place
    if request.param == "memory":
        made = MemoryPlace()
    elif request.param == "directory":
        (tmp_path / "remote").mkdir()
        made = DirectoryPlace(tmp_path / "remote")
    elif request.param == "sftp":
        server = request.getfixturevalue("sshd")
        options = {name: server[name] for name in ("key_file", "known_hosts")}
        made = SftpPlace(f"{server['url']}{tmp_path}/remote", options)
    else:
        options = request.getfixturevalue("s3_options")
        made = ObjectPlace(f"s3://bucket/{tmp_path.name}-{os.urandom(4).hex()}", options)
    yield made
    made.close()


@pytest.fixture
def team(tmp_path: Path) -> Iterator[Team]:
    """Stores that share a place in memory."""
    made = Team(tmp_path)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried again at once."""
    monkeypatch.setattr(retry, "_LONGEST_WAIT_S", 0.0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """These tests run last: obstore's threads stay, and a process with threads is never forked to read (`can_fork`)."""
    items.sort(key=lambda item: Path(__file__).parent in item.path.parents)
