"""What lists say of a remote's versions, by its log alone. No task is fetched."""

from collections.abc import Callable, Iterable
from contextlib import suppress

from pear_store.errors import DamagedRemoteError, NotFoundError, PearStoreError
from pear_store.format.container import strict_json
from pear_store.format.digest import Digest
from pear_store.format.manifest import manifest_digests
from pear_store.format.summary import Summary
from pear_store.local.references import Version
from pear_store.local.uses import Use, Uses
from pear_store.remote.log import LoggedVersion
from pear_store.remote.mirror import Mirror


def summaries(mirror: Mirror, versions: Iterable[Version]) -> list[Summary | PearStoreError]:
    """See :meth:`pear_store.readable.ReadableStore.summaries`."""
    return [_summary(mirror, version) for version in versions]


def _summary(mirror: Mirror, version: Version) -> Summary | PearStoreError:
    """What a list says of one version. Its record was never checked, so unexpected values are left out."""
    what = f"{version.task}@{version.version}"
    there = mirror.version(version.task, version.version)
    if there is None or there[1]:
        return NotFoundError(f"{mirror.url}: version {what} was removed meanwhile")
    try:
        record = strict_json(mirror.manifest_of(there[0]) or b"")
    except ValueError as error:
        return DamagedRemoteError(mirror.url, f"manifest of {what}", str(error))
    return Summary.of(record if isinstance(record, dict) else {})


def uses(mirror: Mirror, as_version: Callable[[LoggedVersion], Version]) -> Uses:
    """Which tensors each version names, and the bytes of each, as the log lists them."""
    numbers: dict[Digest, int] = {}
    size_bytes: dict[int, int] = {}
    found: list[Use] = []
    for task in mirror.tasks():
        for logged in mirror.versions(task):
            digests: list[Digest] = []
            with suppress(ValueError):  # an invalid manifest, which `get` refuses
                digests = manifest_digests(mirror.manifest_of(logged) or b"")
            if fresh := [digest for digest in digests if digest not in numbers]:
                for digest, places in mirror.places_of(fresh).items():
                    size_bytes[len(numbers)] = places[0][1].length if places else 0
                    numbers[digest] = len(numbers)
            found.append(Use(as_version(logged), [numbers[digest] for digest in digests]))
    return Uses.by_age(found, size_bytes)
