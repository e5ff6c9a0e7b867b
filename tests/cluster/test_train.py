"""pear-train on a Ray cluster: the files of one machine, whoever dies meanwhile."""

import io
import json
import signal
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from pear_train.cli import main
from pear_train.cli.progress import Table
from pear_train.report import Step
from pear_train.tasks import TaskEntry
from tests.helpers.cluster import Cluster, wait_until
from tests.helpers.drivers import Driver
from tests.helpers.stripes import write_stripes

pytest.importorskip("ray", reason="needs ray: pip install 'pear-adapters[ray]'")

FAST = ("--epochs", 2, "--set", "prune_epoch=1", "--rank", 4, "--batch-size", 16, "--positions", "blocks",
        "--ratio", 0.5, "--img-size", 32)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a file of 12 tasks: one takes longer, and one cannot be trained."""
    made = tmp_path_factory.mktemp("data")
    for i in range(3):
        write_stripes(made / f"t{i}.npz", 2 + i, 36 + 4 * i, i)
    write_tasks(made / "tasks.toml", {"long": "epochs = 30", "wild": "lr = 1000\nweight_decay = 1000"}, 10)
    return made


def write_tasks(path: Path, special: dict[str, str], plain: int) -> Path:
    """Some tasks with options of their own, then others that differ by their seeds and data."""
    tables = {**special, **{f"t{i}": f"seed = {i}" for i in range(plain)}}
    lines = [f'[tasks.{name}]\ndata = "t{i % 3}.npz"\n{table}' for i, (name, table) in enumerate(tables.items())]
    path.write_text("\n".join(lines))
    return path


def start(cluster: Cluster, *args: object, there: bool = True) -> Driver:
    """pear-train in a process of its own, on the cluster or on this machine alone, in one thread either way."""
    given = [*args, *(["--ray", cluster.address, "--cpus-per-worker", 1] if there else [])]
    return cluster.start("pear_train.cli", *given)


def end(process: Driver, code: int = 0) -> tuple[str, str]:
    out, errors = process.output()
    assert process.returncode == code, errors
    return out, errors


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def wait_for(process: Driver, what: Callable[[], object]) -> None:
    def is_there() -> object:
        assert process.poll() is None, process.output()
        return what()

    wait_until(is_there)


def trainers(cluster: Cluster) -> list[int]:
    return cluster.workers("trained")


@pytest.fixture(scope="module")
def here(folder: Path, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of one machine."""
    out = tmp_path_factory.mktemp("here")
    _, errors = end(start(cluster, "--tasks", folder / "tasks.toml", "--out", out, *FAST, there=False), code=1)
    assert "Error: wild: training diverged" in errors.replace("wild: wild", "wild")
    return files(out)


@pytest.mark.slow
def test_two_workers_write_the_files_of_one_machine(
    folder: Path, cluster: Cluster, here: dict[str, bytes], tmp_path: Path
) -> None:
    args = ["--out", tmp_path / "out", *FAST, "--json"]
    process = start(cluster, "--tasks", folder / "tasks.toml", *args)
    wait_for(process, lambda: len(trainers(cluster)) == 2)
    out, errors = end(process, code=1)
    rows: list[dict[str, Any]] = json.loads(out)
    assert [row["task"] for row in rows] == ["long", "wild", *(f"t{i}" for i in range(10))]
    assert [row["task"] for row in rows if "error" in row] == ["wild"]
    assert errors.count("training diverged") == 1
    assert len(here) == 11
    assert files(tmp_path / "out") == here

    more = write_tasks(folder / "more.toml", {"long": "epochs = 30"}, 0)
    more.write_text(more.read_text() + '\n[tasks.new0]\ndata = "t0.npz"\n[tasks.new1]\ndata = "t1.npz"')
    rows = json.loads(end(start(cluster, "--tasks", more, *args, "--together", 2, "--workers", 1))[0])
    assert [(row["task"], row["trained"]) for row in rows] == [("long", False), ("new0", True), ("new1", True)]


@pytest.mark.slow
def test_who_is_stopped_and_whose_worker_is_killed_goes_on_to_the_same_file(
    folder: Path, cluster: Cluster, here: dict[str, bytes], tmp_path: Path
) -> None:
    only = write_tasks(folder / "only.toml", {"long": "epochs = 30"}, 0)
    args = ["--tasks", only, "--out", tmp_path / "out", *FAST]
    partial = tmp_path / "out" / "long.safetensors.partial"
    process = start(cluster, *args)
    wait_for(process, partial.exists)
    process.send_signal(signal.SIGINT)
    _, errors = end(process, code=130)
    assert "Stopped: " in errors and "the same command" in errors
    assert "Traceback" not in errors
    wait_until(lambda: not trainers(cluster))
    stopped_at = partial.stat().st_mtime_ns

    process = start(cluster, *args)
    wait_for(process, lambda: partial.stat().st_mtime_ns > stopped_at)
    assert cluster.kill("trained") == 1
    _, errors = end(process)
    assert "long: the worker died; another goes on from the last epoch that ended" in errors
    assert errors.count("long: goes on after epoch") == 2
    assert files(tmp_path / "out") == {"long.safetensors": here["long.safetensors"]}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["t", "--data", "d", "--ray"], "--ray needs --tasks"),
        (["--tasks", "f", "--make-base", "--ray"], "--ray needs --tasks, and no --make-base"),
        (["--tasks", "f", "--workers", "2"], "--workers and --cpus-per-worker are for a cluster: give --ray, too"),
    ],
)
def test_mistakes(args: list[str], message: str) -> None:
    done = CliRunner().invoke(main, [*args, "--out", "x"], catch_exceptions=False)
    assert done.exit_code == 2
    assert message in done.stderr


def test_of_a_worker_that_died_only_tasks_that_did_not_end_are_said(tmp_path: Path) -> None:
    from pear_train.cluster import Assignment, Party, _Group

    said: list[str] = []
    party = object.__new__(Party)  # without a cluster
    party._waiting, party._audience = deque(), SimpleNamespace(say=said.append)
    assert not list(party._again(_Group({}))) and not said and not party._waiting
    left = {name: Assignment(TaskEntry.of(name, "d", {}), tmp_path / name) for name in ("a", "b")}
    assert not list(party._again(_Group(left))) and [group.left for group in party._waiting] == [left]
    party._waiting.clear()
    assert not list(party._again(_Group(left, deaths=2))) and len(party._waiting) == 2
    end = " on from the last epoch that ended"
    assert said == [
        f"a, b: the worker died; another goes{end}", f"a, b: the worker died; a worker for each goes{end}",
    ]  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_each_task_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    with Table("tasks.toml", {"dtd": 3, "svhn": 5}) as table:
        table.began("dtd", "node-1")
        table.began("svhn", "node-2")
        table.show(Step("dtd", 1, 3, 4, 4, 0.5, 0.75, 0.625))
        table.show(Step("svhn", 2, 5, 1, 4, 0.25, 0.5, None))
        for line in list(table._lines.values()):
            line.refresh()
        shown = screen.getvalue()
        table.ended("dtd")
        table.say("dtd: val 62.5 %")
    assert "dtd: epoch 1/3, on node-1 batch 4/4 loss 0.500 train 75.0% val 62.5%" in shown
    assert "svhn: epoch 1/5, on node-2 batch 1/4 loss 0.250 train 50.0%" in shown
    assert "dtd: val 62.5 %\n" in screen.getvalue()
    assert list(table._lines) == []
