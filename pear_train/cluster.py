"""Many tasks over many machines: processes of a Ray cluster train them (docs/cluster.md).

The main process, the one that a user started, decides which tasks are left to train and hands them out. A worker writes
a task's state and checkpoint to the path that the main process would use. So all machines must see the output's folder.
"""

import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol, TypeAlias

import ray
import torch
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayTaskError, WorkerCrashedError

from pear_store import Task
from pear_train.data import Dataset, open_dataset
from pear_train.job import Job
from pear_train.loop import train_many
from pear_train.report import Failed, Result, Step
from pear_train.tasks import TaskEntry
from router import Backbone, load_backbone
from router.cluster import ClusterError, fitting, has_gpus, reason_of, room, session

ATTEMPTS = 6
"""How many times in a row a task's worker may die before it ends another epoch."""
ALONE_AFTER = 3
"""After this many such deaths, tasks that trained together are tried one by one. One of them may kill the worker."""
WAITING = 64
"""Groups submitted to Ray beyond those it has room for. From them an autoscaler sees that more machines are wanted."""
SECONDS_PER_STEP = 1.0
"""A worker reports steps within an epoch at most this often."""
__all__ = ["Assignment", "Party", "Setup", "has_gpus", "session"]
_LOST = (WorkerCrashedError, NodeDiedError, ObjectLostError, OutOfMemoryError)


@dataclass(frozen=True)
class Setup:
    """What all workers have in common. Paths are absolute, and the same on all machines."""

    backbone: str
    weights: str | None
    digest: str
    """Digest of the backbone in the main process."""
    data_root: Path | None
    on_gpus: bool
    base: Task | None = None
    bank: Sequence[Task] = ()
    bases: Task | None = None


@dataclass(frozen=True)
class Assignment:
    """A task to train, in a form that can be sent to any machine."""

    entry: TaskEntry
    out: Path


@dataclass(frozen=True)
class Began:
    """A task's turn has come, on this machine."""

    task: str
    host: str


Event: TypeAlias = Began | Step | Result | Failed | str
"""What a worker reports. A str is a line for a person."""


# ---- on a worker ----------------------------------------------------------------------------------


def trained(assignments: Sequence[Assignment], setup: Setup, threads: int | None) -> Iterator[Event]:
    """Trains tasks together, each from where an earlier worker left it.

    Args:
        threads: number of threads for a step; None: torch's default.

    Raises:
        ClusterError: this machine has another backbone.
        RouterError: this machine cannot load the backbone.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    host = socket.gethostname()
    for assignment in assignments:
        yield Began(assignment.entry.config.task, host)
    backbone = _backbone(setup.backbone, setup.weights)
    if backbone.digest != setup.digest:
        raise ClusterError(
            f"backbone {setup.backbone}: expected digest {setup.digest[:19]}…, {host} has {backbone.digest[:19]}…: "
            "give all machines the same weights"
        )
    events: SimpleQueue[Event | BaseException | None] = SimpleQueue()
    Thread(target=_train, args=(assignments, setup, backbone, events.put), daemon=True).start()
    while (event := events.get()) is not None:
        if isinstance(event, BaseException):
            raise event
        yield event


def _train(
    assignments: Sequence[Assignment],
    setup: Setup,
    backbone: Backbone,
    tell: Callable[[Event | BaseException | None], None],
) -> None:
    """Trains. It runs in a thread of its own, beside the one that sends events."""
    jobs = [Job(job.entry.config, partial(_open, job.entry, setup.data_root, tell), job.out) for job in assignments]
    try:
        for ended in train_many(
            jobs, backbone, _Pace(tell).show, together=len(jobs), base=setup.base, bank=setup.bank, bases=setup.bases,
            say=tell,
        ):  # fmt: skip
            tell(ended)
        tell(None)
    except BaseException as error:
        tell(error)


def _open(entry: TaskEntry, root: Path | None, tell: Callable[[str], None]) -> Dataset:
    dataset = open_dataset(entry.data, root, entry.data_options)
    tell(dataset.summary(entry.data))
    return dataset


@lru_cache(1)
def _backbone(name: str, weights: str | None) -> Backbone:
    """The backbone. The cache helps because Ray gives one process several tasks in turn."""
    return load_backbone(name, weights)


class _Pace:
    """Reports each epoch's end, and other steps at most every SECONDS_PER_STEP."""

    def __init__(self, tell: Callable[[Step], None]) -> None:
        self._tell, self._told = tell, 0.0

    def show(self, step: Step) -> None:
        now = time.monotonic()
        if step.val_top1 is not None or now - self._told >= SECONDS_PER_STEP:
            self._told = now
            self._tell(step)


# ---- in the main process --------------------------------------------------------------------------


@dataclass(eq=False)
class _Group:
    """Tasks that train together. A task that ended is removed."""

    left: dict[str, Assignment]
    deaths: int = 0
    """Of its workers, since the last epoch that ended."""


class Audience(Protocol):
    """Receives progress."""

    def began(self, task: str, host: str) -> None:
        """A task starts on this machine, or starts again."""

    def show(self, step: Step) -> None: ...

    def say(self, line: str) -> None:
        """Receives a line for a person."""


class Party:
    """Workers that train tasks, as many at once as the cluster has room for.

    Args:
        together: tasks that one worker trains at once.
        workers: the most workers at once; None: as many as the cluster has room for.
        cpus_per_worker: cores for each worker; None: see :func:`router.cluster.room`.

    Raises:
        ClusterError: the cluster has room for no worker.
    """

    def __init__(
        self,
        setup: Setup,
        audience: Audience,
        together: int = 1,
        workers: int | None = None,
        cpus_per_worker: int | None = None,
    ) -> None:
        self._audience, self._together, self._workers, self._on_gpus = audience, together, workers, setup.on_gpus
        _, self._cpus = room(setup.on_gpus, cpus_per_worker, workers)
        self._threads = None if setup.on_gpus else self._cpus
        self._setup = ray.put(setup)  # sent once, because base and bank may be large
        train: Any = ray.remote(trained)
        self._train = train.options(
            num_cpus=self._cpus, num_gpus=int(setup.on_gpus), num_returns="streaming", max_retries=0,
            scheduling_strategy="SPREAD",
        )  # fmt: skip
        self._waiting: deque[_Group] = deque()
        self._running: dict[Any, _Group] = {}
        self._hosts: dict[str, str] = {}

    def train(self, assignments: Sequence[Assignment]) -> Iterator[Result | Failed]:
        """Trains tasks. Results come in the order in which tasks end.

        Raises:
            ClusterError: a worker cannot work at all. Checkpoints and states that were written stay on disk.
        """
        for start in range(0, len(assignments), self._together):
            self._waiting.append(_Group({a.entry.config.task: a for a in assignments[start : start + self._together]}))
        while self._waiting or self._running:
            while self._waiting and len(self._running) < self._most():
                group = self._waiting.popleft()
                self._running[self._train.remote(list(group.left.values()), self._setup, self._threads)] = group
            ready, _ = ray.wait(list(self._running), num_returns=1)
            for stream in ready:
                yield from self._take(stream)

    def _most(self) -> int:
        """The most groups to submit to Ray. Asked anew each time, because machines may have joined."""
        return self._workers or fitting(self._on_gpus, self._cpus) + WAITING

    def _take(self, stream: Any) -> Iterator[Result | Failed]:
        """Handles one event of a worker, or its end."""
        group = self._running[stream]
        try:
            event: Event = ray.get(next(stream))
        except StopIteration:
            del self._running[stream]
        except _LOST:
            del self._running[stream]
            yield from self._again(group)
        except RayTaskError as error:
            raise ClusterError(f"a worker failed: {reason_of(error)}") from None
        else:
            yield from self._hear(group, event)

    def _hear(self, group: _Group, event: Event) -> Iterator[Result | Failed]:
        match event:
            case Began():
                self._hosts[event.task] = event.host
                self._audience.began(event.task, event.host)
            case Step():
                if event.val_top1 is not None:
                    group.deaths = 0
                self._audience.show(event)
            case str():
                self._audience.say(event)
            case Result() | Failed():
                del group.left[event.task]
                group.deaths = 0
                host = self._hosts.pop(event.task)
                if isinstance(event, Failed) and host != socket.gethostname():
                    event = replace(event, error=f"on {host}: {event.error}")  # the path may be missing only there
                yield event

    def _again(self, group: _Group) -> Iterator[Failed]:
        """Puts the tasks of a dead worker first in line. Gives them up after ATTEMPTS deaths."""
        if not group.left:  # all of them had ended
            return
        group.deaths += 1
        names = ", ".join(group.left)
        if group.deaths >= ATTEMPTS:
            why = f"its worker died {ATTEMPTS} times before it ended an epoch: see Ray's logs for the reason"
            yield from (Failed(task, why) for task in group.left)
            return
        again = "a worker for each goes" if group.deaths >= ALONE_AFTER and len(group.left) > 1 else "another goes"
        self._audience.say(f"{names}: the worker died; {again} on from the last epoch that ended")
        if group.deaths >= ALONE_AFTER:
            self._waiting.extendleft(_Group({task: job}, group.deaths) for task, job in group.left.items())
        else:
            self._waiting.appendleft(group)
