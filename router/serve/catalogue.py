"""Which tasks a server has: those of its store for its backbone, and those that were added to its router."""

import difflib
import json
import logging
import threading
from typing import Any

from pear_store import PearStoreError, Version
from router.errors import RouterError
from router.registry import Known
from router.router import Router

NEAR = 3
"""Most names that are offered in place of one that is unknown."""

log = logging.getLogger(__name__)


class Catalogue:
    """The tasks, as of the last refresh. It reads the store: call it from a thread, not from the event loop."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._lock = threading.Lock()
        self._listed: dict[str, Version | None] | None = None
        self._fits: dict[tuple[str, int, int], bool] = {}
        """Task, version and time -> whether it is for this backbone."""

    def forget(self) -> None:
        """The next look reads the store again."""
        with self._lock:
            self._listed = None

    def tasks(self) -> dict[str, Version | None]:
        """Name -> newest version, by name; None for a task that was added to the router.

        Raises:
            PearStoreError: the store cannot be read.
        """
        with self._lock:
            if self._listed is None:
                found = {version.task: version for version in self._stored() if self._is_ours(version)}
                added = dict.fromkeys(self._router.added())
                self._listed = dict(sorted({**found, **added}.items()))
            return self._listed

    def _stored(self) -> list[Version]:
        return [] if self._router.store is None else list(self._router.store.iter_tasks())

    def _is_ours(self, version: Version) -> bool:
        key = version.task, version.version, version.time_ns
        if key not in self._fits:
            assert self._router.store is not None
            try:
                task = self._router.store.get(f"{version.task}@{version.version}", copy=False)
                self._fits[key] = task.backbone_digest == self._router.backbone.digest
            except PearStoreError as error:
                log.warning("task %s@%d is left out of lists: %s", version.task, version.version, error)
                return False
        return self._fits[key]

    def near(self, name: str) -> list[str]:
        """Names of tasks that look like one that is unknown, the likest first."""
        try:
            names = self.tasks()
        except PearStoreError:
            return []
        base = name.partition("@")[0][:100]
        same_start = [one for one in names if one[:1].lower() == base[:1].lower()]
        return difflib.get_close_matches(base, same_start or list(names)[:1000], NEAR)

    def summary(self, name: str, version: Version | None) -> dict[str, Any]:
        """What a list says of a task."""
        if version is None:
            return {"name": name, "version": None, "size_bytes": None, "tags": []}
        return {
            "name": name,
            "version": version.version,
            "size_bytes": version.size_bytes,
            "tags": list(version.tags),
        }

    def describe(self, reference: str) -> dict[str, Any]:
        """What is known of a task.

        Raises:
            RouterError, PearStoreError: it cannot be run.
        """
        known: Known = self._router.lookup(reference)
        found = self.summary(known.task.name, known.version)
        return {
            **found,
            "labels": list(known.task.labels),
            "preprocess": dict(known.task.preprocess),
            "metrics": _finite(known.task.record.get("metrics")),
            "backbone": {"model": known.task.backbone_model, "digest": known.task.backbone_digest},
            "loaded": self._is_loaded(known),
        }

    def _is_loaded(self, known: Known) -> bool:
        try:
            return self._router.is_loaded(known)
        except RouterError:
            return False


def _finite(metrics: object) -> object:
    """A record's metrics; none if JSON cannot hold them."""
    try:
        json.dumps(metrics, allow_nan=False)
    except ValueError:
        return {}
    return metrics or {}
