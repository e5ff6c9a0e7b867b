"""Several pear-serve behind nginx: what the proxy costs, what hashing by task gains, and whether scale_sim is right.

    python -m benchmarks.serve.fleet --out benchmarks/results/serve_fleet.json

Real processes on loopback with pear_tiny and random tasks, each pear-serve with one thread on a core of its own (in
turn), and nginx with deploy/nginx/pear.conf, two workers. Whatever is compared takes turns, and the order changes from
round to round. The load comes from a process of its own (benchmarks/serve/load.py).

    overhead   a lone client, and saturation by 32, of 1 and 2 replicas: direct, and through nginx
    hits       2 replicas that hold a quarter of the tasks each: hashed by task, in turn, least connections
    workers    2, 4 and 8 replicas: the share of requests whose task was loaded, beside what scale_sim predicts
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import click
from PIL import Image

from benchmarks.router.peers import machine, make_tasks
from benchmarks.scale_sim import Fleet, Policy, popularity, simulate
from benchmarks.serve.speed import (
    OURS,
    Bench,
    Figures,
    Server,
    load,
    medians,
    rotated,
    started,
    times_of,
    versions,
)  # fmt: skip
from pear_store import Store
from router import Router, load_backbone

CONF = Path(__file__).parents[2] / "deploy/nginx/pear.conf"
TASKS = 64
NAMES = [f"t{number:03}" for number in range(TASKS)]
HASH = "hash $pear_key consistent;"
ROUTINGS: dict[Policy, str] = {"hash": HASH, "round robin": "", "least loaded": "least_conn;"}
WORKERS = (2, 4, 8)
SLOTS = {2: 16, 4: 8, 8: 6}
"""Tasks that a replica holds, by how many replicas there are."""
EXPONENTS = (0.8, 1.2)


def make_files(bench: Bench) -> int:
    """Images and a store, unless they are there; how many bytes of slots a task takes."""
    images, where = bench.work / "images", bench.work / "tiny.store"
    backbone = load_backbone("pear_tiny")
    if not images.exists():
        import skimage.data

        images.mkdir(parents=True)
        for number, name in enumerate(("astronaut", "chelsea", "coffee", "rocket")):
            Image.fromarray(getattr(skimage.data, name)()).resize((64, 64)).save(images / f"{number}.jpg", quality=90)
    if not where.exists():
        made = bench.work / "tiny.making"
        shutil.rmtree(made, ignore_errors=True)
        with Store.create(made) as store:
            list(store.add_many(make_tasks(backbone, "blocks", NAMES)))
        made.rename(where)
    with Router(backbone, where) as router:
        router.preload(NAMES[:1]).result()
        return router.stats().size_bytes


def replica(bench: Bench, number: int, slot_bytes: int | None) -> AbstractContextManager[Server]:
    """A pear-serve on one core."""
    core = number % (os.cpu_count() or 1)
    slots = [] if slot_bytes is None else ["--slot-bytes", str(slot_bytes)]
    command = ["taskset", "-c", str(core), sys.executable, "-m", "router.serve", "--store",
               str(bench.work / "tiny.store"), "--device", "cpu", "--port", "PORT", "--refresh-s", "0",
               *(slots or ["--preload", "all"])]  # fmt: skip
    return started(bench, f"pear-serve {number}", command, "/readyz", OURS)


@contextmanager
def nginx(bench: Bench, ports: Sequence[int], routing: str) -> Iterator[Server]:
    """nginx with our configuration before these replicas."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        raise click.ClickException("nginx is not installed")
    folder = bench.work / "nginx"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = CONF.read_text().replace("/var/log/nginx/pear.log", f"{folder}/access.log")
    text = text.replace("listen 8080;", f"listen 127.0.0.1:{port};").replace(HASH, routing)
    lines = re.findall(r"^    server 127\.0\.0\.1:\d+ (.*)$", text, re.MULTILINE)
    servers = "\n".join(f"    server 127.0.0.1:{one} {lines[0]}" for one in ports)
    text = re.sub(r"(?:^    server 127\.0\.0\.1:\d+ .*\n)+", servers + "\n", text, flags=re.MULTILINE)
    (folder / "pear.conf").write_text(text)
    user = "user root;" if os.getuid() == 0 else ""
    places = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi",
                                                                       "scgi"))  # fmt: skip
    (folder / "nginx.conf").write_text(
        f"{user} worker_processes 2; pid {folder}/pid; error_log {folder}/error.log; daemon off;\n"
        f"events {{ worker_connections 1024; }}\nhttp {{ {places} include {folder}/pear.conf; }}\n"
    )
    process = subprocess.Popen([program, "-p", str(folder), "-c", str(folder / "nginx.conf")], process_group=0)
    server = Server("nginx", process, port, "/livez", OURS)
    try:
        server.wait()
        yield server
    finally:
        process.terminate()
        process.wait(20)


def counters(servers: Sequence[Server]) -> tuple[int, int]:
    """Images that were answered, and tasks that were loaded, by all of them."""
    images = loads = 0.0
    for server in servers:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        images += sum(float(value) for value in re.findall(r"^pear_images_total\{.*\} (.+)$", text, re.MULTILINE))
        loads += sum(float(value) for value in re.findall(r"^pear_slot_loads_total (.+)$", text, re.MULTILINE))
    return int(images), int(loads)


def asked(bench: Bench, front: Server, streams: dict[str, Figures], seconds: float) -> Figures:
    """Rate and times of all streams together, after a warm-up of a second; and processor time of nginx."""
    load_found = load(bench, front, streams, seconds, 1)
    found = load_found["streams"]
    times = [second for stream in found.values() for second in stream["seconds"]]
    figures: Figures = {"rate": sum(stream["rate"] for stream in found.values()), **times_of(times)}
    if front.name == "nginx":
        figures["nginx_cpu_ms_a_request"] = 1000 * load_found["server_cpu_s"] / max(1, len(times))
    return figures


def overhead(bench: Bench, task_bytes: int) -> Figures:
    found: dict[str, list[Figures]] = {}
    with ExitStack() as stack:
        servers = [stack.enter_context(replica(bench, number, None)) for number in range(2)]
        for server in servers:
            server.wait()
        ports = [server.port for server in servers]
        fronts = {count: stack.enter_context(nginx_in(bench, ports[:count])) for count in (1, 2)}
        ways: dict[str, Callable[[int], tuple[Server, dict[str, Figures]]]] = {}
        for count in (1, 2):
            halves = [NAMES[number:16:count] for number in range(count)]

            def direct(clients: int, halves: list[list[str]] = halves) -> tuple[Server, dict[str, Figures]]:
                some = halves[: max(1, min(clients, len(halves)))]
                return servers[0], {
                    str(number): {**OURS, "tasks": half, "connections": clients // len(some), "port": ports[number]}
                    for number, half in enumerate(some)
                }

            def behind(clients: int, front: Server = fronts[count]) -> tuple[Server, dict[str, Figures]]:
                return front, {"all": {**OURS, "tasks": NAMES[:16], "connections": clients}}

            ways |= {f"direct, {count}": direct, f"nginx, {count}": behind}
        for turn in range(bench.rounds):
            for name in rotated(list(ways), turn):
                for what, clients, seconds in (("lone", 1, bench.seconds / 2), ("saturated", 32, bench.seconds)):
                    front, streams = ways[name](clients)
                    found.setdefault(f"{what}, {name}", []).append(asked(bench, front, streams, seconds))
    return {name: medians(rounds) for name, rounds in found.items()}


@contextmanager
def nginx_in(bench: Bench, ports: Sequence[int]) -> Iterator[Server]:
    """One of several nginx, in a folder of its own."""
    folder = bench.work / f"front-{len(ports)}"
    folder.mkdir(exist_ok=True)
    apart = Bench(folder, bench.device, bench.threads, bench.rounds, bench.seconds, None, bench.tasks)
    with nginx(apart, ports, HASH) as server:
        yield server


def hit_share(bench: Bench, servers: Sequence[Server], front: Server, exponent: float, clients: int) -> Figures:
    """The share of images whose task was loaded already, after a warm-up, and times."""
    stream = {**OURS, "tasks": NAMES, "weights": popularity(TASKS, exponent).tolist(), "connections": clients}
    load(bench, front, {"all": stream}, 2, 0)
    images, loads = counters(servers)
    found = load(bench, front, {"all": stream}, bench.seconds, 0)["streams"]["all"]
    images, loads = (after - before for before, after in zip((images, loads), counters(servers), strict=True))
    return {"hits": 1 - loads / images, "rate": found["rate"], **times_of(found["seconds"])}


def hits(bench: Bench, task_bytes: int) -> Figures:
    found: dict[str, list[Figures]] = {}
    with ExitStack() as stack:
        slot_bytes = TASKS // 4 * task_bytes
        servers = [stack.enter_context(replica(bench, number, slot_bytes)) for number in range(2)]
        for server in servers:
            server.wait()
        for turn in range(bench.rounds):
            for policy in rotated(list(ROUTINGS), turn):
                with nginx(bench, [server.port for server in servers], ROUTINGS[policy]) as front:
                    found.setdefault(policy, []).append(hit_share(bench, servers, front, 0.8, 16))
    return {"tasks": TASKS, "slots": TASKS // 4, "exponent": 0.8,
            **{name: medians(rounds) for name, rounds in found.items()}}  # fmt: skip


def workers(bench: Bench, task_bytes: int) -> Figures:
    rows = []
    for count in WORKERS:
        slots = SLOTS[count]
        with ExitStack() as stack:
            servers = [stack.enter_context(replica(bench, number, slots * task_bytes)) for number in range(count)]
            for server in servers:
                server.wait()
            ports = [server.port for server in servers]
            for policy in ("hash", "round robin"):
                with nginx(bench, ports, ROUTINGS[policy]) as front:
                    for exponent in EXPONENTS:
                        measured = hit_share(bench, servers, front, exponent, 8)
                        predicted = statistics.mean(
                            simulate(
                                Fleet(count, slots, row_s=0.002), popularity(TASKS, exponent), 100, 20_000, policy,
                                seed=seed, servers=[f"127.0.0.1:{port}" for port in ports], names=NAMES,
                            ).hits
                            for seed in range(3)
                        )  # fmt: skip
                        rows.append({"replicas": count, "slots": slots, "routing": policy, "exponent": exponent,
                                     "measured": measured["hits"], "predicted": predicted,
                                     "images": measured["answers"]})  # fmt: skip
                        click.echo(f"  {rows[-1]}", err=True)
    return {"tasks": TASKS, "rows": rows}


SECTIONS: dict[str, Callable[[Bench, int], Figures]] = {"overhead": overhead, "hits": hits, "workers": workers}


@click.command(help=__doc__)
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--only", multiple=True, type=click.Choice(list(SECTIONS)), help="A section; give it again for more.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--seconds", default=6.0, show_default=True, type=click.FloatRange(1), help="Of a measurement.")
@click.option("--work", default=Path("runs/serve_fleet"), show_default=True, type=click.Path(path_type=Path))
def main(out: Path, only: tuple[str, ...], rounds: int, seconds: float, work: Path) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))  # ends the servers, too
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(work.absolute(), "cpu", 1, rounds, seconds, None, TASKS)
    task_bytes = make_files(bench)
    report = json.loads(out.read_text()) if out.exists() else {"sections": {}}
    nginx_version = subprocess.run(["nginx", "-v"], capture_output=True, text=True).stderr.strip()
    for name in only or SECTIONS:
        click.echo(name, err=True)
        load_before = os.getloadavg()[0]
        began = time.monotonic()
        figures = SECTIONS[name](bench, task_bytes)
        report["sections"][name] = {
            "command": shlex.join(["python", "-m", "benchmarks.serve.fleet", *sys.argv[1:]]), "machine": machine(),
            "versions": versions(bench) | {"nginx": nginx_version}, "load_before": load_before,
            "took_s": time.monotonic() - began, "task_bytes": task_bytes, "figures": figures,
        }  # fmt: skip
        shown = json.loads(json.dumps(report), parse_float=lambda text: float(f"{float(text):.5g}"))
        out.write_text(json.dumps(shown, indent=1) + "\n")
        click.echo(json.dumps(shown["sections"][name]["figures"], indent=1))


if __name__ == "__main__":
    main()
