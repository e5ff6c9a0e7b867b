"""pear-serve as a process: its life, its signals, its refusals."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from click.testing import CliRunner

import router.serve.cli
from pear_store import Store, Task
from router import Router, RouterError
from router.serve.cli import main
from tests.router.serve.conftest import PICTURES

ROOT = Path(__file__).parents[3]
RAW = {"Content-Type": "image/png"}
TOKEN = "a-token-to-use-tasks"


class Process:
    """A server in a process of its own, and what it says."""

    def __init__(self, args: list[str], env: dict[str, str]) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, *args], stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **env}
        )
        self.port = 0
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if (found := re.search(r"serving on http://127.0.0.1:(\d+)", line)) is not None:
                self.port = int(found[1])
                break
        assert self.port, self.lines
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines += self.process.stderr

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60, trust_env=False, **options)

    def ended(self) -> int:
        code = self.process.wait(60)
        self.reader.join(10)
        return code

    def wait_for(self, text: str) -> None:
        pause = threading.Event()
        for _ in range(2000):
            if any(text in line for line in self.lines):
                return
            pause.wait(0.02)
        raise AssertionError(f"{text!r} is not in {self.lines}")


@contextmanager
def served(*args: str, code: str = "", **env: str) -> Iterator[Process]:
    start = ["-c", f"{code}\nfrom router.serve.cli import main\nmain()"] if code else ["-m", "router.serve"]
    process = Process([*start, "--port", "0", "--device", "cpu", *args], env)
    try:
        with process.client() as client:
            for _ in range(600):
                if client.get("/readyz").status_code == 200:
                    break
                threading.Event().wait(0.05)
        yield process
    finally:
        process.process.kill()
        process.process.wait()
        process.reader.join(10)
        assert process.process.stderr is not None
        process.process.stderr.close()


@pytest.mark.slow
def test_a_server_lives_and_ends(filled: Path, router: Router, task_maker: Callable[..., Task]) -> None:
    args = ("--store", str(filled), "--preload", "a,b", "--max-wait-ms", "60000", "--max-batch", "1")
    with served(*args, "--refresh-s", "0") as process, process.client() as client:
        row = client.post("/v1/tasks/a/predict", content=PICTURES[0], headers=RAW).json()["results"][0]
        expected = router.run(PICTURES[0], "a")[0]
        found = torch.tensor([one["probability"] for one in row["top"]])
        torch.testing.assert_close(found, torch.tensor([p for _, p in expected.topk(3)]), rtol=1e-5, atol=1e-5)
        client.get("/v1/tasks/made-up-name")
        metrics = client.get("/metrics").text
        for line in (
            'pear_requests_total{path="/v1/tasks/{task}/predict",status="200",task="a"} 1.0',
            'pear_requests_total{path="/v1/tasks/{task}",status="404",task="other"} 1.0',
            "pear_batch_rows_count 1.0",
            "pear_decode_seconds_count 1.0",
            "pear_slot_misses_total 0.0",
            "pear_loaded_tasks 2.0",
            "pear_queue_images 0.0",
        ):
            assert line in metrics, line
        assert "made-up-name" not in metrics
        client.post("/v1/predict", content=b"x", headers={"Content-Type": "multipart/form-data; boundary=y"})
        # SIGHUP takes up what changed
        with Store(filled) as store:
            store.add(task_maker("a", seed=50))
        process.process.send_signal(signal.SIGHUP)
        process.wait_for("refreshed: a is now 2")
        assert client.get("/v1/tasks/a").json()["version"] == 2
        # headers without end are cut off
        with socket.create_connection(("127.0.0.1", process.port), timeout=30) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
            with pytest.raises(OSError):
                for _ in range(200):
                    connection.sendall(b"X-Long: " + b"x" * 1000 + b"\r\n")
                assert connection.recv(1)
                raise AssertionError("it went on")
        assert client.get("/livez").status_code == 200
        process.process.send_signal(signal.SIGTERM)
        assert process.ended() == 0
    assert not any("Traceback" in line for line in process.lines), process.lines
    assert not any("boundary" in line for line in process.lines), "clients fill the log"


@pytest.mark.slow
def test_sigterm_finishes_what_waits(filled: Path) -> None:
    with served("--store", str(filled), "--max-wait-ms", "60000", "--drain-s", "60") as process:
        answers: list[httpx.Response] = []

        def ask() -> None:
            with process.client() as client:
                answers.append(client.post("/v1/tasks/a/predict", content=PICTURES[0], headers=RAW))

        asking = threading.Thread(target=ask)
        asking.start()
        with process.client() as client:
            while "pear_queue_images 1.0" not in client.get("/metrics").text:
                threading.Event().wait(0.02)
        process.process.send_signal(signal.SIGTERM)
        asking.join(60)
        assert process.ended() == 0
    assert answers[0].status_code == 200
    assert answers[0].json()["results"][0]["label"]


@pytest.mark.slow
def test_a_device_that_fails_ends_the_process(filled: Path, tmp_path: Path) -> None:
    """Also: slow headers, tokens, and that no token is logged."""
    file = tmp_path / "tokens"
    file.write_text(f"{TOKEN}\n")
    code = (
        "import router.serve.server, router\n"
        "router.serve.server.HEADER_S = 0.2\n"
        "def run_batch(*args, **options): raise RuntimeError('CUDA error: an illegal memory access')\n"
        "router.Router.run_batch = run_batch\n"
    )
    args = ("--store", str(filled), "--token-file", str(file), "--log-json")
    with served(*args, code=code) as process, process.client() as client:
        for sent in (b"", b"GET / HTTP/1.1\r\nHost:"):
            with socket.create_connection(("127.0.0.1", process.port), timeout=30) as connection:
                connection.sendall(sent)
                assert connection.recv(1) == b""
        url = "/v1/tasks/a/predict"
        assert client.post(url, content=PICTURES[0], headers=RAW).status_code == 401
        assert client.get("/metrics").status_code == 401
        headers = {**RAW, "Authorization": f"Bearer {TOKEN}"}
        assert client.get("/v1/tasks", headers=headers).status_code == 200
        assert client.post(url, content=PICTURES[0], headers=headers).status_code == 503
        assert process.ended() == 1
    assert process.lines[-1] == "Error: the device's thread ended: CUDA error: an illegal memory access\n"
    assert not any(TOKEN in line for line in process.lines)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that would serve fails the test, and pytest's logging stays."""
    monkeypatch.setattr(router.serve.cli, "_set_logging_up", lambda as_json: None)
    monkeypatch.setattr(router.serve.cli, "serve_until_told", None)
    monkeypatch.delenv("PEAR_SERVE_TOKEN", raising=False)
    monkeypatch.delenv("PEAR_SERVE_MANAGE_TOKEN", raising=False)


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["--host", "0.0.0.0"], 2, "--host 0.0.0.0: other machines can reach it: give a token"),
        (["--host", "::"], 2, "other machines can reach it"),
        (["--host", "example.org"], 2, "other machines can reach it"),
        (["--token-file", "nowhere"], 1, "nowhere: cannot be read"),
        (["--token-file", "empty"], 1, "line 1: expected a token"),
        (["--token-file", "short"], 1, "line 1: expected a token of at least 16 printable"),
        (["--store", "nowhere"], 3, "no store there"),
        (["--backbone", "no_such_model"], 1, "no_such_model"),
        (["--preload", "zebra"], 1, "no task 'zebra'"),
        (["--preload", "all", "--slot-bytes", "1000"], 1, "slot_bytes is 1,000"),
        (["--port", "TAKEN"], 1, "cannot listen there"),
        (["--allowed-host", "http://a"], 1, "allowed host 'http://a': expected a name such as pear.example.com"),
        (["--root", "x" * 300], 1, "x': expected a directory"),
        (["--max-batch", "0"], 2, "--max-batch"),
        (["--timeout-s", "nan"], 2, "'nan' is no number"),
        (["--device", "gpu"], 1, "device 'gpu' cannot be used"),
    ],
)
def test_what_cannot_be_served_is_said_in_a_line(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: None, args: list[str], code: int, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "short").write_text("secret\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        args = [str(taken.getsockname()[1]) if arg == "TAKEN" else arg for arg in args]
        done = CliRunner().invoke(main, ["--store", str(filled), *args], catch_exceptions=False)
    assert done.exit_code == code, done.stderr
    assert text in done.stderr
    assert "secret" not in done.stderr
    assert done.stderr.count("\n") == (1 if code != 2 else done.stderr.count("\n"))


@pytest.mark.parametrize("args", [["--host", "127.0.0.2"], ["--host", "0.0.0.0", "--no-auth"], ["--host", "0.0.0.0"]])
def test_other_machines_are_served_with_a_token_or_where_it_was_asked_for(
    filled: Path, monkeypatch: pytest.MonkeyPatch, quiet: None, args: list[str]
) -> None:
    if args == ["--host", "0.0.0.0"]:
        monkeypatch.setenv("PEAR_SERVE_TOKEN", TOKEN)
    served: list[str] = []

    def serve(app: Any, listener: socket.socket, *_: Any) -> Any:
        async def none() -> bool:
            served.append(listener.getsockname()[0])
            await app.state.service.batcher.close()
            return True

        return none()

    monkeypatch.setattr(router.serve.cli, "serve_until_told", serve)
    done = CliRunner().invoke(main, ["--store", str(filled), "--port", "0", *args], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    assert served == [args[1]]


@pytest.mark.parametrize(
    ("args", "token", "allowed"),
    [
        ([], "", ()),
        (["--host", "::1"], "", ()),
        (["--allowed-host", "a.example", "--allowed-host", "b.example"], "", ("a.example", "b.example")),
        ([], TOKEN, None),
        (["--allowed-host", "a.example"], TOKEN, ("a.example",)),
        (["--no-auth"], "", None),
        (["--host", "0.0.0.0", "--no-auth"], "", None),
        (["--host", "0.0.0.0", "--no-auth", "--allowed-host", "a.example"], "", ("a.example",)),
    ],
)
def test_names_are_checked_where_no_token_is(
    filled: Path,
    monkeypatch: pytest.MonkeyPatch,
    quiet: None,
    args: list[str],
    token: str,
    allowed: tuple[str, ...] | None,
) -> None:
    monkeypatch.setenv("PEAR_SERVE_TOKEN", token)

    def create(*_: Any, **options: Any) -> None:
        assert options["allowed_hosts"] == allowed
        raise RouterError("enough")

    monkeypatch.setattr(router.serve.cli, "create_app", create)
    done = CliRunner().invoke(main, ["--store", str(filled), *args], catch_exceptions=False)
    assert "enough" in done.stderr


@pytest.mark.parametrize(
    ("store", "opened"),
    [("https://example.org/store", "https://example.org/store"), ("s3://b/p", "s3://b/p"), ("~/p", Path.home() / "p")],
)
def test_a_store_is_a_directory_or_a_url(
    monkeypatch: pytest.MonkeyPatch, quiet: None, store: str, opened: str | Path
) -> None:
    taken: list[str | Path] = []

    def take(where: str | Path, **options: Any) -> Store:
        taken.append(where)
        raise RouterError("enough")

    monkeypatch.setattr(Store, "open", take)
    done = CliRunner().invoke(main, ["--store", store], catch_exceptions=False)
    assert (done.exit_code, taken) == (1, [opened])
