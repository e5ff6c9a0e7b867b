"""The work on requests in threads: images are decoded, batches are run."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pear_store import PearStoreError
from router.batches import put_together
from router.errors import ImageError, RouterError
from router.pictures import ImageLike
from router.predictions import Prediction
from router.preprocess import Preprocess, decode
from router.registry import Known
from router.router import Router
from router.serve.errors import OutOfMemoryError

Outcome = Prediction | RouterError | PearStoreError
"""The result of an image and a task."""
Sent = ImageLike | Tensor
"""The image of a request. A tensor is float [3, h, w], normalised as its tasks expect."""
Named = str | Known
"""A task: its name, or the result of a look-up."""


def name_of(task: Named) -> str:
    return task if isinstance(task, str) else task.name


@dataclass(frozen=True)
class Shared:
    """The batch of a prediction."""

    rows: int
    tasks: int
    """Number of different tasks."""
    seconds: float
    """Time on the device."""


@dataclass(frozen=True)
class Answer(Prediction):
    """A prediction and its batch."""

    batch: Shared


def line_of(tasks: Sequence[Named]) -> str:
    """The line in which a request waits: its task's name, or one common line for requests of several tasks."""
    return name_of(tasks[0]).partition("@")[0] if len(tasks) == 1 else ""


@dataclass(eq=False)
class Request:
    """An image and the tasks that it is for."""

    image: Sent | None
    tasks: Sequence[Named]
    answer: "asyncio.Future[list[Outcome]]"
    came: float
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    """Number of the task -> its result."""
    parts: list["Part"] = field(default_factory=list)
    looked_up: dict[str, Known | RouterError | PearStoreError] = field(default_factory=dict)
    """Results of look-ups that asked a remote."""
    unknown: int = 0
    """Number of its tasks that are still being looked up."""

    @property
    def line(self) -> str:
        """The line in which it waits."""
        return line_of(self.tasks)

    def settle(self, outcomes: dict[int, Outcome]) -> None:
        """Adds results of tasks, and answers once all tasks have one."""
        self.outcomes.update(outcomes)
        if len(self.outcomes) == len(self.tasks) and not self.answer.done():
            self.answer.set_result([self.outcomes[number] for number in range(len(self.tasks))])


@dataclass(eq=False)
class Part:
    """The rows of a request with one image size. There is a row for each task."""

    request: Request
    numbers: list[int]
    known: list[Known]
    pixels: list[Tensor]
    """Each row's image, uint8 [3, h, w], or float32 if sent normalised. Equal preprocessing shares one tensor."""

    @property
    def size(self) -> tuple[int, int]:
        return self.known[0].preprocess.size


@dataclass(frozen=True)
class Decoded:
    """A request after its image was decoded."""

    failures: dict[int, Outcome]
    """Number of the task -> its error."""
    parts: list[Part]
    seconds: float


@dataclass(frozen=True)
class Ran:
    """A batch after its forward."""

    outcomes: list[dict[int, Outcome]]
    """For each part, number of the task -> its result."""
    began: float
    """Time of the start, by time.perf_counter."""
    seconds: float


def look_up(router: Router, task: str) -> Known | RouterError | PearStoreError:
    """The meaning of a task's name, or the error of its look-up."""
    try:
        return router.lookup(task)
    except (RouterError, PearStoreError) as error:
        return error


def decode_for(router: Router, request: Request) -> Decoded:
    """Looks up a request's tasks, and decodes its image for each."""
    image = request.image
    if image is None or request.answer.done():  # the client gave up meanwhile
        return Decoded({}, [], 0.0)
    began = time.perf_counter()
    failures: dict[int, Outcome] = {}
    known: dict[int, Known] = {}
    for number, task in enumerate(request.tasks):
        one = task if isinstance(task, Known) else request.looked_up.get(task) or look_up(router, task)
        if isinstance(one, Known):
            known[number] = one
        else:
            failures[number] = one
    ways = [each.preprocess for each in known.values()]
    pixels = _normalised(image, ways) if isinstance(image, Tensor) else decode([image] * len(known), ways)
    parts: dict[tuple[int, int], Part] = {}
    for (number, each), found in zip(known.items(), pixels, strict=True):
        if isinstance(found, ImageError):
            failures[number] = found
            continue
        part = parts.setdefault(each.preprocess.size, Part(request, [], [], []))
        part.numbers.append(number)
        part.known.append(each)
        part.pixels.append(found)
    return Decoded(failures, list(parts.values()), time.perf_counter() - began)


def _normalised(image: Tensor, ways: Sequence[Preprocess]) -> list[Tensor | ImageError]:
    """An image that was sent normalised, or an error, for each task's preprocessing. Its values do not change."""
    image = image.to(torch.float32)
    found: list[Tensor | ImageError] = []
    for way in ways:
        shape = (3, *way.size)
        if tuple(image.shape) == shape:
            found.append(image)
        else:
            found.append(
                ImageError(f"normalised pixels: the task expects shape {list(shape)}, found {list(image.shape)}")
            )
    return found


def run_parts(router: Router, batch: Sequence[Part]) -> Ran:
    """Runs parts of one size in one forward. If the memory is too small, runs halves."""
    began = time.perf_counter()
    outcomes = _run(router, batch)
    return Ran(outcomes, began, time.perf_counter() - began)


def _run(router: Router, batch: Sequence[Part]) -> list[dict[int, Outcome]]:
    began = time.perf_counter()
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
    shared = Shared(len(known), len({one.key for one in known}), time.perf_counter() - began)
    found: list[dict[int, Outcome]] = []
    row = 0
    for part in batch:
        mine: dict[int, Outcome] = {}
        for number in part.numbers:
            failure = predictions.failures.get(row)
            assert failure is None or isinstance(failure, RouterError | PearStoreError)
            mine[number] = failure or _answer(predictions[row], name_of(part.request.tasks[number]), shared)
            row += 1
        found.append(mine)
    return found


def _answer(said: Prediction, task: str, batch: Shared) -> Answer:
    return Answer(task, said.version, said.logits, said.classes, said.error, batch, threshold=said.threshold)
