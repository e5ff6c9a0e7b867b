#!/usr/bin/env python3
"""The store beside restic, DVC and plain safetensors files: add, stored bytes, reads, gc, verify, start-up.

One run makes the task checkpoints (24 float32 tensors of 24,576 bytes each, 60 % of them drawn from a common pool),
measures all contestants interleaved, in an order that rotates from repeat to repeat, and prints each figure beside its
target. restic comes from PATH, else from apt-get; DVC from --peers-venv, which is made if absent; a
peer that cannot be had is left out and named in the JSON. A run of 1,000 tasks needs about 8 GB of disk. Run it alone.

    python -m benchmarks.store.peers --out benchmarks/results/store_peers.json
"""

import compileall
import json
import multiprocessing
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click
import numpy as np
import torch
from safetensors.torch import load_file
from tabulate import tabulate
from torch import Tensor

import pear_store
from pear_store import RawTensor, Store, make_task, write_checkpoint

ADAPTERS = 12
SHAPES = {"down": (768, 8), "up": (8, 768)}
SHARED = 0.6
SINGLES, STARTS, COLD_SAMPLES, HOT_PASSES = 10, 10, 40, 3
RESULT = "benchmarks/results/store_peers.json"
BIN = Path(sys.executable).parent
DROP_CACHES = os.geteuid() == 0 and os.access("/proc/sys/vm/drop_caches", os.W_OK)
TOUCHED = ("read_s", "touch_s")

METHOD = (
    "ratios: median over the pairs of an interleaved run; seconds: medians",
    "bulk: wall time of one command that adds a fresh copy of all files, in page cache, to an empty store; a sync "
    "before it; sync_after_s is what another takes right after it, and counts in no ratio",
    "pear and restic fsync what they store before their command ends; DVC fsyncs its database of states, not the data",
    "restic, DVC: at their defaults, DVC without scm, analytics and update check; neither shares tensors between files",
    "single: a new task, 60 % pool tensors, into the filled store; verify: the whole command, files in page cache",
    "hot: second and later reads of every task in one process and thread, random order, files in page cache; a digest "
    "is checked on a tensor's first read in a process, so once for each pool tensor; first: the first reads there",
    "touch_s: reading one float of every page of the tensors then (load_file maps its file); counts in cold reads",
    "cold: a new process, warmed up on another store, drops the page cache (posix_fadvise on all files; drop_caches if "
    "root), then opens the store and reads one task, digests checked; disk_read_bytes as the kernel counts them",
    "gc: a random half of the tasks removed, then gc timed in process, on a copy of the filled store each time; "
    "dead_bytes stay in packs without repack_all, none stay in DVC; restic left out: all tasks are one snapshot there",
)
DVC_GC = """
import time
from dvc.repo import Repo
with Repo(".") as repo:
    start = time.perf_counter()
    repo.gc(workspace=True, force=True)
    print("seconds", time.perf_counter() - start)
"""
# torch cannot know that nobody writes to a map of a pack
warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8, "U8": torch.uint8}


def shared(raw: RawTensor) -> Tensor:
    """A tensor of the raw one's memory."""
    return torch.frombuffer(raw.data, dtype=DTYPES[raw.dtype]).view(raw.shape)


READERS: dict[str, Callable[[Store, Path], dict[str, Tensor]]] = {
    "copy": lambda s, file: {n: shared(t) for n, t in s.get(file.stem).tensors.items()},
    "zero_copy": lambda s, file: {n: shared(t) for n, t in s.get(file.stem, copy=False).tensors.items()},
    "load_file": lambda _, file: load_file(file),
}
Rows = dict[str, list[dict[str, Any]]]  # contestant -> its results, which pair up with the others'


@dataclass(frozen=True)
class Contestant:
    """A program that stores files, with a directory of its own, where its commands run."""

    name: str
    home: Path
    create: tuple[tuple[str, ...], ...]
    add: tuple[str, ...]
    check: tuple[str, ...] = ()
    kept: str = "store"
    env: dict[str, str] = field(default_factory=dict)

    def run(self, command: Sequence[str]) -> tuple[float, str]:
        """Wall seconds and output of a command."""
        env = {**os.environ, **{key: value.format(home=self.home) for key, value in self.env.items()}}
        start = time.perf_counter()
        done = subprocess.run(command, cwd=self.home, env=env, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise click.ClickException(f"{self.name}: exit code {done.returncode}\n{done.stderr[-2000:]}")
        return seconds, done.stdout

    def fill(self, tasks: Path) -> dict[str, Any]:
        """Makes everything anew, and adds all tasks by one command."""
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir()
        for command in self.create:
            self.run(command)
        shutil.copytree(tasks, self.home / "tasks")
        os.sync()
        # pear-store takes files, the others a directory
        what = sorted(f"tasks/{path.name}" for path in tasks.iterdir()) if self.name == "pear" else ["tasks"]
        seconds, _ = self.run([*self.add, *what])
        start = time.perf_counter()
        os.sync()
        return {"seconds": seconds, "tasks_per_s": len(files_under(tasks)) / seconds,
                "sync_after_s": time.perf_counter() - start}  # fmt: skip

    def add_one(self, file: Path) -> dict[str, Any]:
        shutil.copy(file, self.home)
        os.sync()
        return {"seconds": self.run([*self.add, file.name])[0]}


def pear(work: Path) -> Contestant:
    command = (str(BIN / "pear-store"), "--store", "store")
    return Contestant("pear", work / "pear", ((*command, "init"),), (*command, "add"), (*command, "verify"))


def restic(work: Path) -> Contestant:
    command = ("restic", "-r", "store")
    env = {"RESTIC_PASSWORD": "benchmark", "RESTIC_CACHE_DIR": "{home}/cache"}
    check = (*command, "check", "--read-data")
    return Contestant("restic", work / "restic", ((*command, "init"),), (*command, "backup"), check, env=env)


def dvc(work: Path, venv: Path) -> Contestant:
    command = str(venv / "bin" / "dvc")
    create = ((command, "init", "--no-scm"), (command, "config", "core.check_update", "false"))
    # its database of known files must not outlive the directory: inode numbers are used again
    kinds = ("SITE_CACHE", "GLOBAL_CONFIG", "SYSTEM_CONFIG")
    env = {"DVC_NO_ANALYTICS": "1", **{f"DVC_{kind}_DIR": "{home}/.own/" + kind for kind in kinds}}
    return Contestant("dvc", work / "dvc", create, (command, "add"), kept=".dvc/cache", env=env)


def make_tasks(folder: Path, count: int, pool_size: int, seed: int) -> None:
    """Writes task checkpoints named after the folder; the pool's tensors are the same whatever the seed."""
    folder.mkdir()
    pool_random, own_random = np.random.default_rng(0), np.random.default_rng(seed)

    def matrix(generator: np.random.Generator, shape: tuple[int, int]) -> RawTensor:
        return RawTensor("F32", shape, generator.standard_normal(shape, np.float32).tobytes())

    names = [(f"a{i:02d}.{side}", shape) for i in range(ADAPTERS) for side, shape in SHAPES.items()]
    pool = {name: [matrix(pool_random, shape) for _ in range(pool_size)] for name, shape in names}
    for i in range(count):
        tensors = {}
        for name, shape in names:
            shared, which = own_random.random() < SHARED, own_random.integers(pool_size)
            tensors[name] = pool[name][which] if shared else matrix(own_random, shape)
        record: dict[str, Any] = {
            "format": "pear-task/1", "task": f"{folder.name}-{i:05d}", "activation": "relu", "head": None, "labels": [],
            "backbone": {"model": "vit_base_patch16_224", "digest": "sha256:" + "0" * 64},
            "adapters": {f"a{k:02d}": {side: f"a{k:02d}.{side}" for side in SHAPES} for k in range(ADAPTERS)},
            "positions": {f"blocks.{k}.mlp": [[f"a{k:02d}", 1.0]] for k in range(ADAPTERS)},
            "preprocess": {"input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9,
                           "interpolation": "bicubic", "crop_mode": "center"}, "metrics": {}, "training": {},
        }  # fmt: skip
        write_checkpoint(folder / f"{record['task']}.safetensors", make_task(record, tensors))


def rotated(items: list[Any], by: int) -> list[Any]:
    return [*items[by % len(items) :], *items[: by % len(items)]]


def interleaved(what: str, repeats: int, contestants: Mapping[str, Callable[[int], dict[str, Any]]]) -> Rows:
    """Calls every contestant once a repeat, in an order that rotates."""
    found: Rows = {name: [] for name in contestants}
    for repeat in range(repeats):
        for name in rotated(list(contestants), repeat):
            found[name].append(contestants[name](repeat))
            click.echo(f"{what} {repeat + 1}/{repeats}: {name} {found[name][-1]['seconds']:.4f} s", err=True)
    return found


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "p95": quantiles(values, n=20)[-1], "max": max(values)}


def fsync_s(folder: Path) -> dict[str, float]:
    """What a 4 KiB write and its fsync take here, 100 times."""
    times = []
    with open(folder / "fsync", "wb", buffering=0) as file:
        for _ in range(100):
            start = time.perf_counter()
            file.write(bytes(4096))
            os.fsync(file.fileno())
            times.append(time.perf_counter() - start)
    return summary(times)


def files_under(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def file_bytes(contestant: Contestant) -> int:
    return sum(path.stat().st_size for path in files_under(contestant.home / contestant.kept))


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """Calls it in a forked process; this one never opens the store that is measured."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *args).result()


def read(reader: str, store: Any, file: Path) -> dict[str, float]:
    """Reads a task, then one float of every page of its tensors; freeing them is not timed."""
    start = time.perf_counter()
    tensors = READERS[reader](store, file)
    done = time.perf_counter()
    for tensor in tensors.values():
        tensor.view(-1)[::1024].sum().item()
    touched = time.perf_counter()
    assert len(tensors) == 2 * ADAPTERS
    return {"read_s": done - start, "touch_s": touched - done}


def hot_reads(path: Path, files: list[Path]) -> tuple[Rows, Rows]:
    """The first reads of all tasks in a process, and those after them."""
    torch.set_num_threads(1)
    first: Rows = {reader: [] for reader in ("copy", "load_file")}
    hot: Rows = {reader: [] for reader in READERS}
    with Store(path) as store:
        for step, rows in enumerate([first] + [hot] * HOT_PASSES):
            order = random.Random(step).sample(files, len(files))
            for i, file in enumerate(order):
                for reader in rotated(list(rows), i):
                    rows[reader].append(read(reader, store, file))
        for file in files:  # all hand out the same
            assert (
                len({tuple(sorted(bytes(t.numpy()) for t in r(store, file).values())) for r in READERS.values()}) == 1
            )
    return first, hot


def cold_read(reader: str, path: Path, file: Path, warm: Path, drop: list[Path]) -> dict[str, Any]:
    torch.set_num_threads(1)
    with Store(warm / "store") as store:  # warms up the code and this process' memory, not the files that count
        for other in files_under(warm / "tasks"):
            read(reader, store, other)
    drop_page_cache(drop)
    before = disk_read_bytes()
    start = time.perf_counter()
    with nullcontext() if reader == "load_file" else Store(path) as store:
        opened = time.perf_counter() - start
        times = read(reader, store, file)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "open_s": opened, **times, "disk_read_bytes": disk_read_bytes() - before}


def drop_page_cache(files: list[Path]) -> None:
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if DROP_CACHES:
        Path("/proc/sys/vm/drop_caches").write_text("1\n")


def disk_read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().partition("\nread_bytes: ")[2].split()[0])


def on_copy(filled: Contestant, collect: Callable[[Contestant], dict[str, Any]]) -> dict[str, Any]:
    copy = replace(filled, home=filled.home.with_name(f"{filled.name}-copy"))
    shutil.copytree(filled.home, copy.home, symlinks=True)
    result = {**collect(copy), "kept_bytes": file_bytes(copy)}
    shutil.rmtree(copy.home)
    return result


def pear_gc(path: Path, half: Sequence[str], repack_all: bool) -> dict[str, Any]:
    with Store(path) as store:
        store.remove(*(Path(name).stem for name in half))
        os.sync()
        start = time.perf_counter()
        result = store.gc(repack_all=repack_all)
        return {"seconds": time.perf_counter() - start, "dead_bytes": result.dead_bytes}


def dvc_gc(copy: Contestant, half: Sequence[str]) -> dict[str, Any]:
    for name in half:
        (copy.home / "tasks" / name).unlink()
    copy.run([*copy.add, "tasks"])
    os.sync()
    _, output = copy.run([str(Path(copy.add[0]).with_name("python")), "-c", DVC_GC])
    return {"seconds": float(output.split()[-1])}


def find_peers(work: Path, venv: Path) -> list[Contestant]:
    if not shutil.which("restic") and shutil.which("apt-get"):
        subprocess.run(["apt-get", "install", "-y", "restic"], capture_output=True)
    if not (venv / "bin" / "dvc").exists() and not subprocess.run([sys.executable, "-m", "venv", venv]).returncode:
        subprocess.run([venv / "bin" / "python", "-m", "pip", "install", "--quiet", "dvc"])
    there = (shutil.which("restic"), (venv / "bin" / "dvc").exists())
    return [peer for peer, found in zip((restic(work), dvc(work, venv.absolute())), there, strict=True) if found]


def machine(work: Path) -> dict[str, Any]:
    cpu = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
    file_system = subprocess.run(["df", "--output=fstype", work], capture_output=True, text=True).stdout.split()[-1]
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": cpu or platform.machine(), "cores": len(os.sched_getaffinity(0)), "ram_bytes": ram,
            "file_system": file_system, "kernel": platform.release()}  # fmt: skip


def versions(peers: list[Contestant]) -> dict[str, str]:
    found = {name: version(name) for name in ("pear-adapters", "torch", "safetensors", "lmdb", "click", "numpy")}
    words = {"restic": "version", "dvc": "--version"}
    asked = {peer.name: peer.run([peer.add[0], words[peer.name]])[1].strip() for peer in peers}
    return {"python": platform.python_version(), **found, **asked}


def measure(work: Path, ours: Contestant, peers: list[Contestant], repeats: int) -> dict[str, Any]:
    """Everything that TARGETS judge, and more."""
    files = sorted((work / "tasks").iterdir())
    everyone = [ours, *peers]

    def fill(contestant: Contestant, _: int) -> dict[str, Any]:
        return contestant.fill(work / "tasks")

    def timed(contestant: Contestant, command: Sequence[str], _: int) -> dict[str, Any]:
        return {"seconds": contestant.run(command)[0]}

    def cold(reader: str, turn: int) -> dict[str, Any]:
        found: dict[str, Any] = in_child(cold_read, reader, store, order[turn], warm.home, drop)
        return found

    def collected(contestant: Contestant, collector: Callable[[Contestant], dict[str, Any]], _: int) -> dict[str, Any]:
        return on_copy(contestant, collector)

    def add_one(contestant: Contestant, turn: int) -> dict[str, Any]:
        return contestant.add_one(ones[turn])

    bulk = interleaved("bulk", repeats, {c.name: partial(fill, c) for c in everyone})
    store = ours.home / ours.kept
    stats = json.loads(ours.run([*ours.add[:-1], "stats", "--json"])[1])
    sizes = {c.name: file_bytes(c) for c in everyone}
    check = {c.name: partial(timed, c, c.check) for c in everyone if c.check}
    verify = interleaved("verify", repeats, check)
    verbs = {verb: partial(timed, ours, [*ours.add[:-1], verb]) for verb in ("--help", "ls")}
    start = interleaved("start-up", STARTS, verbs)

    first, hot = in_child(hot_reads, store, files)
    warm = replace(ours, home=work / "warm")
    warm.fill(work / "ones")
    drop = files_under(store) + files
    order = random.Random(1).choices(files, k=COLD_SAMPLES)
    colds = {r: partial(cold, r) for r in READERS}
    cold_rows = interleaved("cold", COLD_SAMPLES, colds)

    half = random.Random(0).sample([file.name for file in files], len(files) // 2)
    collect = {
        "pear": (ours, lambda copy: in_child(pear_gc, copy.home / copy.kept, half, False)),
        "pear_repack_all": (ours, lambda copy: in_child(pear_gc, copy.home / copy.kept, half, True)),
        **{c.name: (c, lambda copy: dvc_gc(copy, half)) for c in peers if c.name == "dvc"},
    }
    gc = interleaved("gc", repeats, {k: partial(collected, *both) for k, both in collect.items()})
    ones = sorted((work / "ones").iterdir())
    single = interleaved("single", SINGLES, {c.name: partial(add_one, c) for c in everyone})
    return {
        "bulk": bulk, "stats": stats, "file_bytes": sizes, "verify": verify, "start": start,
        "first": first, "hot": hot, "cold": cold_rows, "gc": gc, "single": single,
    }  # fmt: skip


def ratio(kind: str, one: str, other: str, *keys: str) -> Callable[[dict[str, Any]], float | None]:
    """Of what was measured: median of one's figures (the keys' sum) over the other's, pair by pair."""

    def figure(measured: dict[str, Any]) -> float | None:
        rows = measured[kind]
        if one not in rows or other not in rows:  # a peer that could not be had
            return None
        pairs = zip(rows[one], rows[other], strict=True)
        return float(median(sum(a[key] for key in keys) / sum(b[key] for key in keys) for a, b in pairs))

    return figure


def seconds(kind: str, who: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda measured: median(row["seconds"] for row in measured[kind][who])


TARGETS: tuple[tuple[str, str, float | None, Callable[[dict[str, Any]], float | None]], ...] = (
    # what, at least or at most, which limit (None: for information), how it follows from what was measured
    ("bulk add, tasks/s over restic backup", ">=", 5, ratio("bulk", "restic", "pear", "seconds")),
    ("bulk add, tasks/s over dvc add", ">=", 3, ratio("bulk", "dvc", "pear", "seconds")),
    ("stored bytes over unique bytes", "<=", 1.05, lambda m: m["stats"]["stored_bytes"] / m["stats"]["unique_bytes"]),
    ("one task a command, s over restic's", "<=", 1 / 3, ratio("single", "pear", "restic", "seconds")),
    ("one task a command, s over DVC's", "<=", 1 / 3, ratio("single", "pear", "dvc", "seconds")),
    ("one task a command, s", "<=", 0.3, seconds("single", "pear")),
    ("hot read, copied, over load_file", "<=", 0.6, ratio("hot", "copy", "load_file", "read_s")),
    ("hot read, zero-copy, over load_file", "<=", 0.35, ratio("hot", "zero_copy", "load_file", "read_s")),
    ("hot read, copied, pages touched", "<=", None, ratio("hot", "copy", "load_file", *TOUCHED)),
    ("hot read, zero-copy, pages touched", "<=", None, ratio("hot", "zero_copy", "load_file", *TOUCHED)),
    ("first read in a process, copied", "<=", None, ratio("first", "copy", "load_file", "read_s")),
    ("cold read with Store(), over load_file", "<=", 1.5, ratio("cold", "copy", "load_file", "seconds")),
    ("cold read, store open, over load_file", "<=", 1.5, ratio("cold", "copy", "load_file", *TOUCHED)),
    ("cold read, store open, zero-copy", "<=", None, ratio("cold", "zero_copy", "load_file", *TOUCHED)),
    ("gc of half, s over DVC's", "<=", 0.1, ratio("gc", "pear", "dvc", "seconds")),
    ("gc of half with repack_all", "<=", None, ratio("gc", "pear_repack_all", "dvc", "seconds")),
    ("verify, s over restic check --read-data", "<=", 0.2, ratio("verify", "pear", "restic", "seconds")),
    ("pear-store --help, s", "<=", 0.25, seconds("start", "--help")),
    ("pear-store ls, s", "<=", 0.25, seconds("start", "ls")),
)


def judged(measured: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for what, sign, limit, figure in TARGETS:
        value = figure(measured)
        met = None if value is None or limit is None else value >= limit if sign == ">=" else value <= limit
        rows.append({"figure": what, "measured": value, "target": limit and f"{sign} {limit:.3g}", "met": met})
    return rows


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where the JSON goes.")
@click.option("--tasks", default=1000, show_default=True, type=click.IntRange(min=2))
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(min=1))
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/store_peers"), show_default=True)
@click.option("--peers-venv", type=click.Path(path_type=Path), help="Where DVC is or goes.  [default: WORK/peers]")
def main(out: Path, tasks: int, repeats: int, work: Path, peers_venv: Path | None) -> None:
    compileall.compile_dir(Path(pear_store.__file__).parent, quiet=1)  # as an installer does, for an editable one, too
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work.absolute()) as folder:
        run(out, tasks, repeats, Path(folder), peers_venv or work.absolute() / "peers")


def run(out: Path, tasks: int, repeats: int, work: Path, peers_venv: Path) -> None:
    notes = [] if DROP_CACHES else ["not root, so drop_caches was not used: cold means posix_fadvise alone"]
    peers = find_peers(work, peers_venv)
    notes += [f"{name} could not be had: left out" for name in ("restic", "dvc") if name not in {p.name for p in peers}]
    noise = [{"load": os.getloadavg(), "fsync_4kib_s": fsync_s(work)}]
    for folder, count, seed in (("tasks", tasks, 1), ("ones", SINGLES, 2)):
        make_tasks(work / folder, count, max(1, tasks // 100), seed)
    found = measure(work, pear(work), peers, repeats)
    noise.append({"load": os.getloadavg(), "fsync_4kib_s": fsync_s(work)})
    rows = judged(found)
    for kind in ("first", "hot"):  # thousands of rows each
        for reader, reads in found[kind].items():
            found[kind][reader] = {key: summary([row[key] for row in reads]) for key in reads[0]}
    record = {
        "command": f"python -m benchmarks.store.peers --out {RESULT} --tasks {tasks} --repeats {repeats}",
        "machine": machine(work), "versions": versions(peers), "noise_at_start_and_end": noise, "method": METHOD,
        "notes": notes, "targets": rows, "measured": found,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    record = json.loads(json.dumps(record), parse_float=lambda text: round(float(text), 6))
    out.write_text(json.dumps(record, indent=1) + "\n")
    verdict = {True: "met", False: "MISSED", None: None}
    table = [[row["figure"], row["measured"], row["target"], verdict[row["met"]]] for row in rows]
    click.echo(tabulate(table, ["figure", "measured", "target", ""], floatfmt=".3f", missingval="-"))
    click.echo("\n".join(notes))


if __name__ == "__main__":
    main()
