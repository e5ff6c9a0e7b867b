"""One call of a router: its rows, each an image and a task, from the request to the answers."""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from pear_store import PearStoreError
from router.batches import Batch, batches, check_size
from router.engine import Engine
from router.errors import ClosedError, ForkedError, ImageError, RouterError, SlotBudgetError
from router.pictures import ImageLike
from router.predictions import Answers, Predictions, Threshold, check_threshold
from router.registry import Known
from router.sharing import Ints
from router.use import Use

OnError = Literal["raise", "return"]
Failure = RouterError | PearStoreError


class Call:
    """The rows of a call, and their answers or errors.

    Args:
        find: looks a task's name up.
        names: each row's task: a name, or a task that was looked up before.
        on_error: "raise" the first failure, or "return" it in the predictions of its rows.
        in_parts: tasks that do not fit into the slots together take turns.
        without_heads: answers are features, without heads and classes.
        threshold: for all rows, or "stored": each task's own.
    Raises:
        RouterError: there is no row, or `on_error` or `threshold` has a bad value.
        RouterError, PearStoreError: a task cannot be found or run, if failures are raised.
    """

    def __init__(
        self,
        engine: Engine,
        find: Callable[[str | Known], Known],
        names: Sequence[str | Known],
        on_error: OnError,
        in_parts: bool,
        without_heads: bool = False,
        threshold: Threshold = "stored",
    ) -> None:
        if on_error not in get_args(OnError):
            raise RouterError(f"on_error {on_error!r}: expected 'raise' or 'return'")
        check_threshold(threshold)
        self._threshold: Threshold = threshold
        if not names:
            raise ImageError("no images: expected at least one")
        self._engine, self._raises, self._without_heads = engine, on_error == "raise", without_heads
        self._names = [name if isinstance(name, str) else name.name for name in names]
        # a task that was looked up before may already be stale
        self._since = None if any(isinstance(name, Known) for name in names) else engine.changes
        self._failures: dict[int, Failure] = {}
        numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
        self._name_of = np.array([numbers[name] for name in names], np.int64)
        self._known: list[Known | None] = []
        for number, name in enumerate(numbers):
            try:
                self._known.append(find(name))
            except (RouterError, PearStoreError) as error:
                self._known.append(None)
                self._fail(np.flatnonzero(self._name_of == number), error)
        self._uses = list({known.key: known.use for known in self._known if known is not None}.values())
        places = {use.key: i for i, use in enumerate(self._uses)}
        use_of = np.array([-1 if known is None else places[known.key] for known in self._known], np.int64)
        self._use_of: Ints = use_of[self._name_of]
        self._turns = self._take_turns(in_parts)
        widths = [0 if known is None else engine.width(known.use, without_heads) for known in self._known]
        self._answers = Answers(np.array(widths, np.int64)[self._name_of])

    def run_images(self, images: Tensor | list[ImageLike], image_of: Ints) -> None:
        """Runs all rows.

        Args:
            images: a batch as `as_images` gives it.
            image_of: each row's image, as an index into `images`, int64 [row].
        """
        rows = self._left(np.arange(len(self._names)))
        known = [one for one in self._known if one is not None]
        if not len(rows):
            return
        if isinstance(images, Tensor):
            named = [name for name, one in zip(dict.fromkeys(self._names), self._known, strict=True) if one is not None]
            check_size(images, [one.preprocess for one in known], named)
            self.run(Batch(images, rows, image_of[rows]))
            return
        way_of = [None if one is None else one.preprocess for one in self._known]
        ways = [way for i in self._name_of[rows].tolist() if (way := way_of[i]) is not None]
        for found, errors in batches(images, image_of[rows], ways, self._engine.adapted.device):
            for row, error in sorted(errors.items()):
                self._fail(rows[[row]], error)
            for batch in found:
                self.run(Batch(batch.images, rows[batch.rows], batch.image_of))

    def run(self, batch: Batch) -> None:
        """Runs the rows of a prepared batch."""
        for turn in self._turns:
            mine = (
                batch if len(self._turns) == 1 else batch.part(np.flatnonzero(np.isin(self._use_of[batch.rows], turn)))
            )
            for places in mine.parts(self._engine.adapted.device.type == "cpu"):
                self._forward(mine.part(places))

    def predictions(self, rows: slice) -> Predictions:
        """The answers and errors of a run of rows."""
        number = range(len(self._names))[rows]
        numbers = self._name_of[rows].tolist()
        classes = [() if known is None or self._without_heads else known.labels for known in self._known]
        versions = [None if known is None or known.version is None else known.version.version for known in self._known]
        thresholds = [self._threshold_of(known) for known in self._known]
        failures = {row - number.start: e for row, e in self._failures.items() if row in number}
        return Predictions(
            self._answers.of(rows),
            list(self._names[rows]),
            [classes[i] for i in numbers],
            [versions[i] for i in numbers],
            failures,
            [thresholds[i] for i in numbers] if any(one is not None for one in thresholds) else (),
        )

    def _threshold_of(self, known: Known | None) -> float | None:
        if known is None or self._without_heads:
            return None
        return known.threshold if self._threshold == "stored" else self._threshold

    def _take_turns(self, in_parts: bool) -> list[Ints]:
        """Sets of tasks, as indices, each of which fits into the slots."""
        everything = np.arange(len(self._uses))
        if all(use.key in self._engine.slots for use in self._uses):
            return [everything]
        turns: list[Ints] = []
        left = [everything]
        while left:
            turn = left.pop()
            try:
                self._engine.check([self._uses[i] for i in turn])
                turns.append(turn)
            except SlotBudgetError as error:
                if len(turn) == 1 and in_parts:
                    self._fail(np.flatnonzero(self._use_of == turn[0]), error)
                elif not in_parts:
                    raise
                else:
                    left += [turn[len(turn) // 2 :], turn[: len(turn) // 2]]
        return turns

    def _left(self, rows: Ints) -> Ints:
        """The given rows without those that failed."""
        return rows[[row not in self._failures for row in rows.tolist()]] if self._failures else rows

    def _forward(self, batch: Batch) -> None:
        """Runs rows in one forward. If that fails and failures are returned, runs each task's rows alone."""
        if self._failures:
            batch = batch.part(np.flatnonzero(np.isin(batch.rows, self._left(batch.rows))))
        numbers, task_of = np.unique(self._use_of[batch.rows], return_inverse=True)
        if not len(numbers):
            return
        uses: list[Use] = [self._uses[i] for i in numbers]
        try:
            for rows, logits in self._engine.run(batch.images, batch.image_of, uses, task_of, self._without_heads):
                self._answers.put(batch.rows[rows], logits)
        except (RouterError, PearStoreError) as error:
            if len(numbers) == 1 or self._is_for_all(error):
                self._fail(batch.rows, error)
            else:
                for number in range(len(numbers)):
                    self._forward(batch.part(np.flatnonzero(task_of == number)))
        finally:
            self._engine.drop_stale(self._since, [use.key for use in uses])

    def _is_for_all(self, error: Failure) -> bool:
        return self._raises or isinstance(error, ClosedError | ForkedError | ImageError)

    def _fail(self, rows: Ints, error: Failure) -> None:
        """Records the error of rows, or raises it."""
        if self._raises or isinstance(error, ClosedError | ForkedError):
            raise error
        self._failures.update(dict.fromkeys(rows.tolist(), error))
