"""A pear-serve process and clients that are slow, its end within a limit, new versions, and kills."""

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from pear_store import Store, Task
from router import Backbone
from tests.router.serve.conftest import PICTURES
from tests.router.serve.test_serving import RAW, ROOT, Process, served

pytestmark = pytest.mark.slow

PREDICT = "/v1/tasks/a/predict"


def connected(process: Process) -> socket.socket:
    return socket.create_connection(("127.0.0.1", process.port), timeout=30)


def is_closed(connection: socket.socket) -> bool:
    """Whether the server closes a connection, whatever it still had to say."""
    try:
        while connection.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


@pytest.mark.slow
def test_slow_clients_are_cut_off(filled: Path) -> None:
    """With a body that does not come, with one that goes on after its answer, and with answers that are not read."""
    code = (
        "import router.serve.server, router.serve.cli, router.serve.limits, dataclasses\n"
        "import router.serve.linger\n"
        "router.serve.server.UNREAD_S = router.serve.linger.LINGER_S = 0.3\n"
        "limits = router.serve.limits.RequestLimits\n"
        "router.serve.cli.RequestLimits = lambda **given: limits(body_timeout_s=0.3, **given)\n"
    )
    head = (
        b"POST /v1/tasks/a/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"
    )
    with served("--store", str(filled), code=code) as process:
        with connected(process) as slow:
            slow.sendall(head % 1000 + b"x")
            assert slow.recv(1 << 16).startswith(b"HTTP/1.1 408")
            assert is_closed(slow), "it may hold the connection for ever"
        with connected(process) as endless:
            endless.sendall(head % 10**9)
            assert endless.recv(1 << 16).startswith(b"HTTP/1.1 413")

            def go_on() -> None:
                for _ in range(2000):
                    endless.sendall(bytes(1000))
                    time.sleep(0.005)

            with pytest.raises(OSError):
                go_on()
                raise AssertionError("it went on")
        with connected(process) as unread:
            unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            unread.settimeout(0.2)
            with pytest.raises(OSError):  # full, then cut off
                for _ in range(100_000):
                    unread.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
            time.sleep(1)
            unread.settimeout(30)
            assert is_closed(unread)
        # whoever is quick is answered on the same connection after a refusal
        with process.client() as client:
            assert client.post(PREDICT, content=b"x", headers=RAW).status_code == 400
            assert client.post(PREDICT, content=PICTURES[0], headers=RAW).status_code == 200
        process.process.send_signal(signal.SIGTERM)
        assert process.ended() == 0


@pytest.mark.slow
def test_the_end_has_a_limit(filled: Path) -> None:
    """A batch that never ends, and a request that waits behind it."""
    code = (
        "import router, threading\n"
        "def run_batch(*args, **options):\n    print('a batch', flush=True)\n    threading.Event().wait()\n"
        "router.Router.run_batch = run_batch\n"
    )
    with served("--store", str(filled), "--drain-s", "0.5", "--max-batch", "1", code=code) as process:

        def ask() -> None:
            with process.client() as client:
                try:
                    answers.append(client.post(PREDICT, content=PICTURES[0], headers=RAW).status_code)
                except httpx.HTTPError:
                    answers.append(0)

        answers: list[int] = []
        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        with process.client() as client:
            while "pear_queue_images 1.0" not in client.get("/metrics").text:
                time.sleep(0.02)
        process.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        assert process.ended() == 0
    assert len(answers) == 2
    assert set(answers) == {503}
    assert any("some requests were not finished in time" in line for line in process.lines)


@pytest.mark.slow
def test_new_versions_are_taken_up_by_time_and_what_did_not_change_stays(
    filled: Path, task_maker: Callable[..., Task]
) -> None:
    args = ("--store", str(filled), "--preload", "a,b", "--refresh-s", "0.1")
    with served(*args) as process, process.client() as client:

        def versions() -> list[int | None]:
            rows = client.post("/v1/predict?tasks=a,b", content=PICTURES[0], headers=RAW).json()["results"]
            return [row["version"] for row in rows]

        assert versions() == [1, 1]
        with Store(filled) as store:
            store.add(task_maker("a", seed=60))
        process.wait_for("refreshed: a is now 2")
        assert client.get("/v1/tasks/b").json()["loaded"] is True
        assert versions() == [2, 1]
        assert "pear_slot_loads_total 3.0" in client.get("/metrics").text, "b was loaded again"


KILLED = """
import sys
from pathlib import Path
from pear_store import Store, read_checkpoint
with Store(sys.argv[1]) as store:
    task = read_checkpoint(sys.argv[2])
    print("adding", flush=True)
    while True:
        store.add(task, "a")
        store.add(read_checkpoint(sys.argv[3]), "a")
"""


@pytest.mark.slow
def test_kill_9_while_versions_are_added_and_it_starts_again_at_once(
    filled: Path, tmp_path: Path, task_maker: Callable[..., Task], backbone: Backbone
) -> None:
    """Both the server and who adds are killed; the store needs no repair, and the newest version answers."""
    with Store(filled) as store:
        for number in range(2):
            store.add(task_maker("x", seed=80 + number))
            store.export("x", tmp_path / f"{number}.safetensors")
    for kill in range(2):
        adding = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(filled), *(str(tmp_path / f"{i}.safetensors") for i in range(2))],
            stdout=subprocess.PIPE, cwd=ROOT,
        )  # fmt: skip
        try:
            assert adding.stdout is not None
            assert adding.stdout.readline()
            with served("--store", str(filled), "--refresh-s", "0.05") as process, process.client() as client:
                answer = client.post(PREDICT, content=PICTURES[0], headers=RAW)
                if kill:
                    process.wait_for("refreshed: ")
                    answer = client.post(PREDICT, content=PICTURES[0], headers=RAW)
                assert answer.status_code == 200
                assert answer.json()["results"][0]["error"] is None
                process.process.kill()
        finally:
            adding.kill()
            adding.wait()
            assert adding.stdout is not None
            adding.stdout.close()
    with Store(filled) as store, served("--store", str(filled)) as process, process.client() as client:
        row = client.post(PREDICT, content=PICTURES[0], headers=RAW).json()["results"][0]
        assert row["version"] == store.resolve("a").version > 2


@pytest.mark.slow
def test_a_refusal_arrives_although_its_body_is_under_way(filled: Path) -> None:
    """The server would reset a connection that it closes with bytes unread, and the client would lose the answer."""
    head = b"POST /v1/tasks/a/predict HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
    with served("--store", str(filled), "--max-body-bytes", "1000") as process:
        for _ in range(20):
            with connected(process) as sending:
                sending.sendall(head % 1_000_000)
                sent = 0
                while sent < 1_000_000:  # all of it, before a byte is read
                    sending.sendall(bytes(10_000))
                    sent += 10_000
                time.sleep(0.02)
                answer = b""
                while part := sending.recv(1 << 16):
                    answer += part
                assert answer.startswith(b"HTTP/1.1 413")
                assert b"limit is 1000 bytes" in answer
