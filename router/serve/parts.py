"""What becomes of requests in the threads: images are decoded, batches are run."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pear_store import PearStoreError
from router.batches import put_together
from router.errors import ImageError, RouterError
from router.pictures import ImageLike
from router.predictions import Prediction
from router.preprocess import decode
from router.registry import Known
from router.router import Router
from router.serve.errors import OutOfMemoryError

Outcome = Prediction | RouterError | PearStoreError
"""What became of an image and a task."""


@dataclass(eq=False)
class Request:
    """An image and the tasks that it is for."""

    image: ImageLike | None
    tasks: Sequence[str]
    answer: "asyncio.Future[list[Outcome]]"
    came: float
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    """By the number of the task."""
    parts: list["Part"] = field(default_factory=list)

    @property
    def line(self) -> str:
        """Where it waits: with others of its task, whatever the version; requests of many tasks share a line."""
        return self.tasks[0].partition("@")[0] if len(self.tasks) == 1 else ""

    def settle(self, outcomes: dict[int, Outcome]) -> None:
        """Notes what became of some tasks, and answers when all are there."""
        self.outcomes.update(outcomes)
        if len(self.outcomes) == len(self.tasks) and not self.answer.done():
            self.answer.set_result([self.outcomes[number] for number in range(len(self.tasks))])


@dataclass(eq=False)
class Part:
    """The rows of a request whose images have one size: one for each task."""

    request: Request
    numbers: list[int]
    known: list[Known]
    pixels: list[Tensor]
    """uint8 [3, h, w]; the same tensor where tasks prepare the image in the same way."""

    @property
    def size(self) -> tuple[int, int]:
        return self.known[0].preprocess.size


@dataclass(frozen=True)
class Decoded:
    """A request after its image was looked at."""

    failures: dict[int, Outcome]
    """By the number of the task."""
    parts: list[Part]
    seconds: float


@dataclass(frozen=True)
class Ran:
    """A batch after its forward."""

    outcomes: list[dict[int, Outcome]]
    """For each part, by the number of the task."""
    began: float
    """By time.perf_counter."""
    seconds: float


def decode_for(router: Router, request: Request) -> Decoded:
    """Looks a request's tasks up, and prepares its image for each."""
    image = request.image
    if image is None or request.answer.done():  # it was given up meanwhile
        return Decoded({}, [], 0.0)
    began = time.perf_counter()
    failures: dict[int, Outcome] = {}
    known: dict[int, Known] = {}
    for number, task in enumerate(request.tasks):
        try:
            known[number] = router.lookup(task)
        except (RouterError, PearStoreError) as error:
            failures[number] = error
    pixels = decode([image] * len(known), [one.preprocess for one in known.values()])
    parts: dict[tuple[int, int], Part] = {}
    for (number, one), found in zip(known.items(), pixels, strict=True):
        if isinstance(found, ImageError):
            failures[number] = found
            continue
        part = parts.setdefault(one.preprocess.size, Part(request, [], [], []))
        part.numbers.append(number)
        part.known.append(one)
        part.pixels.append(found)
    return Decoded(failures, list(parts.values()), time.perf_counter() - began)


def run_parts(router: Router, batch: Sequence[Part]) -> Ran:
    """Runs parts of one size in one forward; if there is too little memory, in halves."""
    began = time.perf_counter()
    outcomes = _run(router, batch)
    return Ran(outcomes, began, time.perf_counter() - began)


def _run(router: Router, batch: Sequence[Part]) -> list[dict[int, Outcome]]:
    known = [one for part in batch for one in part.known]
    pixels = dict(enumerate(image for part in batch for image in part.pixels))
    try:
        (rows,) = put_together(pixels, [one.preprocess for one in known], router.device)
        predictions = router.run_batch(rows, known, on_error="return")
    except (MemoryError, torch.OutOfMemoryError):
        if len(batch) == 1:
            return [dict.fromkeys(batch[0].numbers, OutOfMemoryError(len(known)))]
        half = len(batch) // 2
        return [*_run(router, batch[:half]), *_run(router, batch[half:])]
    found: list[dict[int, Outcome]] = []
    row = 0
    for part in batch:
        mine: dict[int, Outcome] = {}
        for number in part.numbers:
            failure = predictions.failures.get(row)
            assert failure is None or isinstance(failure, RouterError | PearStoreError)
            mine[number] = failure or replace(predictions[row], task=part.request.tasks[number])
            row += 1
        found.append(mine)
    return found
