"""A Hugging Face Hub of this machine: a folder of repositories, behind the calls that huggingface_hub makes.

What a file holds comes from another host than the API, by a redirect, as on the real one.
"""

import base64
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

SHA = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Repositories lie in `folder` as OWNER/NAME@REVISION. `requests` are those made: (method, path, token)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[tuple[str, str, str | None]] = []
        self.private: dict[str, str] = {}
        """The token that a repository asks for"""
        self.gated: set[str] = set()
        self.sizes: dict[str, int] = {}
        """What the API claims of a file, where that is not the truth"""
        self.endless: set[str] = set()
        """Files whose bytes never end"""
        self.sent = 0
        self.answers: dict[str, bytes] = {}
        """What paths of the API answer, whatever was asked"""
        self.url = self.other_host = ""

    def paths(self, method: str) -> list[str]:
        return [path for made, path, _ in self.requests if made == method]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self._note()
        if path in self.hub.answers:
            return self._send(200, self.hub.answers[path])
        match path.strip("/").split("/"):
            case ["api", "models", owner, name, *rest]:
                revision = unquote(rest[1]) if rest[:1] == ["revision"] else "main"
                if self._repository(f"{owner}/{name}", revision):
                    self._json({"id": f"{owner}/{name}", "sha": SHA, "private": False, "siblings": []})
            case ["cdn", owner, name, revision, *file]:
                self._content(f"{owner}/{name}@{unquote(revision).replace('/', '_')}/{unquote('/'.join(file))}")
            case [owner, name, "resolve", revision, *file]:
                if self._repository(f"{owner}/{name}", unquote(revision)):
                    there = f"{self.hub.other_host}/cdn/{owner}/{name}/{revision}/{'/'.join(file)}"
                    self._send(302, b"", {"Location": there})
            case _:
                self._send(404, b"no such page")
        return None

    def do_POST(self) -> None:
        path = self._note()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        match path.strip("/").split("/"):
            case ["api", "models", owner, name, "paths-info", revision]:
                folder = self._repository(f"{owner}/{name}", unquote(revision))
                if folder:
                    names = parse_qs(body.decode())["paths"]
                    self._json([self._info(folder, name) for name in names if (folder / name).exists()])
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                (self.hub.folder / f"{asked['organization']}/{asked['name']}@main").mkdir(parents=True)
                self._json({"url": f"{self.hub.url}/{asked['organization']}/{asked['name']}"})
            case ["api", "validate-yaml"]:
                self._json({"errors": [], "warnings": []})
            case ["api", "models", owner, name, "preupload", revision]:
                files = json.loads(body)["files"]
                self._json({"files": [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in files]})
            case ["api", "models", owner, name, "commit", revision]:
                folder = self._repository(f"{owner}/{name}", unquote(revision))
                for line in map(json.loads, body.splitlines()):
                    if folder and line["key"] == "file":
                        target = folder / line["value"]["path"]
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(base64.b64decode(line["value"]["content"]))
                self._json({"commitUrl": f"{self.hub.url}/{owner}/{name}/commit/{SHA}", "commitOid": SHA})
            case _:
                self._send(404, b"no such page")

    def _note(self) -> str:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path, self.headers.get("Authorization")))
        return path

    def _repository(self, repository: str, revision: str) -> Path | None:
        """The folder of a revision; None: the refusal was sent."""
        token = self.hub.private.get(repository)
        known = list(self.hub.folder.glob(f"{repository}@*"))
        if not known or (token and self.headers.get("Authorization") != f"Bearer {token}"):
            self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
        elif repository in self.hub.gated:
            self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        elif not (folder := self.hub.folder / f"{repository}@{revision.replace('/', '_')}").exists():
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            return folder
        return None

    def _info(self, folder: Path, name: str) -> dict[str, object]:
        commit = {"id": SHA, "title": "as it was", "date": "2026-01-01T00:00:00.000Z"}
        shared = {"path": name, "oid": SHA, "lastCommit": commit}
        if (folder / name).is_dir():
            return {"type": "directory", "size": 0, **shared}
        return {"type": "file", "size": self.hub.sizes.get(name, (folder / name).stat().st_size), **shared}

    def _content(self, path: str) -> None:
        name = path.rpartition("/")[2]
        if name not in self.hub.endless:
            return self._send(200, (self.hub.folder / path).read_bytes())
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            while True:
                self.wfile.write(bytes(1 << 16))
                self.hub.sent += 1 << 16
        except OSError:
            return None

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def running_hub(folder: Path) -> Iterator[FakeHub]:
    hub = FakeHub(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url, hub.other_host = (f"http://{host}:{server.server_port}" for host in ("127.0.0.1", "localhost"))
    thread = Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def pointed_at(hub: FakeHub, patch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Has this process's huggingface_hub ask the fake, as HF_ENDPOINT has a new process do."""
    from huggingface_hub import close_session, constants

    patch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    close_session()
    yield hub
    close_session()


def run_against(hub: FakeHub, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    settings = {**inherited, "HF_ENDPOINT": hub.url, "HF_HOME": str(hub.folder / ".home"), **environment}
    return subprocess.run(command, capture_output=True, text=True, env=settings)
