"""Ctrl-C in the middle of push, pull and clone; what a terminal shows of them; what must never be shown."""

import logging
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from pear_store import Store, verify
from pear_store.errors import PearStoreError
from pear_store.remote.remotes import Remote, add_remote, init_remote
from tests.helpers.makers import small_task
from tests.pear_store.remote.proxy import Faults, Proxy
from tests.pear_store.remote.real_servers import Server
from tests.pear_store.remote.servers import answering
from tests.pear_store.test_cli import run

pytestmark = pytest.mark.slow

CANARY = "canary9b1c"
COMMAND = [sys.executable, "-c", "from pear_store.cli import main; main()"]


@contextmanager
def started(*arguments: object) -> Iterator["subprocess.Popen[str]"]:
    command = [*COMMAND, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with Store.create(tmp_path / "s") as made:
        for number in range(30):
            made.add(small_task(f"t{number}", seed=number))
    return tmp_path / "s"


@pytest.mark.parametrize("fault", [pytest.param("stall_up_bytes", marks=pytest.mark.slow), "stall_down_bytes"])
@pytest.mark.parametrize("verb", ["push", "pull", "clone"])
def test_ctrl_c_ends_at_once_and_the_same_command_goes_on(
    store: Path, tmp_path: Path, server: Server, verb: str, fault: str
) -> None:
    """In the middle of a request, to which no answer will come."""
    with Proxy(server.port) as proxy:
        options = {**server.options, "endpoint": f"http://127.0.0.1:{proxy.port}"}
        init_remote("s3://bucket/remote", options)
        with Store(store) as opened:
            add_remote(store, Remote("origin", "s3://bucket/remote", options))
            if verb != "push":
                opened.push()
        if verb == "pull":
            with Store.create(tmp_path / "c"):
                add_remote(tmp_path / "c", Remote("origin", "s3://bucket/remote", options))
        given = [f"--option={key}={value}" for key, value in options.items()]
        arguments: list[object] = {
            "push": ["--store", store, "push"], "pull": ["--store", tmp_path / "c", "pull"],
            "clone": ["clone", "s3://bucket/remote", tmp_path / "c", *given],
        }[verb]  # fmt: skip
        proxy.faults = Faults(**{fault: 4_000 if verb == "push" and "up" in fault else 600})
        with started(*arguments) as process:
            for _ in range(400):
                if proxy.harmed:
                    break
                time.sleep(0.05)
            assert proxy.harmed
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
        assert process.returncode == 130
        assert err == f"Error: {verb} interrupted; the same command goes on\n" and not out
        proxy.faults = Faults()
        again = run(*arguments)
        assert again.exit_code == 0, again.output
    clone = run(
        "clone", "s3://bucket/remote", tmp_path / "fresh", *(f"--option={k}={v}" for k, v in server.options.items())
    )
    assert "30 versions" in clone.stdout
    for path in (store, tmp_path / "fresh", *([tmp_path / "c"] if verb != "push" else [])):
        assert verify(path).ok


@pytest.mark.parametrize("verb", ["push", "pull"])
def test_ctrl_c_of_a_directory(store: Path, tmp_path: Path, verb: str) -> None:
    """At a chance moment, again and again, until the command is done."""
    init_remote(str(tmp_path / "remote"))
    add_remote(store, Remote("origin", str(tmp_path / "remote")))
    path = store
    if verb == "pull":
        run("--store", store, "push")
        path = tmp_path / "c"
        with Store.create(path):
            add_remote(path, Remote("origin", str(tmp_path / "remote")))
    for wait_s in (0.15, 0.2, 0.25, 0.3, 30):
        with started("--store", path, verb) as process:
            try:
                process.communicate(timeout=wait_s)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                process.communicate(timeout=30)
    assert process.returncode == 0
    assert "both hold the same" in run("--store", path, "status").stdout
    assert verify(path).ok


def test_a_terminal_shows_bytes_and_versions(store: Path, tmp_path: Path) -> None:
    init_remote(str(tmp_path / "remote"))
    add_remote(store, Remote("origin", str(tmp_path / "remote")))
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 120))
    environment = {**os.environ, "TQDM_MININTERVAL": "0"}
    process = subprocess.Popen(
        [*COMMAND, "--store", str(store), "push"], stdout=subprocess.PIPE, stderr=follower, env=environment
    )
    os.close(follower)
    shown = ""
    with suppress(OSError):  # at the end
        while data := os.read(leader, 65536):
            shown += data.decode()
    os.close(leader)
    assert b"30 versions" in process.communicate()[0]
    assert re.search(r"push: +100%.* [0-9.]+k/[0-9.]+k .*B/s, 30 of 30 versions", shown), shown
    quiet = subprocess.run([*COMMAND, "--store", str(store), "push"], capture_output=True)
    assert not quiet.stderr


def test_no_secret_is_shown_anywhere(
    store: Path, tmp_path: Path, listen: Callable[..., int], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, s3_options: dict[str, str],
) -> None:  # fmt: skip
    """Of the environment or of options: not when all goes well, and not in errors."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, CANARY)
    caplog.set_level(logging.DEBUG)
    shown = []
    here = ("--store", str(store))
    given = [f"--option={key}={value}" for key, value in s3_options.items()]
    url = f"s3://bucket/{tmp_path.name}-canary"
    body = f"<Error><Code>AccessDenied</Code><Token>{CANARY}</Token></Error>".encode()
    bad = [f"--option=endpoint=http://127.0.0.1:{listen(answering(403, body))}", "--option=region=us-east-1"]
    for command in (
        ("remote", "init", "team", url, *given), ("push",), ("pull",), ("remote", "ls"), ("remote", "ls", "--json"),
        ("remote", "show", "--json"), ("status", "--json"), ("remote", "init", "bad", url, *bad),
        ("remote", "add", "bad", url, *bad), ("remote", "add", "bad", url, "--option", f"session_token={CANARY}"),
        ("remote", "add", "bad", url, "--option", f"endpoint=http://me:{CANARY}@host"),
        ("remote", "add", "bad", url, "--option", f"endpoint=https://host/?sig={CANARY}"),
        ("remote", "add", "bad", url, "--option", f"secret_access_key:{CANARY}"),
        ("remote", "add", "bad", f"https://me:{CANARY}@host/x"), ("remote", "add", "bad", f"sftp://me:{CANARY}@host/x"),
        ("remote", "add", "bad", f"https://host/x?token={CANARY}"),
    ):  # fmt: skip
        done = run(*here, *command)
        shown.append(done.output)
        assert CANARY not in done.output, command
    assert len([one for one in shown if one.startswith("Error")]) >= 7
    with Store(store) as opened, pytest.raises(PearStoreError) as found:
        add_remote(opened.path, Remote("bad", url, {"endpoint": bad[0].partition("endpoint=")[2], "region": "x"}))
    error: BaseException | None = found.value
    while error is not None:
        assert CANARY not in repr(error) + str(vars(error))
        error = error.__context__
    assert CANARY not in caplog.text
    from pear_store.remote.objects import ObjectPlace

    place = ObjectPlace(url, s3_options)
    for name in [*place.list("log/"), *place.list("index/"), "pear-remote.json"]:
        assert CANARY.encode() not in place.get(name, 1 << 20)
    place.close()
    for file in store.rglob("*"):
        assert not file.is_file() or CANARY.encode() not in file.read_bytes(), file
