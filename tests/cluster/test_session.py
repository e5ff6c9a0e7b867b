"""What a cluster must have, and how it is said what is missing. No Ray runs here."""

import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="needs ray: pip install 'pear-adapters[ray]'")

from router import Backbone
from router.cluster import ClusterError, fitting, room, session

Machines = Callable[..., None]


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Machines:
    """Makes a cluster of machines with these cores."""

    def make(*cores: int) -> None:
        nodes = [{"Alive": True, "Resources": {"CPU": float(count)} if count else {}} for count in cores]
        monkeypatch.setattr("ray.nodes", lambda: [*nodes, {"Alive": False, "Resources": {"CPU": 64.0}}])

    return make


def test_workers_are_as_many_as_there_is_room_for(machines: Machines) -> None:
    machines(0, 8, 3, 16)
    assert room(False, None) == (8, 3)
    assert room(False, 4) == (6, 4)
    assert room(False, 4, workers=2) == (2, 4)
    with pytest.raises(ClusterError, match="no machine of the cluster has 17 cores"):
        room(False, 17, workers=2)
    with pytest.raises(ClusterError, match="the cluster has no GPU: give --device cpu"):
        room(True, None)


def test_a_cluster_whose_machines_come_later_needs_a_number_of_workers(machines: Machines) -> None:
    """Such as that of deploy/ray/kuberay.yaml."""
    machines(0)
    assert room(False, None, workers=4) == (4, 4)
    assert room(False, 8, workers=4) == (4, 8)
    assert room(True, None, workers=4) == (4, 1)
    for on_gpus in (False, True):
        with pytest.raises(ClusterError, match="no machine of the cluster has cores: give --workers N"):
            room(on_gpus, None)


def test_groups_wait_while_a_cluster_has_lost_all_its_machines(machines: Machines) -> None:
    from pear_train.cluster import WAITING, Party

    party = object.__new__(Party)  # without a cluster
    party._workers, party._on_gpus, party._cpus = None, False, 4
    machines(8)
    assert party._most() == 2 + WAITING
    machines(0)
    assert fitting(False, 4) == 0
    assert party._most() == WAITING


@contextmanager
def peer(says: bytes | None) -> Iterator[str]:
    """The address of who answers this to whoever connects, or nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with server.accept()[0] as connection:
                if says is None:
                    connection.recv(1024)  # until the other one hangs up, or one has said all
                    connection.recv(1024)
                else:
                    connection.sendall(says)

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join()


def why_not(address: str) -> str:
    with pytest.raises(ClusterError) as raised, session(address):
        pass
    return str(raised.value).removeprefix(f"Ray at {address}: ")


@pytest.mark.parametrize("address", ["foo", "", "10.0.0.1", "10.0.0.1:", ":6379", "10.0.0.1:x", "10.0.0.1:-1"])
def test_an_address_is_that_of_a_machine_and_a_port(address: str) -> None:
    expected = f"Ray at {address!r}: expected auto, or an address with a port, such as 10.0.0.1:6379"
    assert why_not(address) == expected


def test_who_is_no_ray_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with peer(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address:
        assert why_not(address) == "cannot be reached: something else answers there: check the address, or start Ray"
    monkeypatch.setattr(sys.modules[session.__module__], "CONNECT_S", 0.2)
    with peer(None) as address:
        assert why_not(address) == "cannot be reached: timed out: check the address, or start Ray"
    assert why_not("[::1]:99999").startswith("cannot be reached: ")


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (
            "Could not find any running Ray instance. Please specify the one to connect to by setting `--address` flag",
            "this machine is part of no cluster: start Ray, or give an address with a port, such as 10.0.0.1:6379",
        ),
        (
            "Failed to connect to Ray cluster at 127.0.0.1:1",
            "no cluster of Ray answers there, or it has another token: check the address and $RAY_AUTH_TOKEN",
        ),
        ("Version mismatch: The cluster has:\n    Ray: 2.59", "Version mismatch: The cluster has: Ray: 2.59"),
        ("", "ConnectionError"),
    ],
)
def test_what_ray_says_is_said_in_one_line(told: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise ConnectionError(told)

    monkeypatch.setattr("ray.init", fail)
    assert why_not("auto") == f"cannot be used: {message}"


def test_a_trainer_with_other_weights_refuses_to_start(backbone: Backbone) -> None:
    from pear_train.cluster import Setup, trained

    setup = Setup(backbone.name, None, "sha256:" + "0" * 64, Path("/data"), on_gpus=False)
    has = f"{socket.gethostname()} has {backbone.digest[:19]}…: give all machines the same weights"
    with pytest.raises(ClusterError, match=f"expected digest sha256:000000000000…, {has}"):
        list(trained([], setup, None))
