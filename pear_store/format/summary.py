"""What lists say of a task, from its record. A record may be a stranger's, so unexpected values are left out."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard


@dataclass(frozen=True, slots=True)
class Summary:
    """A task in a list. None: the record does not say.

    Args:
        backbone: its timm name.
        backbone_digest: its digest.
        classes: how many labels the task has.
        metrics: all figures that it states, by their names.
        selected_by: the figure that chose the weights: ``val_macro_f1`` or ``val_top1``.
    """

    backbone: str | None
    backbone_digest: str | None
    classes: int | None
    metrics: Mapping[str, float]
    selected_by: str

    @property
    def val_top1(self) -> float | None:
        """The share of the validation images that were classified right, 0 to 1."""
        return self._share("val_top1")

    @property
    def val(self) -> float | None:
        """The figure that chose the weights, 0 to 1."""
        return self._share(self.selected_by)

    def _share(self, metric: str) -> float | None:
        value = self.metrics.get(metric)
        return value if value is not None and 0 <= value <= 1 else None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Summary":
        backbone, labels = _mapping(record.get("backbone")), record.get("labels")
        metrics, training = _mapping(record.get("metrics")), _mapping(record.get("training"))
        return cls(
            _text(backbone.get("model")),
            _text(backbone.get("digest")),
            len(labels) if isinstance(labels, list) else None,
            {key: value for key, value in metrics.items() if _is_number(value)},
            "val_macro_f1" if training.get("select") == "macro_f1" else "val_top1",
        )


COURSE = ("history", "importance", "pruned", "borrowed", "banked", "images", "unreadable", "machines")
"""Fields of a training record that say how the training went. They are no options."""


@dataclass(frozen=True)
class Origin:
    """Where a task came from, by its training record.

    Args:
        data: what says which images it was trained on.
        given: the tasks or bases that it started from.
        options: every other option that is a text or a number.
    """

    data: Mapping[str, Any]
    given: Mapping[str, Any]
    options: Mapping[str, Any]

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Origin":
        training = _mapping(record.get("training"))
        data = {key: value for key, value in training.items() if _is_of_data(key) and value not in (None, "", {})}
        given = {key: training[key] for key in ("given", "bases", "rebased", "rounded") if training.get(key)}
        unsaid = {*COURSE, *data, *given, *(("rank",) if "bases" in given else ())}  # bases have their own
        options = {key: value for key, value in training.items() if key not in unsaid and _is_plain(value)}
        return cls(data, given, options)


def _is_of_data(key: str) -> bool:
    return key.startswith("data") or key in ("images", "fingerprint")


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


NO_SUMMARY = Summary.of({})
"""What lists show of a task whose record cannot be read"""
