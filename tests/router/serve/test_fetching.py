"""Images that a request only names: files below --root, URLs of public addresses, and nothing else."""

import asyncio
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

import router.serve.fetching as fetching
from router import Router, RouterError
from router.serve.app import create_app
from router.serve.errors import FetchError
from router.serve.fetching import is_public, read_below
from router.serve.limits import RequestLimits
from tests.router.serve.conftest import PICTURES
from tests.router.serve.test_app import assert_problem, assert_row, results, serve, service_of

pytestmark = pytest.mark.slow

URL = "/v1/tasks/a/predict"
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory of pictures, with ways out of it."""
    (tmp_path / "secret.png").write_bytes(PICTURES[0])
    inner = tmp_path / "root" / "inner"
    inner.mkdir(parents=True)
    (inner / "a b.png").write_bytes(PICTURES[0])
    (inner / "large.png").write_bytes(bytes(30_000))
    (tmp_path / "root" / "out").symlink_to(tmp_path)
    (tmp_path / "root" / "out.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "root" / "in.png").symlink_to(inner / "a b.png")
    os.mkfifo(tmp_path / "root" / "pipe")
    return tmp_path / "root"


def test_files_below_a_root_may_be_named(shared: Router, root: Path) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        (row,) = results(await client.post(URL, json={"path": "inner/a b.png"}))
        assert_row(row, shared.run(PICTURES[0], "a")[0])
        asked = [{"path": "inner/a b.png", "task": "a"}, {"path": "inner/none.png", "task": "b"}]
        rows = results(await client.post("/v1/predict", json={"images": asked}))
        assert [row["error"] and row["error"]["status"] for row in rows] == [None, 404]
        assert_problem(await client.post(URL, json={"url": "http://example.org/a"}), 400, "opens no URLs: .*allow-urls")
        for path, status, text in (
            ("../secret.png", 400, "without '..'"),
            ("inner/../../secret.png", 400, "without '..'"),
            (str(root / "inner" / "a b.png"), 400, "below the server's directory"),
            ("", 400, "below the server's directory"),
            ("inner//a b.png", 400, "below the server's directory"),
            ("out/secret.png", 404, "links are not followed"),
            ("out.png", 400, "links are not followed"),
            ("in.png", 400, "links are not followed"),
            ("pipe", 400, "not a regular file"),
            ("inner", 400, "not a regular file"),
            ("inner/none.png", 404, "no readable file"),
            ("inner/a b.png/x", 404, "no readable file"),
            ("nul\0", 404, "no readable file"),
            ("x" * 300, 404, "no readable file"),
            ("x/" * 3000, 400, "at most 4096 characters"),
            ("inner/large.png", 413, "more than 20000 bytes"),
        ):
            refused = await client.post(URL, json={"path": path})
            assert_problem(refused, status, text)
            assert str(root.parent) not in refused.json()["detail"].replace(path, "")
        assert_problem(
            await client.post(URL, content=b'{"path": "half \\ud800"}', headers=JSON), 404, "no readable file"
        )
        assert service_of(client).held.size_bytes == 0

    serve(shared, work, root=root, limits=RequestLimits(body_bytes=20_000))


def test_what_changes_while_it_is_read_leads_nowhere(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that becomes a link out of the root, once the way to it is open; and a file that becomes a link."""
    secret = root.parent / "away"
    secret.mkdir()
    (secret / "a b.png").write_bytes(b"secret")
    opened, stat = os.open, os.stat

    def swapping(name: Any, *args: Any, **options: Any) -> int:
        found = opened(name, *args, **options)
        if name == "inner":
            (root / "inner").rename(root / "moved")
            (root / "inner").symlink_to(secret)
        return found

    monkeypatch.setattr(os, "open", swapping)
    assert read_below(root, "inner/a b.png", 10**6) == PICTURES[0]
    monkeypatch.setattr(os, "open", opened)

    def linking(name: Any, *args: Any, **options: Any) -> os.stat_result:
        found = stat(name, *args, **options)
        if name == "a b.png":
            (root / "moved" / "a b.png").unlink()
            (root / "moved" / "a b.png").symlink_to(secret / "a b.png")
        return found

    monkeypatch.setattr(os, "stat", linking)
    with pytest.raises(FetchError, match="links are not followed"):
        read_below(root, "moved/a b.png", 10**6)


def test_a_root_must_be_there(shared: Router, tmp_path: Path) -> None:
    with pytest.raises(RouterError, match="expected a directory"):
        create_app(shared, root=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True), ("2606:2800:21f:cb07::1", True), ("127.0.0.1", False), ("10.1.2.3", False),
        ("172.16.0.1", False), ("192.168.1.1", False), ("169.254.169.254", False), ("100.64.0.1", False),
        ("0.0.0.0", False), ("255.255.255.255", False), ("224.0.0.1", False), ("240.0.0.1", False), ("::1", False),
        ("::", False), ("fe80::1", False), ("fe80::1%eth0", False), ("fc00::1", False), ("fec0::1", False),
        ("ff02::1", False), ("::ffff:127.0.0.1", False), ("64:ff9b::7f00:1", False), ("64:ff9b::a00:1", False),
        ("2002:7f00:1::1", False), ("64:ff9b::5db8:d70e", False), ("nonsense", False),
    ],
)  # fmt: skip
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


class Answers(BaseHTTPRequestHandler):
    """A web server of pictures, and of all kinds of trouble."""

    asked: list[tuple[str, str]]

    def do_GET(self) -> None:
        self.asked.append((self.headers["Host"], self.path))
        kind = self.path.strip("/")
        if kind.startswith("to="):
            self.send_response(302)
            self.send_header("Location", kind[3:])
            self.end_headers()
        elif kind == "slow":
            self.send_response(200)
            self.end_headers()
            with_pause = threading.Event()
            try:
                for _ in range(100):
                    self.wfile.write(b"x")
                    with_pause.wait(0.05)
            except OSError:
                pass
        elif kind == "zipped":
            self.send_response(200)
            self.send_header("Content-Encoding", "gzip")
            self.end_headers()
        else:
            body = bytes(30_000) if kind == "large" else PICTURES[0]
            self.send_response(200 if kind != "gone" else 410)
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def served(server: ThreadingHTTPServer) -> Iterator[ThreadingHTTPServer]:
    Answers.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def web() -> Iterator[ThreadingHTTPServer]:
    with served(ThreadingHTTPServer(("127.0.0.1", 0), Answers)) as server:
        yield server


@pytest.fixture
def secure_web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """With a certificate for pictures.test, of an authority that this process trusts."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("pictures.test").configure_cert(context)

    class Secure(ThreadingHTTPServer):
        def finish_request(self, request: Any, address: Any) -> None:
            with suppress(ssl.SSLError, ConnectionError), context.wrap_socket(request, server_side=True) as wrapped:
                super().finish_request(wrapped, address)

    with served(Secure(("127.0.0.1", 0), Answers)) as server:
        yield server


@contextmanager
def names(monkeypatch: pytest.MonkeyPatch, table: dict[str, list[str]]) -> Iterator[list[str]]:
    """A name server of ours: host -> addresses, in turn."""
    asked: list[str] = []

    def resolve(host: str, port: Any, **options: Any) -> list[Any]:
        asked.append(host)
        if host not in table:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port or 80)) for address in table[host]]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    yield asked


def test_urls_of_private_addresses_are_refused(
    shared: Router, web: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, by number, in any spelling; with nothing patched but the names that stand for hosts of others."""

    async def work(client: httpx.AsyncClient) -> None:
        port = web.server_address[1]
        for host in ("127.0.0.1", "localhost", "2130706433", "0x7f.1", "0", "[::1]", "[::ffff:127.0.0.1]", "10.0.0.1"):
            refused = await client.post(URL, json={"url": f"http://{host}:{port}/a.png"})
            assert refused.status_code in (400, 422), host
            assert "not public" in refused.json()["detail"] or "not known" in refused.json()["detail"], refused.text
        for url in (
            "file:///etc/passwd",
            "ftp://example.org/a",
            "http://user:pw@example.org/",
            "http://",
            "x",
        ):
            assert (await client.post(URL, json={"url": url})).status_code == 400, url
        assert_problem(await client.post(URL, json={"path": "a.png"}), 400, "opens no paths: .*--root")
        with names(monkeypatch, {"mixed.test": ["93.184.215.14", "127.0.0.1"]}):
            assert_problem(await client.post(URL, json={"url": "http://mixed.test/"}), 400, "not public")
        assert Answers.asked == []

    serve(shared, work, allow_urls=True)


def test_the_connection_goes_to_the_address_that_was_checked(
    shared: Router, web: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The local server stands for a public one: only its address counts as such."""
    monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1")
    port = web.server_address[1]

    async def work(client: httpx.AsyncClient) -> None:
        with names(monkeypatch, {"pictures.test": ["127.0.0.1"], "inner.test": ["10.0.0.1"]}) as asked:
            base = f"http://pictures.test:{port}"
            (row,) = results(await client.post(URL, json={"url": f"{base}/a.png"}))
            assert_row(row, shared.run(PICTURES[0], "a")[0])
            assert asked == ["pictures.test"], "looked up once: a second answer could be another"
            assert Answers.asked == [(f"pictures.test:{port}", "/a.png")]
            (row,) = results(await client.post(URL, json={"url": f"{base}/to=/a.png"}))
            assert row["error"] is None
            for path, status, text in (
                ("to=http://inner.test/a.png", 400, "not public"),
                ("to=file:///etc/passwd", 400, "expected http"),
                ("to=to=to=to=to=a", 422, "more than 3 redirects"),
                ("large", 413, "more than 20000 bytes"),
                ("gone", 422, "answered 410"),
                ("zipped", 422, "compressed"),
            ):
                path = path if not path.startswith("to=to=") else "to=" + "/to=" * 4 + "/a"
                refused = await client.post(URL, json={"url": f"{base}/{path}"})
                assert_problem(refused, status, text)
            assert_problem(await client.post(URL, json={"url": "http://nobody.test/"}), 422, "host is not known")
            assert_problem(
                await client.post(URL, json={"url": f"http://pictures.test:{free_port()}/"}), 422, "ConnectError"
            )
            rows = results(await client.post(URL, json={"images": [{"url": f"{base}/a"}, {"url": f"{base}/gone"}]}))
            assert [row["error"] is None for row in rows] == [True, False]
            monkeypatch.setattr(fetching, "URL_S", 0.3)
            assert_problem(await client.post(URL, json={"url": f"{base}/slow"}), 422, "not fetched within 0.3 s")
        assert service_of(client).held.size_bytes == 0

    serve(shared, work, allow_urls=True, limits=RequestLimits(body_bytes=20_000))


def test_a_server_over_https_must_show_a_certificate_of_the_name_that_was_asked(
    shared: Router, secure_web: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the connection goes to an address."""
    monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1")
    port = secure_web.server_address[1]

    async def work(client: httpx.AsyncClient) -> None:
        with names(monkeypatch, {"pictures.test": ["127.0.0.1"], "other.test": ["127.0.0.1"]}):
            (row,) = results(await client.post(URL, json={"url": f"https://pictures.test:{port}/a.png"}))
            assert_row(row, shared.run(PICTURES[0], "a")[0])
            Answers.asked.clear()
            for url in (f"https://other.test:{port}/a.png", f"http://pictures.test:{port}/a.png"):
                assert_problem(await client.post(URL, json={"url": url}), 422, "cannot be fetched")
        assert Answers.asked == []

    serve(shared, work, allow_urls=True)


def test_a_server_of_an_authority_that_nobody_trusts_is_refused(
    shared: Router, secure_web: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1")
    url = f"https://pictures.test:{secure_web.server_address[1]}/a.png"

    async def work(client: httpx.AsyncClient) -> None:
        with names(monkeypatch, {"pictures.test": ["127.0.0.1"]}):
            assert_problem(await client.post(URL, json={"url": url}), 422, "cannot be fetched: ConnectError")
        assert Answers.asked == []

    serve(shared, work, allow_urls=True)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def test_bytes_that_are_fetched_count_as_held(shared: Router, root: Path) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        asked = [{"path": "inner/large.png"}] * 4
        refused = await client.post(URL, json={"images": asked})
        assert_problem(refused, 429, "fill the memory")
        await asyncio.sleep(0.05)
        assert service_of(client).held.size_bytes == 0

    serve(shared, work, root=root, limits=RequestLimits(held_bytes=100_000))
