"""Finds the tasks that a user names: tasks of a store, and checkpoints."""

from collections.abc import Callable, Sequence

from pear_store import ReadableStore, Task, make_task
from pear_store.files import ending
from pear_store.local.sources import Access, is_url, read_task
from pear_train.evaluation.answers import Subject


def is_checkpoint(reference: str) -> bool:
    """Whether a reference means a file or a URL. A task's name has no slash."""
    return ending(reference) == ".safetensors" or "/" in reference or is_url(reference)


def find_subjects(
    references: Sequence[str], store: Callable[[], ReadableStore], access: Access | None = None
) -> list[Subject]:
    """The tasks that a user names, each once.

    Args:
        store: opens the store. It is called only if a task of the store is named.
        access: which URLs may be opened.
    Raises:
        PearStoreError: there is no such task or file, or a checkpoint is refused.
    """
    found: dict[str, Subject] = {}
    taken: set[str] = set()
    files = [reference.rstrip("/").rpartition("/")[2] for reference in set(references)]
    for reference in references:
        if is_checkpoint(reference):
            task = read_task(reference, access=access)
            name = _free(task.name, taken)
            if name != task.name:
                task = make_task({**task.record, "task": name}, task.tensors)
            taken.add(name)
            file = reference.rstrip("/").rpartition("/")[2]
            shown = file if files.count(file) == 1 else reference
            found.setdefault(shown, Subject(shown, name, task))
            continue
        version = store().resolve(reference)
        name = f"{version.task}@{version.version}"
        shown = reference if "@" in reference else name
        found.setdefault(shown, Subject(shown, name, store().get(name), version.version))
    return list(found.values())


def added(subjects: Sequence[Subject]) -> list[Task]:
    """The tasks from checkpoints, which must be added to the router because no store has them."""
    return [subject.task for subject in subjects if subject.version is None]


def _free(name: str, taken: set[str]) -> str:
    """The name, or a similar one that no other checkpoint has."""
    return next(free for free in (name, *(f"{name[:90]}-{i}" for i in range(2, 1000))) if free not in taken)
