"""A fleet of pear-serve behind a proxy, simulated: hits, misses and times, by how requests are routed.

    python -m benchmarks.scale_sim --tasks 100000 --replicas 24 --slots 20000 --rate 34700 \\
        --batch-ms 5 --row-ms 0.098 --load-ms 60 --out benchmarks/results/scale_sim.json

Requests come by chance (Poisson), each for one image and one task; the task of rank k is asked for as 1 / k^exponent. A
replica holds the `slots` tasks that were used last. A task that is not loaded is loaded first, a few at a time, while
other work goes on. A replica runs whatever is ready as one batch, of at most --max-batch rows, in --batch-ms plus
--row-ms for each row. That is pear-serve's greedy batching (docs/serving.md), without decoding, HTTP and the network.

    hash               the task's replica on nginx's own ring (its points, its CRC32)
    hash, max_conns    the same; a replica that has so many requests is passed over, as nginx does
    hash, of the mean  the same with Envoy's bound: at most --factor times the mean of the requests under way
    round robin        in turn
    least loaded       which has the fewest requests under way; by chance among equals
"""

import heapq
import json
import math
import platform
import shlex
import sys
import zlib
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Literal, get_args

import click
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Policy = Literal["hash", "hash, max_conns", "hash, of the mean", "round robin", "least loaded"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
POINTS = 160
"""Of a server on nginx's ring."""
STEPS = 20
"""Points that nginx goes on from a server that cannot be asked; then it takes servers in turn."""


@dataclass(frozen=True)
class Fleet:
    """Equal replicas.

    Args:
        slots: tasks that a replica holds.
        loaders: tasks that a replica loads at a time.
        max_conns: most requests that a replica is given at a time, for `hash, max_conns`.
        factor: of the mean of the requests under way, for `hash, of the mean`.
    """

    replicas: int
    slots: int
    max_batch: int = 64
    batch_s: float = 0.005
    row_s: float = 0.0001
    load_s: float = 0.001
    loaders: int = 4
    max_conns: int = 256
    factor: float = 1.5


@dataclass(frozen=True)
class Outcome:
    """What came of a simulation, after its warm-up."""

    hits: float
    """Share of the requests whose task was loaded, or being loaded."""
    misses_a_second: float
    p50_ms: float
    p99_ms: float
    mean_wait_ms: float
    """Until a request's batch began."""
    busiest: float
    """Requests of the busiest replica over the mean."""
    busy: float
    """Share of the time in which a replica's device was at work, of the busiest."""


def popularity(tasks: int, exponent: float) -> Floats:
    """Zipf's law: the share of the requests that each task has, most popular first."""
    weights = np.arange(1, tasks + 1, dtype=np.float64) ** -exponent
    shares: Floats = weights / weights.sum()
    return shares


def che_hits(shares: Floats, slots: int) -> float:
    """The hit rate of a cache that evicts what was used least recently, by Che's approximation.

        sum_i (1 - exp(-shares_i T)) = slots        hits = sum_i shares_i (1 - exp(-shares_i T)) / sum_i shares_i

    Source: Che, Tung, Wang: Hierarchical Web caching systems, IEEE JSAC 20(7), 2002.
    """
    if slots >= len(shares):
        return 1.0
    low, high = 0.0, 1.0
    while (-np.expm1(-shares * high)).sum() < slots:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (-np.expm1(-shares * middle)).sum() < slots else (low, middle)
    return float((shares * -np.expm1(-shares * high)).sum() / shares.sum())


class Ring:
    """nginx's `hash … consistent` of servers of equal weight.

    Args:
        servers: "host:port", as the upstream names them.

    Source: nginx 1.22, ngx_http_upstream_hash_module.
    """

    def __init__(self, servers: Sequence[str]) -> None:
        points: dict[int, int] = {}
        found = []
        for number, server in enumerate(servers):
            base = zlib.crc32(server.replace(":", "\0").encode())
            point = 0
            for _ in range(POINTS):
                point = zlib.crc32(point.to_bytes(4, "little"), base)
                found.append((point, number))
        for point, number in sorted(found):
            points.setdefault(point, number)
        self.points: Ints = np.array(list(points), np.int64)
        self.servers: Ints = np.array(list(points.values()), np.int64)

    def place(self, key: str) -> int:
        """The point from which a key's servers are looked for."""
        return int(np.searchsorted(self.points, zlib.crc32(key.encode()))) % len(self.points)

    def server(self, key: str) -> int:
        return int(self.servers[self.place(key)])


class _Replica:
    """One replica's slots, its loaders and its device."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.loaded: OrderedDict[int, float] = OrderedDict()
        """Each task, and since when it is there; least recently used first."""
        self.loaders = [0.0] * fleet.loaders
        self.ready: deque[int] = deque()
        self.is_busy = False
        self.under_way = 0
        self.busy_s = 0.0

    def ask(self, task: int, now: float) -> tuple[bool, float]:
        """Whether a task was loaded, and when it is."""
        since = self.loaded.get(task)
        if since is not None:
            self.loaded.move_to_end(task)
            return True, since
        since = max(now, heapq.heappop(self.loaders)) + self.fleet.load_s
        heapq.heappush(self.loaders, since)
        if len(self.loaded) >= self.fleet.slots:
            self.loaded.popitem(last=False)
        self.loaded[task] = since
        return False, since


class _Routing:
    """Which replica is asked."""

    def __init__(self, fleet: Fleet, policy: Policy, replicas: list[_Replica], servers: Sequence[str], names: list[str],
                 rng: np.random.Generator) -> None:  # fmt: skip
        self.fleet, self.policy, self.replicas, self.rng = fleet, policy, replicas, rng
        self.ring = Ring(servers)
        self.places = [self.ring.place(name) for name in names] if policy.startswith("hash") else []
        self.turn = cycle(range(fleet.replicas))
        self.total = 0
        """Requests under way."""

    def home(self, task: int) -> int:
        return int(self.ring.servers[self.places[task]])

    def choose(self, task: int) -> int:
        if self.policy == "round robin":
            return next(self.turn)
        if self.policy == "least loaded":
            counts = [replica.under_way for replica in self.replicas]
            least = min(counts)
            equal = [number for number, count in enumerate(counts) if count == least]
            return equal[int(self.rng.integers(len(equal)))]
        if self.policy == "hash":
            return self.home(task)
        limit = self.fleet.max_conns
        if self.policy == "hash, of the mean":
            limit = math.ceil(self.fleet.factor * (self.total + 1) / self.fleet.replicas)
        place = self.places[task]
        for step in range(STEPS + 1 if self.policy == "hash, max_conns" else len(self.ring.servers)):
            number = int(self.ring.servers[(place + step) % len(self.ring.servers)])
            if self.replicas[number].under_way < limit:
                return number
        return next(self.turn)


def simulate(
    fleet: Fleet, shares: Floats, rate: float, requests: int, policy: Policy, *, seed: int = 0, warm: float = 0.3,
    servers: Sequence[str] | None = None, names: Sequence[str] | None = None,
) -> Outcome:  # fmt: skip
    """Runs requests through a fleet.

    Args:
        shares: of the requests, by task.
        rate: requests a second.
        warm: share of the requests that only fill the slots.
        servers, names: of replicas and tasks, for the ring; made up unless given.
    """
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate, requests))
    asked = np.minimum(np.searchsorted(np.cumsum(shares), rng.random(requests)), len(shares) - 1)
    replicas = [_Replica(fleet) for _ in range(fleet.replicas)]
    servers = servers or [f"replica-{number}:8090" for number in range(fleet.replicas)]
    named = list(names) if names else [f"task-{number}" for number in range(len(shares))]
    routing = _Routing(fleet, policy, replicas, servers, named, rng)
    _fill(fleet, replicas, routing, len(shares))
    begun = int(warm * requests)
    waited, took, missed = np.zeros(requests), np.zeros(requests), np.zeros(requests, bool)
    given: Ints = np.zeros(fleet.replicas, np.int64)
    events: list[tuple[float, int, int, list[int]]] = []
    """When, a number that keeps them apart, a replica, and what its device has done, or (one below zero) is ready."""
    count = 0
    busy_before = [0.0] * fleet.replicas

    def run(number: int, now: float) -> None:
        nonlocal count
        replica = replicas[number]
        if replica.is_busy or not replica.ready:
            return
        batch = [replica.ready.popleft() for _ in range(min(len(replica.ready), fleet.max_batch))]
        seconds = fleet.batch_s + fleet.row_s * len(batch)
        replica.is_busy = True
        replica.busy_s += seconds
        waited[batch] = now - arrivals[batch]
        took[batch] = now + seconds - arrivals[batch]
        count += 1
        heapq.heappush(events, (now + seconds, count, number, batch))

    def settle(until: float) -> None:
        while events and events[0][0] <= until:
            now, _, number, batch = heapq.heappop(events)
            replica = replicas[number]
            if batch[0] < 0:
                replica.ready.append(-1 - batch[0])
            else:
                replica.is_busy = False
                replica.under_way -= len(batch)
                routing.total -= len(batch)
            run(number, now)

    for request, (now, task) in enumerate(zip(arrivals.tolist(), asked.tolist(), strict=True)):
        settle(now)
        if request == begun:
            busy_before = [replica.busy_s for replica in replicas]
        number = routing.choose(task)
        replica = replicas[number]
        replica.under_way += 1
        routing.total += 1
        hit, since = replica.ask(task, now)
        if request >= begun:
            missed[request] = not hit
            given[number] += 1
        if since <= now:
            replica.ready.append(request)
            run(number, now)
        else:
            count += 1
            heapq.heappush(events, (since, count, number, [-1 - request]))
    settle(math.inf)
    seconds = float(arrivals[-1] - arrivals[begun])
    late = took[begun:]
    busy = [(replica.busy_s - before) / seconds for replica, before in zip(replicas, busy_before, strict=True)]
    return Outcome(
        hits=1 - float(missed[begun:].mean()), misses_a_second=float(missed.sum()) / seconds,
        p50_ms=1000 * float(np.percentile(late, 50)), p99_ms=1000 * float(np.percentile(late, 99)),
        mean_wait_ms=1000 * float(waited[begun:].mean()), busiest=float(given.max() / given.mean()), busy=max(busy),
    )  # fmt: skip


def _fill(fleet: Fleet, replicas: list[_Replica], routing: _Routing, tasks: int) -> None:
    """The most popular tasks of each replica, as if it had run for long; those used last are the most popular."""
    for task in range(tasks):
        homes = [routing.home(task)] if routing.places else range(fleet.replicas)
        for number in homes:
            if len(replicas[number].loaded) < fleet.slots:
                replicas[number].loaded[task] = 0.0
    for replica in replicas:
        for task in sorted(replica.loaded, reverse=True):
            replica.loaded.move_to_end(task)


@click.command(help=__doc__)
@click.option("--tasks", default=100_000, show_default=True, type=click.IntRange(1))
@click.option("--exponent", "exponents", multiple=True, default=(0.8, 1.0, 1.2), show_default=True, type=float)
@click.option("--replicas", multiple=True, default=(24,), show_default=True, type=click.IntRange(1))
@click.option("--slots", multiple=True, default=(20_000,), show_default=True, type=click.IntRange(1), help="Of one.")
@click.option("--rate", default=34_700.0, show_default=True, type=float, help="Requests a second, of all together.")
@click.option("--requests", default=1_000_000, show_default=True, type=click.IntRange(100))
@click.option("--max-batch", default=64, show_default=True, type=click.IntRange(1))
@click.option("--batch-ms", default=5.0, show_default=True, type=float, help="Of a batch, whatever its size.")
@click.option("--row-ms", default=0.1, show_default=True, type=float, help="And of each of its rows.")
@click.option("--load-ms", default=1.1, show_default=True, type=float, help="To load a task.")
@click.option("--max-conns", default=256, show_default=True, type=click.IntRange(1))
@click.option("--factor", default=1.5, show_default=True, type=click.FloatRange(1))
@click.option(
    "--policy", "policies", multiple=True, default=POLICIES, type=click.Choice(POLICIES), help="[default: all]"
)
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Adds the rows to this JSON.")
def main(
    tasks: int, exponents: tuple[float, ...], replicas: tuple[int, ...], slots: tuple[int, ...], rate: float,
    requests: int, max_batch: int, batch_ms: float, row_ms: float, load_ms: float, max_conns: int, factor: float,
    policies: tuple[Policy, ...], seed: int, out: Path | None,
) -> None:  # fmt: skip
    command = shlex.join(["python", "-m", "benchmarks.scale_sim", *sys.argv[1:]])
    rows: list[dict[str, Any]] = []
    click.echo(f"{'exponent':>8} {'replicas':>8} {'slots':>7} {'routing':<18} {'hits':>6} {'misses/s':>9} "
               f"{'p50 ms':>8} {'p99 ms':>8} {'busiest':>8} {'busy':>6}")  # fmt: skip
    for exponent in exponents:
        shares = popularity(tasks, exponent)
        for count in replicas:
            for held in slots:
                fleet = Fleet(count, held, max_batch, batch_ms / 1000, row_ms / 1000, load_ms / 1000,
                              max_conns=max_conns, factor=factor)  # fmt: skip
                for policy in policies:
                    found = simulate(fleet, shares, rate, requests, policy, seed=seed)
                    rows.append({"tasks": tasks, "exponent": exponent, "rate": rate, "requests": requests,
                                 "seed": seed, "routing": policy, **asdict(fleet), **asdict(found)})  # fmt: skip
                    click.echo(f"{exponent:8.2f} {count:8} {held:7} {policy:<18} {found.hits:6.4f} "
                               f"{found.misses_a_second:9.1f} {found.p50_ms:8.2f} {found.p99_ms:8.2f} "
                               f"{found.busiest:8.2f} {found.busy:6.2f}")  # fmt: skip
    if out is not None:
        report = json.loads(out.read_text()) if out.exists() else {"runs": []}
        versions = {"python": platform.python_version(), "numpy": np.__version__}
        report["runs"] = [run for run in report["runs"] if run["command"] != command]
        report["runs"].append({"command": command, "versions": versions, "rows": rows})
        shown = json.loads(json.dumps(report), parse_float=lambda text: float(f"{float(text):.5g}"))
        out.write_text(json.dumps(shown, indent=1) + "\n")


if __name__ == "__main__":
    main()
