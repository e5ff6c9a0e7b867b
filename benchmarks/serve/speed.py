"""pear-serve over the bare backbone, and beside LitServe, BentoML and a FastAPI endpoint around PEFT, over HTTP.

    python -m benchmarks.serve.speed --out benchmarks/results/serve_speed.json --peers-python ENVIRONMENT/bin/python

Sections run by themselves with --only, which keeps the others' figures in the JSON. The load comes over loopback from a
process of its own (benchmarks/serve/load.py). Its processor time is stated, and that of whatever else ran. Images are
JPEGs of 224 pixels, cut from real pictures; weights and adapters are random. Whatever is compared takes turns; servers
that are not asked are stopped (SIGSTOP), so that they take no processor.

    served   saturation over the bare forward of the same batch size; a lone client; 70 % of saturation (Poisson)
    lone     where the time of a lone request goes: the forward, decoding, adapters, the router, the batcher, HTTP
    batches  the same by --max-batch: rate, and times at saturation
    tasks    saturation by how many tasks the requests are for
    fairness times of 15 tasks at 20 % of saturation, without and with a client that floods another task
    peers    saturation beside the peers, which have the same tasks, images and threads (benchmarks/serve/peers/)

Install benchmarks/serve/peers/requirements.txt beside torch, timm and PEFT; --peers-python is that interpreter.
"""

import asyncio
import base64
import json
import multiprocessing
import os
import platform
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from io import BytesIO
from itertools import count, cycle
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import numpy as np
import skimage.data
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data.transforms_factory import create_transform

from benchmarks.router.peers import PATTERNS_24, RANK, machine, make_tasks
from pear_store import Store
from pear_store.exchange.peft import export_peft
from router import Router, load_backbone
from router.serve.batcher import Batcher

MODELS = {"base": "vit_base_patch16_224", "tiny": "vit_tiny_patch16_224"}
MAX_BATCH = {"base": 16, "tiny": 64}
DTYPES = ("float32", "bfloat16")
TASKS, MOST_TASKS, IMAGES = 16, 200, 64
QUEUE = 1024
"""The default of --queue."""
PICTURES = ("astronaut", "chelsea", "coffee", "rocket")
OURS = {"path": "/v1/tasks/TASK/predict"}
OURS_JSON = {"path": "/v1/predict", "body": '{"images": [{"task": "TASK", "image": "IMAGE"}]}'}
ITEM = {"path": "/predict", "body": '{"task": "TASK", "image": "IMAGE"}'}
ITEMS = {"path": "/predict", "body": '{"items": [{"task": "TASK", "image": "IMAGE"}]}'}
NAMES = [f"t{i:03}" for i in range(MOST_TASKS)]
Figures = dict[str, Any]
_seeds = count()


@dataclass(frozen=True)
class Bench:
    """What all sections are given."""

    work: Path
    device: str
    threads: int
    rounds: int
    seconds: float
    """Of one measurement at saturation; others follow."""
    peers_python: Path | None
    tasks: int
    """Most that are in the store."""

    def file(self, size: str, name: str) -> Path:
        return self.work / f"{size}-{name}"

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false"}


# ---- what is served -------------------------------------------------------------------------------


def make_files(bench: Bench, size: str) -> None:
    """Images, weights, stores and PEFT's folders, unless they are there."""
    images = bench.work / "images"
    if not images.exists():
        rng = np.random.default_rng(0)
        images.mkdir(parents=True)
        for number in range(IMAGES):
            picture = getattr(skimage.data, PICTURES[number % len(PICTURES)])()
            top, left = (int(rng.integers(side - 223)) for side in picture.shape[:2])
            crop = Image.fromarray(picture[top : top + 224, left : left + 224])
            crop.save(images / f"{number:03}.jpg", quality=90)
    weights = bench.file(size, "weights.safetensors")
    if not weights.exists():
        torch.manual_seed(0)
        module = timm.create_model(MODELS[size], num_classes=0)
        save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, weights)
    for kind, positions, number in (("blocks", "blocks", bench.tasks), ("linears", PATTERNS_24, TASKS)):
        where = bench.file(size, f"{kind}.store")
        if where.exists():
            continue
        made = bench.file(size, f"{kind}.making")
        shutil.rmtree(made, ignore_errors=True)
        tasks = make_tasks(load_backbone(MODELS[size], weights), positions, NAMES[:number])
        with Store.create(made) as store:
            list(store.add_many(tasks))
        if kind == "linears":
            shutil.rmtree(bench.file(size, "peft"), ignore_errors=True)
            bench.file(size, "peft").mkdir()
            for task in tasks:
                export_peft(task, bench.file(size, "peft") / task.name, linears=None)
        made.rename(where)


def bare_worker(pipe: Connection, bench: Bench, size: str, dtype: str) -> None:
    """Answers (batch size, seconds) with times of bare forwards; batch size 0: of decoding and running one image."""
    torch.set_num_threads(bench.threads)
    device = torch.device(bench.device)
    model = timm.create_model(MODELS[size], num_classes=0)
    model.load_state_dict(load_file(bench.file(size, "weights.safetensors")))
    model.to(device, getattr(torch, dtype)).eval()
    transform = create_transform((3, 224, 224), interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9)
    files = [file.read_bytes() for file in sorted((bench.work / "images").glob("*.jpg"))]

    def decoded(file: bytes) -> torch.Tensor:
        found: torch.Tensor = transform(Image.open(BytesIO(file)).convert("RGB"))
        return found

    def forward(images: torch.Tensor) -> None:
        model(images.to(device, getattr(torch, dtype)))
        if device.type == "cuda":
            torch.cuda.synchronize()

    with torch.inference_mode():
        while asked := pipe.recv():
            batch, seconds = asked
            images = torch.stack([decoded(file) for file in (files * (batch // len(files) + 1))[: max(1, batch)]])
            times: list[float] = []
            forward(images)
            end = time.perf_counter() + seconds
            while len(times) < 2 or time.perf_counter() < end:
                began = time.perf_counter()
                forward(images if batch else decoded(files[len(times) % len(files)]).unsqueeze(0))
                times.append(time.perf_counter() - began)
            pipe.send(times)


@contextmanager
def worker(
    target: Callable[[Connection, Bench, str, str], None], bench: Bench, size: str, dtype: str
) -> Iterator[Callable[[Any, float], list[float]]]:
    """A process of its own, which sleeps when it is not asked: for the bare backbone, or a router."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, bench, size, dtype), daemon=True)
    process.start()

    def ask(what: Any, seconds: float) -> list[float]:
        ours.send((what, seconds))
        found: list[float] = ours.recv()
        return found

    try:
        yield ask
    finally:
        ours.send(None)
        process.join(60)


def steps_worker(pipe: Connection, bench: Bench, size: str, dtype: str) -> None:
    """Answers (step, seconds) with times of one image in a router, by how much of the way it takes there."""
    torch.set_num_threads(bench.threads)
    backbone = load_backbone(MODELS[size], bench.file(size, "weights.safetensors"))
    store = bench.file(size, "blocks.store")
    files = [file.read_bytes() for file in sorted((bench.work / "images").glob("*.jpg"))]
    tensor = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 224, 224), np.float32))
    names = cycle(NAMES[:TASKS])
    images = cycle(files)
    with Router(backbone, store, device=bench.device, dtype=getattr(torch, dtype)) as router:
        router.preload(NAMES[:TASKS]).result()
        batcher = Batcher(router)
        steps: dict[str, Callable[[], Any]] = {
            "run_tensor": lambda: router.run(tensor, next(names)),
            "run_file": lambda: router.run(next(images), next(names)),
            "batcher": lambda: batcher.predict(next(images), next(names)),
        }

        async def times_of_step(step: str, seconds: float) -> list[float]:
            times: list[float] = []
            end = time.perf_counter() + seconds
            while len(times) < 2 or time.perf_counter() < end:
                began = time.perf_counter()
                done = steps[step]()
                if step == "batcher":
                    await done
                times.append(time.perf_counter() - began)
            return times[1:]

        with asyncio.Runner() as runner:
            while asked := pipe.recv():
                pipe.send(runner.run(times_of_step(*asked)))
            runner.run(batcher.close())


# ---- servers --------------------------------------------------------------------------------------


@dataclass
class Server:
    """A server in a process group of its own."""

    name: str
    process: "subprocess.Popen[bytes]"
    port: int
    ready: str
    target: dict[str, str]

    def wait(self, limit_s: float = 180) -> None:
        end = time.monotonic() + limit_s
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{self.ready}", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                pass
            if self.process.poll() is not None or time.monotonic() > end:
                raise click.ClickException(f"{self.name} did not start: see its .log in the working folder")
            time.sleep(0.2)

    def signal(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)


@contextmanager
def started(bench: Bench, name: str, command: Sequence[str], ready: str, target: dict[str, str], **settings: str
) -> Iterator[Server]:  # fmt: skip
    """Runs a command with PORT replaced; it need not be ready yet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(bench.work / f"{name}.log", "wb") as log:
        process = subprocess.Popen(
            [part.replace("PORT", str(port)) for part in command], stdout=log, stderr=log, process_group=0,
            env={**bench.environment, **settings},
        )  # fmt: skip
    try:
        yield Server(name, process, port, ready, target)
    finally:
        for number in (signal.SIGCONT, signal.SIGTERM):
            os.killpg(process.pid, number)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def pear_serve(
    bench: Bench, size: str, dtype: str, max_batch: int, *, kind: str = "blocks", target: dict[str, str] = OURS
) -> Any:
    command = [
        sys.executable, "-m", "router.serve", "--store", str(bench.file(size, f"{kind}.store")), "--backbone",
        MODELS[size], "--weights", str(bench.file(size, "weights.safetensors")), "--dtype", dtype, "--device",
        bench.device, "--port", "PORT", "--max-batch", str(max_batch), "--preload", "all", "--refresh-s", "0",
        "--timeout-s", "300",
    ]  # fmt: skip
    return started(bench, f"pear-serve {max_batch}", command, "/readyz", target)


def peer(bench: Bench, size: str, dtype: str, max_batch: int, name: str) -> Any:
    """A server of benchmarks/serve/peers/, by its name below."""
    python = str(bench.peers_python)
    what, _, mode = name.partition(", ")
    settings = {
        "model": MODELS[size], "weights": str(bench.file(size, "weights.safetensors")), "dtype": dtype,
        "adapters": str(bench.file(size, "peft")), "device": bench.device, "threads": bench.threads,
        "max_batch": max_batch, "mode": "names" if mode == "adapter_names" else "switch",
    }  # fmt: skip
    package = "benchmarks.serve.peers"
    command, ready, target = {
        "litserve": ([python, "-m", f"{package}.with_litserve", "PORT"], "/health", ITEM),
        "bentoml": (
            [python, "-m", "bentoml", "serve", f"{package}.with_bentoml:Server", "--port", "PORT"], "/readyz", ITEMS,
        ),
        "fastapi": ([python, "-m", "uvicorn", f"{package}.with_fastapi:app", "--port", "PORT", "--log-level",
                     "warning"], "/health", ITEM),
    }[what]  # fmt: skip
    environment = {"PEAR_PEERS": json.dumps(settings), "BENTOML_DO_NOT_TRACK": "true", "PYTHONPATH": os.getcwd()}
    return started(bench, name, command, ready, target, **environment)


def load(bench: Bench, server: Server, streams: dict[str, Figures], seconds: float, warm_s: float = 2) -> Figures:
    """What the client in a process of its own found."""
    plan = {
        "port": server.port, "images": str(bench.work / "images"), "seconds": seconds, "warm_s": warm_s,
        "server_pid": server.process.pid, "seed": next(_seeds), "streams": streams,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.serve.load"], input=json.dumps(plan), capture_output=True, text=True
    )
    if done.returncode:
        raise click.ClickException(f"the client of {server.name} failed: {done.stderr[-2000:]}")
    found: Figures = json.loads(done.stdout)
    for name, stream in found["streams"].items():
        if set(stream["statuses"]) - {"200"}:
            click.echo(f"  {server.name}, {name}: {stream['statuses']}", err=True)
    return found


def saturated(
    bench: Bench, server: Server, tasks: Sequence[str], connections: int, warm_s: float, forward_s: float = 0
) -> Figures:
    """Figures of so many clients, each of which asks again when it is answered.

    Args:
        forward_s: of a full batch: the rate of a few is none.
    """
    seconds = max(bench.seconds, 8 * forward_s)
    stream = {**server.target, "tasks": list(tasks), "connections": connections}
    found = load(bench, server, {"all": stream}, seconds, warm_s)
    one = found["streams"]["all"]
    figures = {
        "rate": one["rate"], **times_of(one["seconds"]), "statuses": one["statuses"],
        **{f"{who}_cores": found[f"{who}_cpu_s"] / seconds for who in ("server", "client", "others")},
    }  # fmt: skip
    others = f"others used {figures['others_cores']:.2f} processors"
    click.echo(f"  {server.name}: {figures['rate']:.1f} a second; {others}", err=True)
    return figures


def times_of(seconds: Sequence[float]) -> Figures:
    if not seconds:
        return {"p50_ms": None, "p99_ms": None, "answers": 0}
    p50, p99 = (1000 * float(np.percentile(seconds, share)) for share in (50, 99))
    return {"p50_ms": p50, "p99_ms": p99, "answers": len(seconds)}


def medians(rounds: Sequence[Figures]) -> Figures:
    """Of each figure the median; statuses are added up."""
    found: Figures = {}
    for key in rounds[0]:
        values = [one[key] for one in rounds]
        if key == "statuses":
            found[key] = {status: sum(one.get(status, 0) for one in values) for one in values for status in one}
        else:
            found[key] = None if None in values else statistics.median(values)
    return {**found, "rates": [one["rate"] for one in rounds]} if "rate" in rounds[0] else found


def rotated(names: Sequence[Any], turn: int) -> list[Any]:
    return [*names[turn % len(names) :], *names[: turn % len(names)]]


# ---- sections -------------------------------------------------------------------------------------


def served(bench: Bench, size: str, dtype: str) -> Figures:
    batch = MAX_BATCH[size]
    forwards: list[float] = []
    lone_bare: list[float] = []
    lone_served: list[float] = []
    saturation: list[Figures] = []
    with worker(bare_worker, bench, size, dtype) as ask, pear_serve(bench, size, dtype, batch) as server:
        server.wait()
        forward = statistics.median(ask(batch, 1))
        for _ in range(bench.rounds):
            lone_bare += ask(0, bench.seconds / 3)
            stream = {**server.target, "tasks": NAMES[:TASKS], "connections": 1}
            lone_served += load(bench, server, {"lone": stream}, bench.seconds / 3, 0.5)["streams"]["lone"]["seconds"]
            forwards += ask(batch, bench.seconds / 2)
            saturation.append(saturated(bench, server, NAMES[:TASKS], 2 * batch + 2, 2 * forward + 1, forward))
        forward = statistics.median(forwards)
        found = medians(saturation)
        rate = 0.7 * found["rate"]
        stream = {**server.target, "tasks": NAMES[:TASKS], "rate": rate}
        busy = load(bench, server, {"all": stream}, 4 * bench.seconds, 2 * forward + 2)["streams"]["all"]
    bare_rate = batch / forward
    p50 = {name: 1000 * statistics.median(times) for name, times in (("bare", lone_bare), ("served", lone_served))}
    at_70 = times_of(busy["seconds"])
    p99_ms = at_70["p99_ms"]
    return {
        "max_batch": batch,
        "bare_forward_ms": 1000 * forward,
        "bare_rate": bare_rate,
        "saturation": found,
        "over_bare": found["rate"] / bare_rate,
        "lone_ms": {**p50, "more": p50["served"] - p50["bare"], "answers": len(lone_served)},
        "at_70_percent": {
            "rate": rate,
            **at_70,
            "p99_forwards": p99_ms and p99_ms / (1000 * forward),
        },
    }


def lone(bench: Bench, size: str, dtype: str) -> Figures:
    """Medians of one image at a time, ms; each step has what those above it have, and more."""
    steps: dict[str, Callable[[float], list[float]]] = {}
    times: dict[str, list[float]] = {}
    with (
        worker(bare_worker, bench, size, dtype) as ask_bare,
        worker(steps_worker, bench, size, dtype) as ask_router,
        worker(steps_worker, bench, size, dtype) as ask_batcher,  # whose forwards run in another thread
        pear_serve(bench, size, dtype, MAX_BATCH[size]) as server,
    ):
        server.wait()
        stream = {**server.target, "tasks": NAMES[:TASKS], "connections": 1}
        steps = {
            "bare forward": partial(ask_bare, 1),
            "run, normalised tensor": partial(ask_router, "run_tensor"),
            "bare forward and decoding": partial(ask_bare, 0),
            "run, file": partial(ask_router, "run_file"),
            "batcher, file": partial(ask_batcher, "batcher"),
            "HTTP, file": lambda seconds: load(bench, server, {"lone": stream}, seconds, 0.5)["streams"]["lone"][
                "seconds"
            ],
        }
        for turn in range(2 * bench.rounds):
            for step in rotated(list(steps), turn):
                times.setdefault(step, []).extend(steps[step](bench.seconds / 2))
    return {step: 1000 * statistics.median(times[step]) for step in steps}


def batches(bench: Bench, size: str, dtype: str) -> Figures:
    sizes = (1, 4, 16, 64)
    found: dict[int, list[Figures]] = {batch: [] for batch in sizes}
    forwards: dict[int, list[float]] = {batch: [] for batch in sizes}
    with ExitStack() as stack:
        ask = stack.enter_context(worker(bare_worker, bench, size, dtype))
        servers = {}
        for batch in sizes:
            servers[batch] = stack.enter_context(pear_serve(bench, size, dtype, batch))
            servers[batch].wait()
            servers[batch].signal(signal.SIGSTOP)
        for turn in range(bench.rounds):
            for batch in rotated(sizes, turn):
                times = ask(batch, bench.seconds / 3)
                forwards[batch] += times
                servers[batch].signal(signal.SIGCONT)
                forward_s = statistics.median(times)
                found[batch].append(
                    saturated(bench, servers[batch], NAMES[:TASKS], 2 * batch + 2, 2 * forward_s + 1, forward_s)
                )
                servers[batch].signal(signal.SIGSTOP)
    return {
        str(batch): {**medians(found[batch]), "bare_rate": batch / statistics.median(forwards[batch])}
        for batch in sizes
    }


def by_tasks(bench: Bench, size: str, dtype: str) -> Figures:
    counts = [tasks for tasks in (1, 4, 16, 64, 200) if tasks <= bench.tasks]
    found: dict[int, list[Figures]] = {tasks: [] for tasks in counts}
    batch = MAX_BATCH[size]
    with pear_serve(bench, size, dtype, batch) as server:
        server.wait()
        for turn in range(bench.rounds):
            for tasks in rotated(counts, turn):
                found[tasks].append(saturated(bench, server, NAMES[:tasks], 2 * batch + 2, 2))
    return {str(tasks): medians(rounds) for tasks, rounds in found.items()}


def fairness(bench: Bench, size: str, dtype: str) -> Figures:
    batch = MAX_BATCH[size]
    floods = {"alone": 0, "flood within the queue": 8 * batch, "flood beyond the queue": QUEUE + 200}
    found: dict[str, list[Figures]] = {name: [] for name in floods}
    with pear_serve(bench, size, dtype, batch) as server:
        server.wait()
        rate = 0.2 * saturated(bench, server, NAMES[:TASKS], 2 * batch + 2, 2)["rate"]
        others = {**server.target, "tasks": NAMES[1:TASKS], "rate": rate}
        flood = {**server.target, "tasks": NAMES[:1], "abandon": True}
        for turn in range(bench.rounds):
            for name in rotated(list(floods), turn):
                more = {"flood": {**flood, "connections": floods[name]}} if floods[name] else {}
                found[name].append(load(bench, server, {"others": others, **more}, 1.5 * bench.seconds, 3)["streams"])
                time.sleep(1)
    figures: Figures = {"max_batch": batch, "others_rate": rate}
    for name, rounds in found.items():
        figures[name] = {"connections": floods[name]}
        for who in rounds[0]:
            seconds = [second for one in rounds for second in one[who]["seconds"]]
            statuses = sum((Counter(one[who]["statuses"]) for one in rounds), Counter[str]())
            figures[name][who] = {**times_of(seconds), "statuses": dict(statuses)}
    return figures


def peers(bench: Bench, size: str, dtype: str) -> Figures:
    if bench.peers_python is None:
        raise click.UsageError("the peers need --peers-python")
    batch = 16
    found: dict[str, list[Figures]] = {}
    with ExitStack() as stack:
        servers = [
            stack.enter_context(pear_serve(bench, size, dtype, batch, kind="linears", target=OURS_JSON)),
            *(
                stack.enter_context(peer(bench, size, dtype, batch, name))
                for name in ("litserve", "litserve, adapter_names", "bentoml", "bentoml, adapter_names", "fastapi")
            ),
        ]
        for server in servers:
            server.wait()
        differences = agreement(bench, servers)
        for server in servers:
            server.signal(signal.SIGSTOP)
        for turn in range(bench.rounds):
            for server in rotated(servers, turn):
                server.signal(signal.SIGCONT)
                time.sleep(0.2)
                found.setdefault(server.name.partition(" 16")[0], []).append(
                    saturated(bench, server, NAMES[:TASKS], 2 * batch + 2, 3)
                )
                server.signal(signal.SIGSTOP)
    rates = {name: medians(rounds) for name, rounds in found.items()}
    ours = [one["rate"] for one in found["pear-serve"]]
    for name, rounds in found.items():
        pairs = [mine / one["rate"] for mine, one in zip(ours, rounds, strict=True)]
        rates[name]["pear_serve_is_faster_by"] = statistics.median(pairs)
    return {"max_batch": batch, "largest_difference_from_ours": differences, "servers": rates}


def agreement(bench: Bench, servers: Sequence[Server]) -> dict[str, float]:
    """How far the peers' probabilities are from ours: they must serve the same tasks."""
    file = base64.b64encode((bench.work / "images" / "000.jpg").read_bytes()).decode()
    found: dict[str, list[dict[str, float]]] = {}
    for server in servers:
        for task in NAMES[:4]:
            body = server.target["body"].replace("TASK", task).replace("IMAGE", file).encode()
            url = f"http://127.0.0.1:{server.port}{server.target['path']}"
            asked = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(asked, timeout=120) as answer:
                said = json.load(answer)
            said = said["results"][0] if "results" in said else said[0] if isinstance(said, list) else said
            found.setdefault(server.name, []).append({one["label"]: one["probability"] for one in said["top"]})
    ours = found.pop(servers[0].name)
    differences = {
        name: max(
            abs(mine[label] - one[label])
            for mine, one in zip(ours, theirs, strict=True)
            for label in mine.keys() & one.keys()
        )
        for name, theirs in found.items()
    }
    tasks_differ = max(abs(ours[0][label] - ours[1][label]) for label in ours[0].keys() & ours[1].keys())
    if max(differences.values()) > min(0.05, tasks_differ / 4):
        raise click.ClickException(f"the peers do not answer as pear-serve does: {differences}")
    return differences


SECTIONS: dict[str, Callable[[Bench], Figures]] = {
    f"{name} {size} {dtype}": partial(section, size=size, dtype=dtype)
    for name, section in (
        ("served", served), ("lone", lone), ("batches", batches), ("tasks", by_tasks), ("fairness", fairness),
        ("peers", peers),
    )
    for size in MODELS
    for dtype in DTYPES
}  # fmt: skip


def versions(bench: Bench) -> dict[str, str]:
    found = {name: version(name) for name in ("torch", "timm", "pillow", "starlette", "uvicorn", "uvloop", "httptools")}
    if bench.peers_python is not None:
        names = ("litserve", "bentoml", "fastapi", "peft", "uvicorn", "torch", "timm")
        code = f"import importlib.metadata as m; print(*(m.version(name) for name in {names}))"
        done = subprocess.run([bench.peers_python, "-c", code], capture_output=True, text=True, check=True)
        found |= {f"{name} (peers)": one for name, one in zip(names, done.stdout.split(), strict=True)}
    return {"python": platform.python_version(), **found}


@click.command(help=__doc__)
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--only", multiple=True, type=click.Choice(list(SECTIONS)), help="A section; give it again for more.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--seconds", default=12.0, show_default=True, type=click.FloatRange(1), help="At saturation, a round.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", default=os.cpu_count() or 1, show_default=True, type=click.IntRange(1), help="Of torch.")
@click.option("--tasks", default=MOST_TASKS, show_default=True, type=click.IntRange(TASKS, MOST_TASKS))
@click.option("--work", default=Path("runs/serve_speed"), show_default=True, type=click.Path(path_type=Path))
@click.option("--peers-python", type=click.Path(path_type=Path, exists=True), help="With LitServe, BentoML and PEFT.")
def main(
    out: Path, only: tuple[str, ...], rounds: int, seconds: float, device: str, threads: int, tasks: int, work: Path,
    peers_python: Path | None,
) -> None:  # fmt: skip
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))  # ends the servers, too
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(work.absolute(), device, threads, rounds, seconds, peers_python and peers_python.absolute(), tasks)
    report = json.loads(out.read_text()) if only and out.exists() else {"sections": {}}
    for name in only or SECTIONS:
        click.echo(name, err=True)
        make_files(bench, name.split()[1])
        load_before = os.getloadavg()[0]
        figures = SECTIONS[name](bench)
        given = [*sys.argv[1:], *(("--only", name) if not only else ())]
        if peers_python is not None:
            given = [one.replace(str(peers_python), "ENVIRONMENT/bin/python") for one in given]
        report["sections"][name] = {
            "command": shlex.join(["python", "-m", "benchmarks.serve.speed", *given]),
            "machine": machine() | {"device": device if device == "cpu" else torch.cuda.get_device_name(device)},
            "threads": threads, "tasks": TASKS, "rank": RANK, "versions": versions(bench),
            "load_before": load_before, "figures": figures,
        }  # fmt: skip
        shown = json.loads(json.dumps(report), parse_float=lambda text: float(f"{float(text):.5g}"))
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(shown, indent=1) + "\n")
        click.echo(json.dumps(shown["sections"][name]["figures"], indent=1))


if __name__ == "__main__":
    main()
