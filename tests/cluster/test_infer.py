"""pear-infer on a Ray cluster: the rows of one machine, whoever dies meanwhile."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from pear_store import Store, Task
from pear_store.remote.remotes import Remote, add_remote, init_remote
from router.infer.cli import main
from tests.helpers.cluster import Cluster, cluster_environment, kill_all, machine, wait_until, workers_of
from tests.helpers.drivers import Driver, server
from tests.helpers.lists import make_list_folder

pytest.importorskip("ray", reason="needs ray: pip install 'pear-adapters[ray]'")
pytestmark = pytest.mark.slow
kills_six = pytest.mark.skipif(
    "PEAR_CLUSTER_DEATHS" not in os.environ, reason="kills 6 workers: PEAR_CLUSTER_DEATHS=1, in make faults"
)


@pytest.fixture
def work(tmp_path: Path, task_maker: Callable[..., Task]) -> Path:
    make_list_folder(tmp_path, task_maker, [(100 + i, 90, 3) for i in range(6)])
    return tmp_path


def write_list(work: Path, rows: int) -> Path:
    """With broken and missing images, tasks that are not there or cannot run, and a line that is none."""
    images = ["broken.png" if i % 41 == 7 else "nowhere.png" if i % 43 == 5 else f"{i % 6}.png" for i in range(rows)]
    strange = {9: "zebra", 19: "foreign", 29: "features", 39: "b@7"}
    tasks = [strange.get(i % 53, "ab"[i % 3 == 0]) for i in range(rows)]
    pd.DataFrame({"image": images, "task": tasks, "id": range(rows)}).to_csv(work / "list.csv", index=False)
    with (work / "list.csv").open("a") as file:
        file.write("one,two,3,4\n")
    return work / "list.csv"


def run_here(*args: object) -> dict[str, Any]:
    """What pear-infer reports, without a cluster."""
    done = CliRunner().invoke(main, [str(arg) for arg in (*args, "--json")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def start(cluster: Cluster, *args: object, command: str = "router.infer.cli") -> Driver:
    """pear-infer on the cluster, in a process of its own; a worker for each core unless said otherwise."""
    given = [*args, "--ray", cluster.address, "--json"]
    if "--cpus-per-worker" not in args:
        given += ["--cpus-per-worker", 1]
    return cluster.start(command, *given)


def end(process: Driver, wait_s: float = 180) -> dict[str, Any]:
    """What it reports."""
    out, errors = process.output(wait_s)
    assert process.returncode == 0, errors
    report: dict[str, Any] = json.loads(out)
    return report


def wait_for_parts(process: Driver, folder: Path, count: int) -> None:
    def are_there() -> bool:
        assert process.poll() is None, process.output()
        return len(list(folder.glob("*.parquet"))) >= count

    wait_until(are_there)


def assert_same(found: pa.Table, expected: pa.Table) -> None:
    """The same rows in the same order; numbers as exact as unlike numbers of threads allow."""
    numbers = ["probability", "topk"]
    assert found.schema == expected.schema
    assert found.drop_columns(numbers) == expected.drop_columns(numbers)
    for name in numbers:
        for one, other in zip(found[name].to_pylist(), expected[name].to_pylist(), strict=True):
            assert _likely(one) == pytest.approx(_likely(other), abs=1e-5)


def _likely(value: Any) -> Any:
    """The probability of each class of a `topk`. Of equal ones either may come first."""
    return {top["label"]: top["probability"] for top in value} if isinstance(value, list) else value


def test_the_rows_are_those_of_one_machine(work: Path, cluster: Cluster) -> None:
    """Of a folder of lists. It is read on only as answers come, so lists of any length take the same memory."""
    header, *lines = write_list(work, 300).read_text().splitlines(keepends=True)
    (work / "lists").mkdir()
    for number, start_of in ((8, 0), (9, 25), (10, 50)):
        rows = lines[start_of : start_of + 25] if number < 10 else lines[start_of:]
        (work / "lists" / f"part-{number}.csv").write_text(header + "".join(f"../{row}" for row in rows))
    args = ["--store", work / "s", "--batch-size", 4]
    here = run_here(work / "lists", work / "here", *args)
    there_args = [f"{work}/lists/*.csv", work / "there", *args]
    process = start(cluster, *there_args, "--workers", 2, command="tests.helpers.counting")
    there = end(process)
    part, batches_ahead, at_the_workers = 64, 4 * 16, 2 * 4 * 4
    assert 0 < int(process.output()[1].splitlines()[-1]) <= part + batches_ahead + at_the_workers + 4
    found = pq.read_table(work / "there")
    assert_same(found, pq.read_table(work / "here"))
    assert found["row"].to_pylist() == list(range(301))
    assert found["id"].to_pylist()[:300] == list(range(300))
    assert found["error"].is_null().to_pylist().count(True) > 200
    same = ("predictions", "errors", "first_error", "images")
    assert {key: there[key] for key in same} == {key: here[key] for key in same}
    assert there["errors"] > 30
    assert there["workers"] == 2
    assert there["device_s"] > 0
    assert run_here(*there_args)["finished_before"]


def test_a_worker_and_a_machine_that_die_cost_retries_and_no_row(work: Path, cluster: Cluster) -> None:
    listed = write_list(work, 1000)
    args = ["--store", work / "s", "--batch-size", 4]
    run_here(listed, work / "here", *args)
    with machine(cluster.environment, work, f"--address={cluster.address}", "--num-cpus=1") as joined:
        wait_for_start(work)
        process = start(cluster, listed, work / "there", *args)
        wait_for_parts(process, work / "there.parts", 2)
        assert cluster.kill("Worker") > 0
        wait_until(lambda: workers_of(joined.pid, "Worker.serve"))
        kill_all(joined.pid)
        report = end(process)
    assert (report["workers"], report["retries"] > 1) == (3, True)
    found = pq.read_table(work / "there")
    assert_same(found, pq.read_table(work / "here"))
    assert found["row"].to_pylist() == list(range(1001))


@kills_six
def test_workers_that_always_die_as_they_start_end_the_run(work: Path, cluster: Cluster) -> None:
    process = start(cluster, write_list(work, 10), work / "there", "--store", work / "s", "--workers", 1)
    kills = 0
    while process.poll() is None and kills < 20:
        kills += cluster.kill("Worker")
        time.sleep(0.02)
    out, errors = process.output(20)
    assert (process.returncode, out) == (1, "")
    assert errors.splitlines()[-1].startswith("Error: 6 workers died as they started, and none is left: see Ray's logs")
    assert "Traceback" not in errors


@kills_six
def test_a_batch_that_kills_its_workers_ends_the_run_with_its_name(work: Path, cluster: Cluster) -> None:
    """The list's other batches are not blamed, and the parts before it are kept."""
    shutil.copy(work / "0.png", work / "deadly.png")
    listed = write_list(work, 300)
    lines = listed.read_text().splitlines()
    lines[205] = "deadly.png,a,204"
    listed.write_text("\n".join(lines) + "\n")
    process = start(cluster, listed, work / "there", "--store", work / "s", "--batch-size", 1)
    out, errors = process.output(300)
    assert (process.returncode, out) == (1, "")
    said = errors.splitlines()[-1]
    assert said.startswith(
        f"Error: workers died 6 times with a batch that begins with {work}/deadly.png: see Ray's logs"
    )
    assert len(list((work / "there.parts").glob("0*.parquet"))) >= 10


def test_a_run_on_a_cluster_that_is_killed_goes_on_with_the_versions_it_began_with(
    work: Path, cluster: Cluster, task_maker: Callable[..., Task]
) -> None:
    listed = write_list(work, 800)
    args = ["--store", work / "s", "--batch-size", 4]
    run_here(listed, work / "here", *args)
    process = start(cluster, listed, work / "there", *args)
    wait_for_parts(process, work / "there.parts", 3)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    kept = len(list((work / "there.parts").glob("0*.parquet")))
    assert kept >= 3
    assert not (work / "there").exists()
    with Store(work / "s") as store:
        store.add(task_maker("a", seed=77))
    assert end(start(cluster, listed, work / "there", *args))["resumed_images"] >= 64 * (kept - 1)
    assert_same(pq.read_table(work / "there"), pq.read_table(work / "here"))
    assert not (work / "there.parts").exists()


def test_every_image_through_all_tasks_of_a_remote_decoded_apart(work: Path, cluster: Cluster) -> None:
    with Store(work / "s") as store:
        init_remote(str(work / "remote"))
        add_remote(store.path, Remote("origin", str(work / "remote")))
        store.push()
    listed = work / "images.jsonl"
    listed.write_text("".join(json.dumps({"image": f"{i % 7}.png"}) + "\n" for i in range(80)))
    wanted = ["--tasks", "all", "--batch-size", 8, "--top", 2]
    run_here(listed, work / "here.parquet", "--store", work / "s", *wanted)
    far = ["--store", f"file://{work / 'remote'}", "--workers", 1, "--decode", "apart"]
    report = end(start(cluster, listed, work / "there.parquet", *far, *wanted))
    assert all(report[name] > 0 for name in ("list_s", "read_s", "decode_s", "transfer_s", "device_s", "write_s"))
    found = pq.read_table(work / "there.parquet")
    assert found.num_rows == 240
    assert_same(found, pq.read_table(work / "here.parquet"))


def test_what_a_cluster_cannot_do_is_said_in_one_line(work: Path, cluster: Cluster) -> None:
    listed = write_list(work, 10)
    mistakes: list[tuple[list[object], str]] = [
        (["--cpus-per-worker", 9], "no machine of the cluster has 9 cores: give a smaller --cpus-per-worker"),
        (["--decode", "apart"], "workers of 1 cores leave none to decode images on: give fewer --workers"),
        (["--device", "cuda"], "the cluster has no GPU: give --device cpu"),
    ]
    started = [start(cluster, listed, work / "out", "--store", work / "s", *args) for args, _ in mistakes]
    alone = ["--store", work / "s", "--workers", 1]
    unlike = start(cluster, listed, work / "unlike", *alone, command="tests.helpers.unlike")
    for process, (_, message) in zip(started, mistakes, strict=True):
        out, errors = process.output(120)
        assert (process.returncode, out) == (1, "")
        assert errors.startswith("Error: ")
        assert message in errors
        assert len(errors.splitlines()) == 1
    out, errors = unlike.output()
    assert (unlike.returncode, out) == (1, "")
    assert "workers=0 of 1" in errors
    assert "Traceback" not in errors
    said = errors.splitlines()[-1]
    has = f"on {socket.gethostname()}: backbone pear_tiny: expected digest sha256:000000000000…, a worker has sha256:"
    assert said.startswith(f"Error: a worker cannot be made: {has}")
    assert said.endswith(": give all machines the same weights")


def wait_for_start(machine_folder: Path) -> None:
    wait_until(lambda: "Ray runtime started" in (machine_folder / "ray.log").read_text())


FULL = int(os.environ.get("PEAR_CLUSTER_ROWS", 0))


@pytest.mark.skipif(not FULL, reason="takes minutes: PEAR_CLUSTER_ROWS=20000, in make faults")
def test_whoever_is_killed_on_three_machines_the_rows_are_those_of_one(
    tmp_path: Path, task_maker: Callable[..., Task]
) -> None:
    """50 tasks on machines of 2, 1 and 1 cores; then a worker is killed every 20 s, and once a machine."""
    make_list_folder(tmp_path, task_maker, [(100 + i, 90, 3) for i in range(40)])
    with Store(tmp_path / "s") as store:
        list(store.add_many(task_maker(f"t{i}", seed=i, size=(64, 96)[i % 2]) for i in range(50)))
    images = ["broken.png" if i % 997 == 7 else f"{i * 31 % 40}.png" for i in range(FULL)]
    tasks = ["zebra" if i % 991 == 5 else f"t{i * 17 % 50}" for i in range(FULL)]
    listed = tmp_path / "list.csv"
    pd.DataFrame({"image": images, "task": tasks}).to_csv(listed, index=False)
    args = ["--store", tmp_path / "s", "--batch-size", 32]
    run_here(listed, tmp_path / "here", *args)
    expected = pq.read_table(tmp_path / "here")
    folders = [tmp_path / f"machine{i}" for i in range(3)]
    for folder in folders:
        folder.mkdir()
    with ExitStack() as stack:
        environment = stack.enter_context(cluster_environment(tmp_path / "cache"))
        head = ["--head", "--port=0", "--num-cpus=2", "--include-dashboard=false"]
        machines = [stack.enter_context(machine(environment, folders[0], *head))]
        address = wait_until(lambda: re.search(r"--address='(.+)'", (folders[0] / "ray.log").read_text()))[1]
        for folder in folders[1:]:
            joined = machine(environment, folder, f"--address={address}", "--num-cpus=1")
            machines.append(stack.enter_context(joined))
            wait_for_start(folder)  # one after the other: of two that join at once, Ray 2.60 may lose one
        cluster = Cluster(address, machines[0].pid, environment, stack.enter_context(server(environment)))
        for count in (1, 2, 4):
            report = end(start(cluster, listed, tmp_path / f"by{count}", "--workers", count, *args), 1800)
            print(count, report)
            assert (report["workers"], report["retries"]) == (count, 0)
            assert_same(pq.read_table(tmp_path / f"by{count}"), expected)
        process = start(cluster, listed, tmp_path / "killed", *args)
        kills, wait_s = 0, 5.0  # the first one soon, whatever the machine's speed
        while process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(wait_s)
            alive = [pid for one in machines for pid in workers_of(one.pid, "Worker.serve")]
            if alive:
                os.kill(alive[kills % len(alive)], signal.SIGKILL)
                kills, wait_s = kills + 1, 20.0
            if kills == 2:
                kill_all(machines[2].pid)
        report = end(process)
        print(kills, report)
        assert kills > 1
        assert report["retries"] > 0
        assert_same(pq.read_table(tmp_path / "killed"), expected)


def test_a_cluster_that_is_not_there_is_said_in_one_line(work: Path) -> None:
    args = [write_list(work, 10), work / "out", "--store", work / "s", "--ray", "127.0.0.1:1"]
    done = CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)
    assert (done.exit_code, done.stdout) == (1, "")
    said = "Ray at 127.0.0.1:1: cannot be reached: Connection refused: check the address, or start Ray"
    assert done.stderr == f"Error: {said}\n"
