"""Says which tensors each version names, from the index alone. Sharing and growth are counted by this."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pear_store.errors import DamagedError
from pear_store.local.index import View
from pear_store.local.references import Version, all_tags, version_with_tags


@dataclass(frozen=True)
class Use:
    """A version, and the numbers of its tensors. These numbers are only valid within one `Uses`."""

    version: Version
    tensors: Sequence[int]


@dataclass(frozen=True)
class Uses:
    """Every version, the oldest first, and the bytes of each tensor that one of them names."""

    versions: list[Use]
    size_bytes: Mapping[int, int]

    @classmethod
    def by_age(cls, versions: list[Use], size_bytes: Mapping[int, int]) -> "Uses":
        """Sorts versions by time; those of the same time by name and number."""
        key = [(use.version.time_ns, use.version.task, use.version.version) for use in versions]
        order = sorted(range(len(versions)), key=key.__getitem__)
        return cls([versions[place] for place in order], size_bytes)


def find_uses(view: View) -> Uses:
    """Which tensors each version names. No record is read: a manifest's row has the numbers of its tensors.

    Raises:
        DamagedError: a row is damaged or missing.
    """
    size_bytes: dict[int, int] = {}
    for _, contents in view.contents.every():
        size_bytes.update(zip(contents.numbers, contents.lengths, strict=True))
    tags = all_tags(view)
    found: list[Use] = []
    for task, number, row in view.versions.every():
        manifest = view.manifests.get(row.manifest)
        if manifest is None:
            raise DamagedError(f"manifest of version {task}@{number}", "missing")
        tensors = array("I")
        tensors.frombytes(manifest.tensors.cast("B"))  # a copy: the view would hold the whole row
        if not size_bytes.keys() >= set(tensors):
            raise DamagedError(f"version {task}@{number}", "it names a tensor that no pack lists")
        found.append(Use(version_with_tags(task, number, row, tags), tensors))
    return Uses.by_age(found, size_bytes)
