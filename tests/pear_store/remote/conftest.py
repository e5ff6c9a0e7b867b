"""Servers on loopback for the tests of remotes."""

import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import boto3
import pytest

from pear_store.remote import retry
from pear_store.remote.place import Place
from pear_store.remote.remotes import Remote
from tests.pear_store.remote.faults import Team
from tests.pear_store.remote.real_servers import AZURITE_KEY, KEYS, Server, free_port, wait_for
from tests.pear_store.remote.servers import RangeHandler, StaticHandler


@pytest.fixture(scope="session")
def s3_options() -> Iterator[dict[str, str]]:
    """The options of an S3 server with the bucket "bucket"."""
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
def listen() -> Iterator[Callable[..., int]]:
    """Has a handler answer on loopback, and returns the port."""
    servers = []

    def start(handler: Callable[..., http.server.BaseHTTPRequestHandler], host: str = "127.0.0.1") -> int:
        server = http.server.ThreadingHTTPServer((host, 0), handler)
        server.daemon_threads = True
        threading.Thread(target=partial(server.serve_forever, 0.02), daemon=True).start()
        servers.append(server)
        return server.server_port

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def serve(listen: Callable[..., int]) -> Callable[..., str]:
    """Serves a directory over HTTP, and returns its URL."""

    def start(folder: Path, handler: type[StaticHandler] = RangeHandler) -> str:
        return f"http://127.0.0.1:{listen(partial(handler, directory=str(folder)))}"

    return start


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An OpenSSH server: "url" up to the path, and the options of a client."""
    daemon = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")
    if daemon is None or os.getuid() != 0:
        pytest.skip("needs OpenSSH's server, and root to start it")
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


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials that the servers of others take."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)


@contextmanager
def running(kind: str, folder: Path) -> Iterator[Server]:
    made = Server(kind, folder / "served")
    try:
        yield made.start()
    finally:
        made.kill()


@pytest.fixture
def server(request: pytest.FixtureRequest, tmp_path: Path, keys: None) -> Iterator[Server]:
    """The server that a test is parametrised with (indirect), else localbucket; it has the bucket "bucket"."""
    with running(getattr(request, "param", "localbucket"), tmp_path) as made:
        if made.kind != "s3rver":
            made.make_bucket()
        yield made


@pytest.fixture(scope="session")
def localbucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running("localbucket", tmp_path_factory.mktemp("localbucket")) as made:
        made.make_bucket()
        yield made


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Azure's emulator, with the container "bucket"."""
    import base64
    import email.utils
    import hashlib
    import hmac
    import http.client

    with running("azurite-blob", tmp_path_factory.mktemp("azurite")) as made:
        date = email.utils.formatdate(usegmt=True)
        lines = ["PUT", *[""] * 11, f"x-ms-date:{date}", "x-ms-version:2021-08-06"]
        text = "\n".join([*lines, "/devstoreaccount1/devstoreaccount1/bucket", "restype:container"])
        signed = hmac.new(base64.b64decode(AZURITE_KEY), text.encode(), hashlib.sha256).digest()
        headers = {
            "x-ms-date": date, "x-ms-version": "2021-08-06", "Content-Length": "0",
            "Authorization": f"SharedKey devstoreaccount1:{base64.b64encode(signed).decode()}",
        }  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", made.port)
        connection.request("PUT", "/devstoreaccount1/bucket?restype=container", headers=headers)
        assert connection.getresponse().status == 201
        connection.close()
        yield made


@pytest.fixture(params=["memory", "directory", "objects", "localbucket", "azurite", "sftp"])
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
    elif request.param == "azurite":
        azurite = request.getfixturevalue("azurite")
        environment = request.getfixturevalue("monkeypatch")
        environment.setenv("AZURE_STORAGE_ACCOUNT_NAME", "devstoreaccount1")
        environment.setenv("AZURE_STORAGE_ACCOUNT_KEY", AZURITE_KEY)
        options = {"endpoint": f"http://127.0.0.1:{azurite.port}/devstoreaccount1"}
        made = ObjectPlace(f"az://bucket/{tmp_path.name}-{os.urandom(4).hex()}", options)
    elif request.param == "localbucket":
        request.getfixturevalue("keys")
        options = request.getfixturevalue("localbucket").options
        made = ObjectPlace(f"s3://bucket/{tmp_path.name}-{os.urandom(4).hex()}", options)
    else:
        options = request.getfixturevalue("s3_options")
        made = ObjectPlace(f"s3://bucket/{tmp_path.name}-{os.urandom(4).hex()}", options)
    yield made
    made.close()


@pytest.fixture(params=["directory", "localbucket", "sftp"])
def reachable(request: pytest.FixtureRequest, tmp_path: Path) -> Remote:
    """An empty place that processes of their own can write to, by its URL and options."""
    if request.param == "directory":
        (tmp_path / "remote").mkdir()
        return Remote("origin", str(tmp_path / "remote"))
    if request.param == "sftp":
        server = request.getfixturevalue("sshd")
        options = {name: server[name] for name in ("key_file", "known_hosts")}
        return Remote("origin", f"{server['url']}{tmp_path}/remote", options)
    request.getfixturevalue("keys")
    options = request.getfixturevalue("localbucket").options
    return Remote("origin", f"s3://bucket/{tmp_path.name}-{os.urandom(4).hex()}", options)


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
