"""The whole evaluation: from tasks and images to figures and comparisons."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pear_train.evaluation.answers import Answers, Floats, Ints, Subject, ask, check_classes, check_subjects
from pear_train.evaluation.compare import Comparison, compare
from pear_train.evaluation.figures import Figures, figures
from pear_train.evaluation.gate import Check, Gate
from pear_train.evaluation.sample import Sample
from router import Router


@dataclass(frozen=True, eq=False)
class Evaluated:
    """One task and its figures."""

    subject: Subject
    figures: Figures
    targets: Ints
    """True classes, as the task's class numbers, int64 [image]."""
    probabilities: Floats
    """float32 [image, class]."""

    @property
    def predicted(self) -> Ints:
        return np.asarray(self.probabilities.argmax(1), np.int64)

    @property
    def right(self) -> Any:
        return self.predicted == self.targets

    def mistakes(self, most: int) -> Ints:
        """Places of wrong answers, the most confident first."""
        confidence = self.probabilities.max(1)
        wrong = np.flatnonzero(~self.right)
        return wrong[np.argsort(-confidence[wrong], kind="stable")][:most]

    def answer(self, place: int) -> dict[str, Any]:
        """The task's answer for an image, and the true class."""
        label = int(self.predicted[place])
        return {
            "label": self.subject.task.labels[int(self.targets[place])],
            "predicted": self.subject.task.labels[label],
            "probability": round(float(self.probabilities[place, label]), 6),
            "label_probability": round(float(self.probabilities[place, int(self.targets[place])]), 6),
        }


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation. All tasks were evaluated on the same images."""

    sample: Sample
    answers: Answers
    tasks: list[Evaluated]
    comparisons: list[Comparison]
    """Each further task compared with the first."""
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether the gate is passed."""
        return all(check.passed for check in self.checks)

    def name(self, place: int) -> str:
        """An answered image's name within the data."""
        return self.sample.images.names[int(self.answers.rows[place])]

    def task(self, shown: str) -> Evaluated:
        return next(task for task in self.tasks if task.subject.shown == shown)

    def as_json(self, most: int) -> dict[str, Any]:
        """Everything as JSON values. Shares are in 0..1.

        Args:
            most: most mistakes to list for each task.
        """
        names = self.sample.images.names
        return {
            "data": self.sample.description,
            "split": self.sample.split,
            "notes": list(self.sample.notes),
            "images": len(self.answers.rows),
            "errors": [{"image": names[row], "error": text} for row, text in self.answers.unreadable.items()],
            "tasks": [self._task_json(task, most) for task in self.tasks],
            "comparisons": [self._comparison_json(comparison) for comparison in self.comparisons],
            "gate": {"passed": self.passed, "checks": [asdict(check) for check in self.checks]}
            if self.checks
            else None,
        }

    def _task_json(self, task: Evaluated, most: int) -> dict[str, Any]:
        told = asdict(task.figures)
        told["wanted"] = [
            {"wanted_accuracy": wanted, **(asdict(point) if point is not None else {"threshold": None})}
            for wanted, point in task.figures.wanted.items()
        ]
        subject = task.subject
        return {
            "task": subject.shown,
            "name": subject.task.name,
            "version": subject.version,
            "backbone": subject.task.backbone_model,
            **told,
            "mistakes": [{"image": self.name(place), **task.answer(place)} for place in task.mistakes(most).tolist()],
        }

    def _comparison_json(self, comparison: Comparison) -> dict[str, Any]:
        before, after = self.task(comparison.before), self.task(comparison.after)

        def changed(places: Ints) -> list[dict[str, Any]]:
            return [
                {
                    "image": self.name(place),
                    "label": after.answer(place)["label"],
                    "before": before.answer(place)["predicted"],
                    "after": after.answer(place)["predicted"],
                }
                for place in places.tolist()
            ]

        return {
            "before": comparison.before,
            "after": comparison.after,
            "top1_change": comparison.top1_change,
            "p_value": comparison.p_value,
            "both_right": comparison.both_right,
            "both_wrong": comparison.both_wrong,
            "better": changed(comparison.better),
            "worse": changed(comparison.worse),
            "other_mistake": changed(comparison.other),
        }


def evaluate(
    router: Router,
    subjects: Sequence[Subject],
    sample: Sample,
    *,
    batch_size: int = 64,
    gate: Gate | None = None,
    tell: Callable[[int], Any] = lambda count: None,
) -> Evaluation:
    """Evaluates tasks that the router knows. Each further task is compared with the first.

    Args:
        batch_size: images per forward.
        gate: demands on the tasks; None: no demands.
        tell: is called with the number of images after each batch.
    Raises:
        ConfigError: a task has no classes.
        DataError: the data has classes that a task does not have, or no image could be answered.
        RouterError, PearStoreError: a task cannot be run.
    """
    check_subjects(subjects)
    check_classes(sample.description, _named(sample), subjects)
    answers = ask(router, subjects, sample.images, batch_size, tell)
    of_data = sample.images.targets.numpy()[answers.rows]
    tasks = []
    for subject in subjects:
        targets, probabilities = subject.numbers_of(sample.classes)[of_data], answers.probabilities[subject.name]
        tasks.append(Evaluated(subject, figures(subject.task.labels, targets, probabilities), targets, probabilities))
    comparisons = [_compared(tasks[0], task) for task in tasks[1:]]
    checks = (gate or Gate()).checks({task.subject.shown: task.figures for task in tasks}, len(answers.unreadable))
    return Evaluation(sample, answers, tasks, comparisons, checks)


def _named(sample: Sample) -> list[str]:
    """The classes that have images."""
    there = set(sample.images.targets.tolist())
    return [name for i, name in enumerate(sample.classes) if i in there]


def _compared(before: Evaluated, after: Evaluated) -> Comparison:
    said = [np.array(task.subject.task.labels, object)[task.predicted] for task in (before, after)]
    return compare(before.subject.shown, after.subject.shown, before.right, after.right, said[0] != said[1])
