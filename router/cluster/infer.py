"""Runs a list on the workers of a cluster, with the same plan, parts and output as on one machine.

This process reads the list, chooses the tasks' versions and writes the parts. So each row is written once, even if
workers die, and only this process needs the output's disk.
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Never

from tqdm import tqdm

from router.cluster.crew import Crew, Order
from router.infer.plan import Part, Times, ahead, gather
from router.infer.work import Job

AHEAD = 16
"""Number of batches that are read and planned ahead."""


@dataclass(eq=False)
class _Open:
    """A part whose batches are being served."""

    left: int = 0
    served: int = 0
    part: Part | None = None
    """The part, once all its batches are handed out."""


class Spread:
    """Runs one job with a crew.

    Args:
        bar: counts rows of the output.
    """

    def __init__(self, crew: Crew, job: Job, bar: "tqdm[Never]") -> None:
        self._crew, self._job, self._bar = crew, job, bar
        self._open: dict[Order, _Open] = {}
        self.times = Times()
        """Of this process."""
        self.workers_s: Counter[str] = Counter()
        """Of all workers together."""
        self.first_at: float | None = None
        """Time of the first answer, by time.perf_counter."""

    def run(self) -> None:
        self._show()
        for order, answer in self._crew.serve(self._orders()):
            self.first_at = self.first_at or time.perf_counter()
            self._show()
            entry = self._open.pop(order)
            for ask, results in zip(order.asks, answer.results, strict=True):
                for result, found in zip(ask.results, results, strict=True):
                    result.update(found)
                entry.served += len(results)
                self._bar.update(len(results))
            self.workers_s.update(answer.seconds)
            entry.left -= 1
            self._write_if_done(entry)

    def _show(self) -> None:
        crew = self._crew
        self._bar.set_postfix(workers=f"{crew.up} of {crew.count}", retries=crew.retries, refresh=not crew.up)

    def _orders(self) -> Iterator[Order]:
        """The batches of all parts. Records the part of each."""
        job = self._job
        gathered = gather(job.left(), job.tasks, job.parts.chosen, job.options["batch_size"], job.place)
        items = ahead(gathered, AHEAD)
        entry = _Open()
        while True:
            item = self.times.timed("list_s", next, items, None)
            if item is None:
                return
            if isinstance(item, Part):
                entry.part = item
                self._write_if_done(entry)
                entry = _Open()
            else:
                entry.left += 1
                order = Order(item)
                self._open[order] = entry
                yield order

    def _write_if_done(self, entry: _Open) -> None:
        if entry.part is None or entry.left:
            return
        self.times.timed("write_s", self._job.write, entry.part)
        self._bar.update(len(entry.part.results) - entry.served)  # rows that cannot be served


def work_off(crew: Crew, job: Job) -> dict[str, Any]:
    """Serves all rows of unfinished parts. Returns the number of workers and retries, and times in seconds.

    Raises:
        ClusterError: the cluster failed. Finished parts are kept.
    """
    began = time.perf_counter()
    with job.bar() as bar, crew:
        spread = Spread(crew, job, bar)
        spread.run()
    ended = time.perf_counter()
    worked_s = ended - (spread.first_at or ended)
    seconds = {"start_s": ended - began - worked_s, "list_s": spread.times.list_s}
    seconds |= {name: spread.workers_s[name] for name in ("read_s", "decode_s", "transfer_s", "device_s")}
    seconds["write_s"] = spread.times.write_s
    return {"workers": crew.count, "retries": crew.retries} | {name: round(s, 3) for name, s in seconds.items()}
